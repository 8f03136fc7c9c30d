"""Segmentation losses: low-resolution logits are upsampled to the label size and reduced a few rows at a time.

Values and gradients equal the plain computation on `F.interpolate(logits, (H, W))` in float32, but full-resolution
logits are never stored as a whole. With `LazyLogits`, neither are the logits at the finest stride. A batch without
labeled pixels gives a loss of 0 with a gradient of 0. Cross-entropy and the sum over chunks are in
`logits/chunked_loss.py`.

Shapes: n images, K classes, logits (n, K, h, w), target (n, H, W) of train ids or `ignore_index`; a chunk of upsampled
logits has R rows, classes last.

To add a loss: write a function of logits and target, and add it to `LOSSES` at the end of this file.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from early_fusion_seg.errors import UserError
from early_fusion_seg.logits import LazyLogits
from early_fusion_seg.logits.chunked_loss import (
    at_least_one,
    cross_entropy,
    pixel_cross_entropy,
    pixel_weight,
    sum_over_chunks,
)


def ohem_cross_entropy(
    logits: Tensor | LazyLogits,
    target: Tensor,
    threshold: float = 0.7,
    min_kept: float = 1 / 16,
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Compute the mean cross-entropy of the hard pixels (online hard example mining, arXiv 1604.03540).

    A pixel is hard if the predicted probability of its true class is below `threshold`. If fewer pixels than the
    fraction `min_kept` of the batch are hard, the pixels with the highest losses are kept up to this fraction.

    Args:
        logits: (n, K, h, w), or lazy logits.
        target: (n, H, W) integers.
        threshold: Probability of the true class, in 0..1.
        min_kept: Minimum fraction of the pixels of the batch, in 0..1.
        class_weights: (K,) factors of the losses of the kept pixels, or None; they do not affect which pixels are hard.
        ignore_index: Target value of pixels that are never kept.

    Returns:
        Scalar float32.
    """
    losses = pixel_cross_entropy(logits, target, ignore_index)
    valid = target != ignore_index
    candidates = losses.where(valid, -1.0).flatten()
    lowest_kept = candidates.topk(max(1, round(min_kept * candidates.numel()))).values[-1]
    hard = valid & (losses >= lowest_kept.clamp(max=-math.log(threshold)))
    return cross_entropy(logits, target, class_weights, kept=hard)


def dice(logits: Tensor | LazyLogits, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Compute 1 - soft Dice, averaged over the classes that occur in the batch (arXiv 1606.04797).

    Dice of class c is 2 * sum(p_c * y_c) / (sum(p_c) + sum(y_c)) over the labeled pixels of the batch: plain
    sums, where the paper has squares.

    Args:
        logits: (n, K, h, w), or lazy logits.
        target: (n, H, W) integers.
        ignore_index: Target value of pixels that are left out.

    Returns:
        Scalar float32.
    """

    def row_sums(rows: Tensor, labels: Tensor) -> Tensor:  # (n, R, W, K), (n, R, W) -> (3, K)
        valid = (labels != ignore_index)[..., None]
        true = labels.long()[..., None].where(valid, 0)
        # one-hot as bool, a quarter of the memory of float32
        truth = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, true, valid)
        probability = rows.softmax(-1) * valid
        return torch.stack([x.sum((0, 1, 2), dtype=rows.dtype) for x in (probability * truth, probability, truth)])

    overlap, predicted, true = sum_over_chunks(logits, target, row_sums)  # (K,) each
    occurs = true > 0
    scores = 2 * overlap / at_least_one(predicted + true)
    loss: Tensor = ((1 - scores) * occurs).sum() / occurs.sum().clamp(min=1)
    return loss


def check_batch(mask: Tensor, images: Tensor, num_classes: int, ignore_index: int) -> None:
    """Check type, shape and labels of a batch of masks, which may come from a data set of another project.

    Args:
        mask: Expected: integers (n, H, W), each below `num_classes` or `ignore_index`.
        images: (n, 3, h, w).
        num_classes: Number of classes K.
        ignore_index: Label of pixels without a class.

    Raises:
        UserError: They are not as expected.
    """
    if mask.is_floating_point() or mask.is_complex() or mask.ndim != 3 or len(mask) != len(images):
        raise UserError(
            f"the masks are {mask.dtype} of the shape {tuple(mask.shape)}; expected integers of the shape (n, h, w) "
            f"for {len(images)} images"
        )
    labels = mask[mask != ignore_index]
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise UserError(
            f"a mask has the label {wrong}, but the model has {num_classes} classes, 0 to {num_classes - 1}, and "
            f"{ignore_index} for ignored pixels; set num_classes, or build it with ReverseHRNetSeg.for_data(data)"
        )


class SegmentationLoss(nn.Module):
    """Weighted sum of losses.

    Args:
        terms: Name of a loss -> its weight, such as `{"ohem": 1.0, "dice": 0.5}`; the names are those of `LOSSES`.
        class_weights: K factors for cross-entropy and OHEM, or None.
        label_smoothing: Label smoothing of cross-entropy, in 0..1.
        ignore_index: Target value of pixels that are left out.

    Raises:
        UserError: `terms` is empty or has an unknown name.

    Example:
        >>> loss = SegmentationLoss({"cross_entropy": 1.0, "dice": 1.0})
        >>> bool(loss(torch.zeros(1, 3, 4, 4), torch.full((1, 8, 8), 255)) == 0)
        True
    """

    def __init__(
        self,
        terms: Mapping[str, float],
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if not terms or not terms.keys() <= LOSSES.keys():
            raise UserError(f"loss={dict(terms)}; expected a weight for one or more of {', '.join(LOSSES)}")
        self.terms = dict(terms)
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)

    @property
    def is_nll(self) -> bool:
        """Return whether the loss is the plain negative log-likelihood."""
        return self.terms == {"cross_entropy": 1.0} and self.class_weights is None and self.label_smoothing == 0

    def weight(self, target: Tensor) -> Tensor:
        """Return the sum of the class weights of the labeled pixels of target (n, H, W), a float32 scalar."""
        return pixel_weight(target, target != self.ignore_index, self.class_weights)

    def forward(self, logits: Tensor | LazyLogits, target: Tensor) -> Tensor:
        """Compute the loss of logits (n, K, h, w), or lazy logits, and target (n, H, W): a float32 scalar."""
        total = torch.zeros((), dtype=torch.float32, device=target.device)
        for term, factor in self.terms.items():
            total = total + factor * LOSSES[term](logits, target, self)
        return total


LossTerm = Callable[[Tensor | LazyLogits, Tensor, SegmentationLoss], Tensor]

LOSSES: dict[str, LossTerm] = {  # name in `--model.loss` -> function of (logits, target, options)
    "cross_entropy": lambda x, y, o: cross_entropy(x, y, o.class_weights, o.label_smoothing, o.ignore_index),
    "ohem": lambda x, y, o: ohem_cross_entropy(x, y, class_weights=o.class_weights, ignore_index=o.ignore_index),
    "dice": lambda x, y, o: dice(x, y, o.ignore_index),
}
