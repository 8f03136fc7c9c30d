"""Cross-entropy, and sums of other functions, over chunks of rows of upsampled logits.

Forward computes the gradient of cross-entropy together with its value, and backward only scales it: cross-entropy is a
sum of pixel losses. Other functions of rows are computed a second time in backward.

Shapes: n images, K classes, logits (n, K, h, w), target (n, H, W) of train ids; a chunk has R rows, classes last.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from early_fusion_seg.errors import UserError
from early_fusion_seg.logits.lazy_logits import Chunk, LazyLogits, as_lazy_logits

RowFunction = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(
    logits: Tensor | LazyLogits,
    target: Tensor,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = 255,
    kept: Tensor | None = None,
) -> Tensor:
    """Compute the mean cross-entropy, weighted as in `torch.nn.functional.cross_entropy`.

    Args:
        logits: (n, K, h, w), or lazy logits.
        target: (n, H, W) integers.
        class_weights: (K,) factors, or None.
        label_smoothing: 0..1, as in `torch.nn.functional.cross_entropy`.
        ignore_index: Target value of pixels that are left out.
        kept: (n, H, W) bool, pixels to average over; default: all that are not ignored.

    Returns:
        Scalar float32; 0 with a gradient of 0 if no pixel is kept.
    """
    kept = target != ignore_index if kept is None else kept
    lazy = as_lazy_logits(logits)
    # determined here, because requires_grad is not known inside of Function.forward
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in lazy.tensors)
    options = (needs_gradient, target, kept, class_weights, label_smoothing, lazy.ratios)
    total = cast(Tensor, _CrossEntropySum.apply(*options, *lazy.tensors))
    return total / at_least_one(pixel_weight(target, kept, class_weights))


def pixel_weight(target: Tensor, kept: Tensor, class_weights: Tensor | None) -> Tensor:
    """Return the sum of the class weights of the kept pixels, or their number without class weights: float32 scalar."""
    if class_weights is None:
        return kept.sum().float()
    return (class_weights[target.long().where(kept, 0)] * kept).sum()


def at_least_one(x: Tensor) -> Tensor:
    """Replace zeros, the values of empty sums, by ones, so that they can be divisors."""
    return x.where(x > 0, 1)


@torch.no_grad()
def pixel_cross_entropy(logits: Tensor | LazyLogits, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Compute the cross-entropy of each pixel, without a gradient.

    Args:
        logits: (n, K, h, w), or lazy logits.
        target: (n, H, W) integers.
        ignore_index: Target value of pixels that get 0.

    Returns:
        (n, H, W) float32.
    """
    lazy, size = as_lazy_logits(logits), label_size(target)
    pixels = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    for images, start, stop in lazy.chunks(size):
        rows, labels = lazy.upsampled(size, (images, start, stop)), target[images, start:stop]
        valid = labels != ignore_index
        true = rows.gather(-1, labels.long().where(valid, 0)[..., None])[..., 0]
        pixels[images, start:stop] = (rows.logsumexp(-1) - true) * valid
    return pixels


def sum_over_chunks(logits: Tensor | LazyLogits, target: Tensor, function: RowFunction) -> Tensor:
    """Sum a differentiable function of upsampled logits (n, R, W, K) and labels (n, R, W) over all chunks.

    Args:
        logits: (n, K, h, w), or lazy logits.
        target: (n, H, W) integers.
        function: Maps rows of logits and labels to a float32 tensor. It must not keep the logits, which are overwritten
            later, and must not multiply matrices, which autocast would compute in low precision.

    Returns:
        The sum, of the shape that `function` returns.
    """
    lazy = as_lazy_logits(logits)
    return cast(Tensor, _SumOverChunks.apply(target, function, lazy.ratios, *lazy.tensors))


def label_size(target: Tensor) -> tuple[int, int]:
    """Return (H, W) of a target (n, H, W).

    Raises:
        UserError: The target holds fractions or complex numbers, which would be cut to whole numbers.
    """
    if target.is_floating_point() or target.is_complex():
        raise UserError(f"the target holds {target.dtype}; expected integers, the number of the class of each pixel")
    return target.shape[-2], target.shape[-1]


def _chunk_cross_entropy(
    rows: Tensor, labels: Tensor, kept: Tensor, weights: Tensor | None, smoothing: float, needs_gradient: bool
) -> Tensor:
    """Return the sum of the losses; if `needs_gradient`, overwrite `rows` (n, R, W, K) with the gradient."""
    k, true = rows.shape[-1], labels.long().where(kept, 0)[..., None]
    each = rows.new_ones(k) if weights is None else weights.to(rows.dtype)
    factor = kept[..., None].to(rows.dtype)
    sharp = factor * (1 - smoothing)  # (n, R, W, 1), factor of -log p[true]
    sharp = sharp if weights is None else sharp * each[true]
    even = factor * (smoothing / k)  # (n, R, W, 1), factor of each -w[c] log p[c]
    others = (rows * each).sum(-1, keepdim=True) if smoothing else torch.empty(0)
    highest, chosen = rows.amax(-1, keepdim=True), rows.gather(-1, true)
    powers = (rows.sub_(highest) if needs_gradient else rows - highest).exp_()
    sums = powers.sum(-1, keepdim=True)
    log_sums = highest + sums.log()
    value = (sharp * (log_sums - chosen)).sum()
    if smoothing:  # without the condition, huge logits would give 0 * infinity
        value = value + (even * (log_sums * each.sum() - others)).sum()
    if needs_gradient:
        powers.mul_((sharp + even * each.sum()) / sums).scatter_add_(-1, true, -sharp)
        if smoothing:
            powers.sub_(even * each)
    return value


class _CrossEntropySum(torch.autograd.Function):
    """Sum of the weighted cross-entropies of pixels; forward also computes the gradient, and backward scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        needs_gradient: bool,
        target: Tensor,
        kept: Tensor,
        class_weights: Tensor | None,
        smoothing: float,
        ratios: tuple[int, ...],
        *tensors: Tensor,
    ) -> Tensor:
        lazy, size = _from_tensors(ratios, tensors), label_size(target)
        total = torch.zeros((), dtype=torch.float32, device=target.device)

        def add_chunk(rows: Tensor, chunk: Chunk) -> None:
            place = (chunk[0], slice(*chunk[1:]))
            total.add_(_chunk_cross_entropy(rows, target[place], kept[place], class_weights, smoothing, needs_gradient))

        if needs_gradient:
            ctx.save_for_backward(*lazy.gradients(size, add_chunk))
        else:
            for chunk in lazy.chunks(size):
                add_chunk(lazy.upsampled(size, chunk), chunk)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *([None] * 6), *(g * grad for g in ctx.saved_tensors)


class _SumOverChunks(torch.autograd.Function):
    """Sum of a function over chunks; backward computes the function again, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, function: RowFunction, ratios: tuple[int, ...], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(target, *tensors)
        ctx.function, ctx.ratios = function, ratios
        lazy, size = _from_tensors(ratios, tensors), label_size(target)
        return sum(
            (function(lazy.upsampled(size, c), target[c[0], slice(*c[1:])]) for c in lazy.chunks(size)),
            start=torch.zeros((), dtype=torch.float32, device=target.device),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        target, *tensors = ctx.saved_tensors
        lazy = _from_tensors(ctx.ratios, tensors)

        def write_gradient(rows: Tensor, chunk: Chunk) -> None:
            leaf = rows.detach().requires_grad_()
            with torch.enable_grad():
                value = ctx.function(leaf, target[chunk[0], slice(*chunk[1:])])
            rows.copy_(torch.autograd.grad(value, leaf, grad)[0])

        return *([None] * 3), *lazy.gradients(label_size(target), write_gradient)


def _from_tensors(ratios: tuple[int, ...], tensors: Sequence[Tensor]) -> LazyLogits:
    """Rebuild lazy logits from `LazyLogits.tensors`."""
    n = len(ratios)
    return LazyLogits(tuple(tensors[:n]), tuple(tensors[n : 2 * n]), tuple(tensors[2 * n :]), ratios)
