"""Sums over all pixels of functions of upsampled logits, a chunk of rows at a time.

Shapes: n images, K classes, logits (n, K, h, w), target (n, H, W) of train ids; a chunk has R rows, with the classes
last.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from early_fusion_seg.votes import Chunk, LazyLogits, as_lazy_logits

RowFunction = Callable[[Tensor, Tensor], Tensor]


def summed_cross_entropy(
    logits: Tensor | LazyLogits,
    target: Tensor,
    kept: Tensor,
    class_weights: Tensor | None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sum the weighted cross-entropy of the pixels where `kept` (n, H, W) says so."""
    votes = as_lazy_logits(logits)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in votes.tensors)  # inside, neither can be told
    options = (learns, target, kept, class_weights, label_smoothing, votes.ratios)
    return cast(Tensor, _CrossEntropy.apply(*options, *votes.tensors))


def sum_of_chunks(logits: Tensor | LazyLogits, target: Tensor, function: RowFunction) -> Tensor:
    """Sum a function of upsampled logits (n, R, W, K) and labels (n, R, W) over all chunks.

    The function must keep no logits, which are written over, and multiply no matrices, which autocast would cast.
    """
    votes = as_lazy_logits(logits)
    return cast(Tensor, _SumOfChunks.apply(target, function, votes.ratios, *votes.tensors))


def _chunk_cross_entropy(
    rows: Tensor, labels: Tensor, kept: Tensor, weights: Tensor | None, smoothing: float, learns: bool
) -> Tensor:
    """Return the sum over the kept pixels; to learn, write its gradient over the logits `rows` (n, R, W, K)."""
    k, true = rows.shape[-1], labels.long().where(kept, 0)[..., None]
    each = rows.new_ones(k) if weights is None else weights.to(rows.dtype)
    factor = kept[..., None].to(rows.dtype)
    sharp = factor * (1 - smoothing)  # (n, R, W, 1), of -log p[true]
    sharp = sharp if weights is None else sharp * each[true]
    even = factor * (smoothing / k)  # (n, R, W, 1), of each -w[c] log p[c]
    others = (rows * each).sum(-1, keepdim=True) if smoothing else torch.empty(0)
    highest, chosen = rows.amax(-1, keepdim=True), rows.gather(-1, true)
    powers = (rows.sub_(highest) if learns else rows - highest).exp_()
    sums = powers.sum(-1, keepdim=True)
    log_sums = highest + sums.log()
    value = (sharp * (log_sums - chosen)).sum()
    if smoothing:  # else huge logits would give 0 * infinity
        value = value + (even * (log_sums * each.sum() - others)).sum()
    if learns:
        powers.mul_((sharp + even * each.sum()) / sums).scatter_add_(-1, true, -sharp)
        if smoothing:
            powers.sub_(even * each)
    return value


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
        votes, size = _gathered(ratios, tensors), size_of(target)
        total = torch.zeros((), dtype=torch.float32, device=target.device)

        def of_chunk(rows: Tensor, chunk: Chunk) -> None:
            place = (chunk[0], slice(*chunk[1:]))
            total.add_(_chunk_cross_entropy(rows, target[place], kept[place], class_weights, smoothing, learns))

        if learns:
            ctx.save_for_backward(*votes.gradients(size, of_chunk))
        else:
            for chunk in votes.chunks(size):
                of_chunk(votes.upsampled(size, chunk), chunk)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *([None] * 6), *(g * grad for g in ctx.saved_tensors)


class _SumOfChunks(torch.autograd.Function):
    """Add up a function's results over the chunks; they are computed a second time in backward."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, function: RowFunction, ratios: tuple[int, ...], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(target, *tensors)
        ctx.function, ctx.ratios = function, ratios
        votes, size = _gathered(ratios, tensors), size_of(target)
        return sum(
            (function(votes.upsampled(size, c), target[c[0], slice(*c[1:])]) for c in votes.chunks(size)),
            start=torch.zeros((), dtype=torch.float32, device=target.device),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        target, *tensors = ctx.saved_tensors
        votes = _gathered(ctx.ratios, tensors)

        def of_chunk(rows: Tensor, chunk: Chunk) -> None:
            leaf = rows.detach().requires_grad_()
            with torch.enable_grad():
                part = ctx.function(leaf, target[chunk[0], slice(*chunk[1:])])
            rows.copy_(torch.autograd.grad(part, leaf, grad)[0])

        return *([None] * 3), *votes.gradients(size_of(target), of_chunk)


def _gathered(ratios: tuple[int, ...], tensors: Sequence[Tensor]) -> LazyLogits:
    """Put together the votes whose `tensors` these are."""
    n = len(ratios)
    return LazyLogits(tuple(tensors[:n]), tuple(tensors[n : 2 * n]), tuple(tensors[2 * n :]), ratios)


def size_of(target: Tensor) -> tuple[int, int]:
    """Return (H, W) of a target (n, H, W)."""
    return target.shape[-2], target.shape[-1]
