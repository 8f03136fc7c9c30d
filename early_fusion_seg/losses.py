"""Losses on low-resolution logits: upsampled and reduced a few rows at a time.

Values and gradients equal the plain computation on `F.interpolate(logits, (H, W))` in float32, but logits at full
resolution never exist as a whole; given as `LazyLogits`, not even those at the finest stream's do. A batch with no valid
pixel gives 0 with a gradient of 0.

Cross-entropy is linear in the pixels' losses, so its gradient is made in the same pass as its value, chunk by chunk.

Shapes: n images, K classes, logits (n, K, h, w), target (n, H, W) of train ids with `ignore_index` where no truth is;
a chunk has R rows, with the classes last.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from early_fusion_seg.chunks import size_of, sum_of_chunks, summed_cross_entropy
from early_fusion_seg.errors import UserError
from early_fusion_seg.votes import LazyLogits, as_lazy_logits

Term = Literal["cross_entropy", "ohem", "dice"]


def cross_entropy(
    logits: Tensor | LazyLogits,
    target: Tensor,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = 255,
) -> Tensor:
    """Compute the mean cross-entropy, weighted as in `torch.nn.functional.cross_entropy`.

    Args:
        logits: (n, K, h, w), or the votes that make them.
        target: (n, H, W) integers.
        class_weights: (K,) factors, or None.
        label_smoothing: In 0..1, as in `torch.nn.functional.cross_entropy`.
        ignore_index: Target value of pixels that are left out.

    Returns:
        Scalar float32.
    """
    valid = target != ignore_index
    total = summed_cross_entropy(logits, target, valid, class_weights, label_smoothing)
    return total / _at_least_one(_weight(target, valid, class_weights))


@torch.no_grad()
def pixel_cross_entropy(logits: Tensor | LazyLogits, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Compute the cross-entropy of each pixel, without a gradient.

    Args:
        logits: (n, K, h, w), or the votes that make them.
        target: (n, H, W) integers.
        ignore_index: Target value of pixels that get 0.

    Returns:
        (n, H, W) float32.
    """
    votes, size = as_lazy_logits(logits), size_of(target)
    pixels = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    for images, start, stop in votes.chunks(size):
        rows, labels = votes.upsampled(size, (images, start, stop)), target[images, start:stop]
        valid = labels != ignore_index
        true = rows.gather(-1, labels.long().where(valid, 0)[..., None])[..., 0]
        pixels[images, start:stop] = (rows.logsumexp(-1) - true) * valid
    return pixels


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
        logits: (n, K, h, w), or the votes that make them.
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
    total = summed_cross_entropy(logits, target, hard, class_weights)
    return total / _at_least_one(_weight(target, hard, class_weights))


def dice(logits: Tensor | LazyLogits, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Compute 1 - soft Dice, the mean over the classes that occur in the batch (arXiv 1606.04797, plain sums).

    Dice of class c is 2 * sum(p_c * y_c) / (sum(p_c) + sum(y_c)) over the batch's valid pixels.

    Args:
        logits: (n, K, h, w), or the votes that make them.
        target: (n, H, W) integers.
        ignore_index: Target value of pixels that are left out.

    Returns:
        Scalar float32.
    """

    def rows_sums(rows: Tensor, labels: Tensor) -> Tensor:  # (n, R, W, K), (n, R, W) -> (3, K)
        valid = (labels != ignore_index)[..., None]
        true = labels.long()[..., None].where(valid, 0)
        truth = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, true, valid)  # a quarter of one-hot floats
        probability = rows.softmax(-1) * valid
        return torch.stack([x.sum((0, 1, 2), dtype=rows.dtype) for x in (probability * truth, probability, truth)])

    overlap, predicted, true = sum_of_chunks(logits, target, rows_sums)  # (K,) each
    occurs = true > 0
    scores = 2 * overlap / _at_least_one(predicted + true)
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
        terms: dict[Term, float],
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        unknown = set(terms) - {"cross_entropy", "ohem", "dice"}
        if unknown or not terms:
            raise UserError(f"loss={dict(terms)}; expected weights for some of cross_entropy, ohem and dice")
        self.terms = dict(terms)
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)

    def weight(self, target: Tensor) -> Tensor:
        """Return the sum of the class weights of the labeled pixels of target (n, H, W), a float32 scalar."""
        return _weight(target, target != self.ignore_index, self.class_weights)

    def forward(self, logits: Tensor | LazyLogits, target: Tensor) -> Tensor:
        """Map logits (n, K, h, w), or the votes that make them, and target (n, H, W) to a scalar."""
        weights, ignored = self.class_weights, self.ignore_index
        total = torch.zeros((), dtype=torch.float32, device=target.device)
        for term, factor in self.terms.items():
            if term == "cross_entropy":
                value = cross_entropy(logits, target, weights, self.label_smoothing, ignored)
            elif term == "ohem":
                value = ohem_cross_entropy(logits, target, class_weights=weights, ignore_index=ignored)
            else:
                value = dice(logits, target, ignored)
            total = total + factor * value
        return total


def _weight(target: Tensor, kept: Tensor, class_weights: Tensor | None) -> Tensor:
    """Sum the class weights of the pixels where `kept` (n, H, W) says so; without any, count them."""
    if class_weights is None:
        return kept.sum().float()
    return (class_weights[target.long().where(kept, 0)] * kept).sum()


def _at_least_one(x: Tensor) -> Tensor:
    """Replace zeros, which only an empty sum has, by ones."""
    return x.where(x > 0, 1)
