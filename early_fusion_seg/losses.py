"""Losses on low-resolution logits: upsampled and reduced a few rows at a time, recomputed in backward.

Values and gradients equal the plain computation on `F.interpolate(logits, (H, W))` in float32, but logits at full
resolution never exist as a whole. A batch with no valid pixel gives 0 with a gradient of 0.

Shapes: n images, K classes, logits (n, K, h, w), target (n, H, W) of train ids with `ignore_index` where no truth is.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from early_fusion_seg.errors import UserError
from early_fusion_seg.upsample import row_chunks, source_rows, upsample_rows

Term = Literal["cross_entropy", "ohem", "dice"]
RowFunction = Callable[[Tensor, Tensor], Tensor]


def pixel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = 255,
) -> Tensor:
    """Compute the cross-entropy of each pixel.

    Args:
        logits: (n, K, h, w).
        target: (n, H, W) integers.
        class_weights: (K,) factors, or None.
        label_smoothing: In 0..1, as in `torch.nn.functional.cross_entropy`.
        ignore_index: Target value of pixels that get 0.

    Returns:
        (n, H, W) float32.
    """

    def rows_loss(rows: Tensor, labels: Tensor) -> Tensor:  # (n, K, R, W), (n, R, W) -> (n, R, W)
        return F.cross_entropy(
            rows,
            labels.long(),
            class_weights,
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        )

    return _by_rows(logits, target, rows_loss)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = 255,
) -> Tensor:
    """Compute the mean cross-entropy, weighted as in `torch.nn.functional.cross_entropy`; see `pixel_cross_entropy`.

    Returns:
        Scalar float32.
    """
    pixels = pixel_cross_entropy(logits, target, class_weights, label_smoothing, ignore_index)
    valid = target != ignore_index
    if class_weights is None:
        return pixels.sum() / valid.sum().clamp(min=1)
    weight = (class_weights[target.long().where(valid, 0)] * valid).sum()
    return pixels.sum() / weight.where(weight > 0, 1)


def ohem_cross_entropy(
    logits: Tensor,
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
        logits: (n, K, h, w).
        target: (n, H, W) integers.
        threshold: Probability in 0..1.
        min_kept: Share of the batch's pixels, in 0..1.
        class_weights: (K,) factors of the kept pixels' losses, or None; they do not decide what is hard.
        ignore_index: Target value of pixels that are never kept.

    Returns:
        Scalar float32.
    """
    pixels = pixel_cross_entropy(logits, target, ignore_index=ignore_index)
    valid = target != ignore_index
    hardness = pixels.detach().where(valid, -1.0).flatten()
    kept_at_least = hardness.topk(max(1, round(min_kept * hardness.numel()))).values[-1]
    hard = valid & (pixels.detach() >= kept_at_least.clamp(max=-math.log(threshold)))
    if class_weights is not None:
        weights = class_weights[target.long().where(valid, 0)]
        return (pixels * weights * hard).sum() / _at_least_one((weights * hard).sum())
    return (pixels * hard).sum() / hard.sum().clamp(min=1)


def dice(logits: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Compute 1 - soft Dice, the mean over the classes that occur in the batch (arXiv 1606.04797, plain sums).

    Dice of class c is 2 * sum(p_c * y_c) / (sum(p_c) + sum(y_c)) over the batch's valid pixels.

    Args:
        logits: (n, K, h, w).
        target: (n, H, W) integers.
        ignore_index: Target value of pixels that are left out.

    Returns:
        Scalar float32.
    """
    k = logits.shape[1]

    def rows_sums(rows: Tensor, labels: Tensor) -> Tensor:  # (n, K, R, W), (n, R, W) -> (3, R, K)
        valid = (labels != ignore_index)[:, None]
        probability = rows.softmax(1) * valid
        truth = F.one_hot(labels.long().where(valid[:, 0], 0), k).movedim(-1, 1) * valid
        return torch.stack([(probability * truth).sum((0, 3)).T, probability.sum((0, 3)).T, truth.sum((0, 3)).T])

    overlap, predicted, true = _by_rows(logits, target, rows_sums).sum(1)  # (K,) each
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
        """Return the sum of the class weights of the labelled pixels of target (n, H, W), a float32 scalar."""
        valid = target != self.ignore_index
        if self.class_weights is None:
            return valid.sum().float()
        return (self.class_weights[target.long().where(valid, 0)] * valid).sum()

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Map logits (n, K, h, w) and target (n, H, W) to a scalar."""
        weights, ignored = self.class_weights, self.ignore_index
        total = logits.new_zeros((), dtype=torch.float32)
        for term, factor in self.terms.items():
            if term == "cross_entropy":
                value = cross_entropy(logits, target, weights, self.label_smoothing, ignored)
            elif term == "ohem":
                value = ohem_cross_entropy(logits, target, class_weights=weights, ignore_index=ignored)
            else:
                value = dice(logits, target, ignored)
            total = total + factor * value
        return total


def _at_least_one(x: Tensor) -> Tensor:
    """Replace zeros, which only an empty sum has, by ones."""
    return x.where(x > 0, 1)


def _by_rows(logits: Tensor, target: Tensor, function: RowFunction) -> Tensor:
    return cast(Tensor, _RowChunks.apply(logits, target, function))


class _RowChunks(torch.autograd.Function):
    """Apply a function of upsampled rows, one chunk at a time; its results are put together along dimension 1."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, function: RowFunction) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.function = function
        return torch.cat([_chunk(_slab(logits, target, a, b), logits, target, function, a, b) for a, b in
                          row_chunks(logits, _size(target))], dim=1)  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, target = ctx.saved_tensors
        total = torch.zeros_like(logits, dtype=torch.float32)
        for a, b in row_chunks(logits, _size(target)):
            slab = _slab(logits, target, a, b).detach().requires_grad_()
            with torch.enable_grad():
                part = _chunk(slab, logits, target, ctx.function, a, b)
            (gradient,) = torch.autograd.grad(part, slab, grad[:, a:b])
            first, last = source_rows(logits.shape[2], target.shape[1], a, b)
            total[:, :, first:last] += gradient
        return total.to(logits.dtype), None, None


def _size(target: Tensor) -> tuple[int, int]:
    return target.shape[-2], target.shape[-1]


def _slab(logits: Tensor, target: Tensor, a: int, b: int) -> Tensor:
    first, last = source_rows(logits.shape[2], target.shape[1], a, b)
    return logits[:, :, first:last]


def _chunk(slab: Tensor, logits: Tensor, target: Tensor, function: RowFunction, a: int, b: int) -> Tensor:
    with torch.autocast(slab.device.type, enabled=False):
        return function(upsample_rows(slab, logits.shape[2], _size(target), a, b), target[:, a:b])
