"""StepLoss: the loss of an optimizer step over all its batches, on all processes and over accumulation."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from early_fusion_seg.distributed import all_gather_object, all_reduce_sum
from early_fusion_seg.errors import UserError

PROVISIONAL_NORMALIZER = 2**16
"""Divisor of the loss of a batch until the total weight of the step is known; any constant of similar size works."""


class StepLoss:
    """The loss of an optimizer step over all its batches: those of all processes, and accumulated ones.

    It is sum(w_i * L_i) / sum(w_i), where L_i is the mean loss of batch i over its labeled pixels and w_i their weight.
    For cross-entropy this equals the loss of one batch with all images. The denominator is not known before the last
    backward. So backward is called on w_i * L_i / PROVISIONAL_NORMALIZER, and `finish` rescales the gradients before
    the optimizer step.

    Args:
        batches: Number of batches over which the trainer averages gradients: processes times accumulated batches. With
            one, losses and gradients are left unchanged. It may change between two steps.
    """

    def __init__(self, batches: int = 1) -> None:
        self.batches = batches
        self.parts: list[tuple[Tensor, Tensor, list[str]]] = []  # (loss * weight, weight, keys) of each batch

    def add(self, loss: Tensor, weight: Tensor, keys: list[str]) -> Tensor:
        """Add a batch and return the value to call backward on.

        Args:
            loss: Mean loss of the batch, a scalar.
            weight: Weight of its labeled pixels, a scalar.
            keys: Names of its images, for the error message.
        """
        self.parts.append((loss.detach() * weight, weight, keys))
        return loss * weight / PROVISIONAL_NORMALIZER if self.batches > 1 else loss

    def finish(self, parameters: Iterable[nn.Parameter], step: int) -> Tensor:
        """Rescale the gradients and return the loss of the step, equal on all processes.

        Args:
            parameters: Parameters whose gradients the trainer has averaged.
            step: Optimizer steps done so far, for the error message.

        Raises:
            UserError: The loss is not finite; the message names the images.
        """
        parts, self.parts = self.parts, []
        sums = all_reduce_sum(torch.stack([torch.stack([value, weight]) for value, weight, _ in parts]).sum(0))
        total, weight = sums.unbind()
        if not torch.isfinite(total):
            affected = [key for value, _, keys in parts if not torch.isfinite(value) for key in keys]
            names = [key for part in all_gather_object(affected) for key in part]
            raise UserError(
                f"the loss is {total.item()} at step {step}, on the images {', '.join(names)}; it must be finite: "
                "lower lr, or check these images and masks"
            )
        labeled = weight.clamp(min=torch.finfo(weight.dtype).tiny)  # without labeled pixels, all gradients are 0
        if self.batches > 1:
            factor = PROVISIONAL_NORMALIZER * self.batches / labeled
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(torch.where(weight > 0, factor, 0.0))
        return total / labeled
