"""Losses on low-resolution logits, upsampled to the label size and reduced a few rows at a time.

Values and gradients equal the plain computation on `F.interpolate(logits, (H, W))` in float32, but full-resolution
logits never exist as a whole; with `LazyLogits`, the logits at the finest stream do not either. A batch without a valid
pixel gives 0 with a gradient of 0. Cross-entropy and the sum over chunks are in `logits/chunked_loss.py`.

Shapes: n images, K classes, logits (n, K, h, w), target (n, H, W) of train ids, `ignore_index` where there is no label;
a chunk has R rows, classes last.
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

    Hard is a pixel whose true class has a probability below `threshold`; of all pixels at least the share `min_kept`
    with the highest loss is kept.

    Args:
        logits: (n, K, h, w), or lazy logits.
        target: (n, H, W) integers.
        threshold: Probability in 0..1.
        min_kept: Share of the batch's pixels, in 0..1.
        class_weights: (K,) factors of the kept pixels' losses, or None; they do not decide what is hard.
        ignore_index: Target value of pixels that are never kept.

    Returns:
        Scalar float32.
    """
    pixels = pixel_cross_entropy(logits, target, ignore_index)
    valid = target != ignore_index
    hardness = pixels.where(valid, -1.0).flatten()
    kept_at_least = hardness.topk(max(1, round(min_kept * hardness.numel()))).values[-1]
    hard = valid & (pixels >= kept_at_least.clamp(max=-math.log(threshold)))
    return cross_entropy(logits, target, class_weights, kept=hard)


def dice(logits: Tensor | LazyLogits, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Compute 1 - soft Dice, the mean over the classes that occur in the batch (arXiv 1606.04797, plain sums).

    Dice of class c is 2 * sum(p_c * y_c) / (sum(p_c) + sum(y_c)) over the batch's valid pixels.

    Args:
        logits: (n, K, h, w), or lazy logits.
        target: (n, H, W) integers.
        ignore_index: Target value of pixels that are left out.

    Returns:
        Scalar float32.
    """

    def rows_sums(rows: Tensor, labels: Tensor) -> Tensor:  # (n, R, W, K), (n, R, W) -> (3, K)
        valid = (labels != ignore_index)[..., None]
        true = labels.long()[..., None].where(valid, 0)
        truth = torch.zeros_like(rows, dtype=torch.bool).scatter_(
            -1, true, valid
        )  # a quarter of the memory of one-hot floats
        probability = rows.softmax(-1) * valid
        return torch.stack([x.sum((0, 1, 2), dtype=rows.dtype) for x in (probability * truth, probability, truth)])

    overlap, predicted, true = sum_over_chunks(logits, target, rows_sums)  # (K,) each
    occurs = true > 0
    scores = 2 * overlap / at_least_one(predicted + true)
    loss: Tensor = ((1 - scores) * occurs).sum() / occurs.sum().clamp(min=1)
    return loss


class SegmentationLoss(nn.Module):
    """Weighted sum of losses.

    Args:
        terms: Term -> weight; `{"cross_entropy": 1.0}`, `{"ohem": 1.0, "dice": 0.5}`.
        class_weights: K factors for cross-entropy and OHEM, or None.
        label_smoothing: Of cross-entropy, in 0..1.
        ignore_index: Target value that is left out.

    Raises:
        UserError: A term that does not exist, or none.

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
            raise UserError(f"loss={dict(terms)}; expected weights for some of {', '.join(LOSSES)}")
        self.terms = dict(terms)
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)

    def weight(self, target: Tensor) -> Tensor:
        """Return the sum of the class weights of the labeled pixels of target (n, H, W), a float32 scalar."""
        return pixel_weight(target, target != self.ignore_index, self.class_weights)

    def forward(self, logits: Tensor | LazyLogits, target: Tensor) -> Tensor:
        """Map logits (n, K, h, w), or lazy logits, and target (n, H, W) to a scalar."""
        total = torch.zeros((), dtype=torch.float32, device=target.device)
        for term, factor in self.terms.items():
            total = total + factor * LOSSES[term](logits, target, self)
        return total


LossTerm = Callable[[Tensor | LazyLogits, Tensor, SegmentationLoss], Tensor]

LOSSES: dict[str, LossTerm] = {  # name in `--model.loss` -> function of (logits, target, the SegmentationLoss)
    "cross_entropy": lambda x, y, o: cross_entropy(x, y, o.class_weights, o.label_smoothing, o.ignore_index),
    "ohem": lambda x, y, o: ohem_cross_entropy(x, y, class_weights=o.class_weights, ignore_index=o.ignore_index),
    "dice": lambda x, y, o: dice(x, y, o.ignore_index),
}
