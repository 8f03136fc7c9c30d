"""Losses on low-resolution logits: upsampled and reduced a few rows at a time.

Values and gradients equal the plain computation on `F.interpolate(logits, (H, W))` in float32, but logits at full
resolution never exist as a whole; given as `Votes`, not even those at the finest stream's do. A batch with no valid
pixel gives 0 with a gradient of 0.

Cross-entropy is linear in the pixels' losses, so its gradient is made in the same pass as its value, chunk by chunk.

Shapes: n images, K classes, logits (n, K, h, w), target (n, H, W) of train ids with `ignore_index` where no truth is;
a chunk has R rows, with the classes last.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from early_fusion_seg.errors import UserError
from early_fusion_seg.votes import Chunk, Votes, as_votes

Term = Literal["cross_entropy", "ohem", "dice"]
RowFunction = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(
    logits: Tensor | Votes,
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
    total = _summed_cross_entropy(logits, target, valid, class_weights, label_smoothing)
    if class_weights is None:
        return total / valid.sum().clamp(min=1)
    return total / _at_least_one((class_weights[target.long().where(valid, 0)] * valid).sum())


@torch.no_grad()
def pixel_cross_entropy(logits: Tensor | Votes, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Compute the cross-entropy of each pixel, without a gradient.

    Args:
        logits: (n, K, h, w), or the votes that make them.
        target: (n, H, W) integers.
        ignore_index: Target value of pixels that get 0.

    Returns:
        (n, H, W) float32.
    """
    votes, size = as_votes(logits), _size(target)
    pixels = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    for images, start, stop in votes.chunks(size):
        rows, labels = votes.upsampled(size, (images, start, stop)), target[images, start:stop]
        valid = labels != ignore_index
        true = rows.gather(-1, labels.long().where(valid, 0)[..., None])[..., 0]
        pixels[images, start:stop] = (rows.logsumexp(-1) - true) * valid
    return pixels


def ohem_cross_entropy(
    logits: Tensor | Votes,
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
    total = _summed_cross_entropy(logits, target, hard, class_weights)
    if class_weights is None:
        return total / hard.sum().clamp(min=1)
    return total / _at_least_one((class_weights[target.long().where(hard, 0)] * hard).sum())


def dice(logits: Tensor | Votes, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Compute 1 - soft Dice, the mean over the classes that occur in the batch (arXiv 1606.04797, plain sums).

    Dice of class c is 2 * sum(p_c * y_c) / (sum(p_c) + sum(y_c)) over the batch's valid pixels.

    Args:
        logits: (n, K, h, w), or the votes that make them.
        target: (n, H, W) integers.
        ignore_index: Target value of pixels that are left out.

    Returns:
        Scalar float32.
    """
    k = as_votes(logits).shape[1]

    def rows_sums(rows: Tensor, labels: Tensor) -> Tensor:  # (n, R, W, K), (n, R, W) -> (3, K)
        valid = (labels != ignore_index)[..., None]
        probability = rows.softmax(-1) * valid
        truth = F.one_hot(labels.long().where(valid[..., 0], 0), k) * valid
        return torch.stack([x.sum((0, 1, 2)) for x in (probability * truth, probability, truth)])

    overlap, predicted, true = _sum_of_chunks(logits, target, rows_sums)  # (K,) each
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

    def forward(self, logits: Tensor | Votes, target: Tensor) -> Tensor:
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


def _at_least_one(x: Tensor) -> Tensor:
    """Replace zeros, which only an empty sum has, by ones."""
    return x.where(x > 0, 1)


def _summed_cross_entropy(
    logits: Tensor | Votes, target: Tensor, kept: Tensor, class_weights: Tensor | None, label_smoothing: float = 0.0
) -> Tensor:
    """Sum the weighted cross-entropy of the pixels where `kept` (n, H, W) says so."""
    votes = as_votes(logits)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in votes.tensors)  # inside, neither can be told
    options = (learns, target, kept, class_weights, label_smoothing, votes.ratios)
    return cast(Tensor, _CrossEntropy.apply(*options, *votes.tensors))


def _sum_of_chunks(logits: Tensor | Votes, target: Tensor, function: RowFunction) -> Tensor:
    """Sum a function of upsampled logits (n, R, W, K) and labels (n, R, W) over all chunks."""
    votes = as_votes(logits)
    return cast(Tensor, _SumOfChunks.apply(target, function, votes.ratios, *votes.tensors))


def _chunk_cross_entropy(
    rows: Tensor, labels: Tensor, kept: Tensor, weights: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return the sum over the kept pixels, and its gradient with respect to the logits `rows` (n, R, W, K)."""
    true, weights = labels.long().where(kept, 0)[..., None], weights.float()
    sharp = weights[true] * kept[..., None] * (1 - smoothing)  # (n, R, W, 1), factor of -log p[true]
    even = kept[..., None] * (smoothing / rows.shape[-1])  # (n, R, W, 1), factor of each -w[c] log p[c]
    highest = rows.amax(-1, keepdim=True)
    powers = (rows - highest).exp_()
    sums = powers.sum(-1, keepdim=True)
    log_sums = highest + sums.log()
    value = (sharp * (log_sums - rows.gather(-1, true))).sum()
    if smoothing:
        value = value + (even * (log_sums * weights.sum() - (rows @ weights)[..., None])).sum()
    gradient = powers.mul_((sharp + even * weights.sum()) / sums).scatter_add_(-1, true, -sharp)
    return value, gradient.sub_(even * weights) if smoothing else gradient


class _CrossEntropy(torch.autograd.Function):
    """The sum of weighted cross-entropies; its gradient is made beside it, and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        learns: bool,
        target: Tensor,
        kept: Tensor,
        class_weights: Tensor | None,
        smoothing: float,
        ratios: tuple[int, ...],
        *tensors: Tensor,
    ) -> Tensor:
        votes, size = _gathered(ratios, tensors), _size(target)
        weights = torch.ones(votes.shape[1], device=target.device) if class_weights is None else class_weights
        total = torch.zeros((), dtype=torch.float32, device=target.device)

        def of_chunk(rows: Tensor, chunk: Chunk) -> Tensor:
            place = (chunk[0], slice(*chunk[1:]))
            value, gradient = _chunk_cross_entropy(rows, target[place], kept[place], weights, smoothing)
            total.add_(value)
            return gradient

        if learns:
            ctx.save_for_backward(*votes.gradients(size, of_chunk))
            ctx.dtypes = [x.dtype for x in tensors]
        else:
            for chunk in votes.chunks(size):
                of_chunk(votes.upsampled(size, chunk), chunk)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [(g * grad).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *([None] * 6), *scaled


class _SumOfChunks(torch.autograd.Function):
    """Add up a function's results over the chunks; they are computed a second time in backward."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, function: RowFunction, ratios: tuple[int, ...], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(target, *tensors)
        ctx.function, ctx.ratios = function, ratios
        votes, size = _gathered(ratios, tensors), _size(target)
        return sum(
            (function(votes.upsampled(size, c), target[c[0], slice(*c[1:])]) for c in votes.chunks(size)),
            start=torch.zeros((), dtype=torch.float32, device=target.device),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        target, *tensors = ctx.saved_tensors
        votes = _gathered(ctx.ratios, tensors)

        def of_chunk(rows: Tensor, chunk: Chunk) -> Tensor:
            rows.requires_grad_()
            with torch.enable_grad():
                part = ctx.function(rows, target[chunk[0], slice(*chunk[1:])])
            return torch.autograd.grad(part, rows, grad)[0]

        gradients = votes.gradients(_size(target), of_chunk)
        return *([None] * 3), *(g.to(x.dtype) for g, x in zip(gradients, tensors, strict=True))


def _gathered(ratios: tuple[int, ...], tensors: Sequence[Tensor]) -> Votes:
    """Put together the votes whose `tensors` these are."""
    n = len(ratios)
    return Votes(tuple(tensors[:n]), tuple(tensors[n : 2 * n]), tuple(tensors[2 * n :]), ratios)


def _size(target: Tensor) -> tuple[int, int]:
    return target.shape[-2], target.shape[-1]
