"""What processes tell each other: sums, gathered objects, and the loss of a step that all of them take together.

Everything works without `torch.distributed` too, as one process.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from early_fusion_seg.errors import UserError

PROVISIONAL_NORMALIZER = 2**16
"""Weight that a batch's loss is divided by until the weight of the whole step is known: any constant of its order."""


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum over all processes, which all must ask for."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_gather_object(value: Any) -> list[Any]:
    """Return what each process gave, in the order of their ranks; all must ask."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def check_equal_across_ranks(value: str, what: str) -> None:
    """Raise a UserError on all processes where they do not give the same value."""
    values = all_gather_object(value)
    if len(set(values)) > 1:
        raise UserError(f"the processes have different {what}: {[v[:12] for v in values]}; give all the same")


def ddp_ignored_names(module: nn.Module) -> list[str]:
    """Name what does not change in training, and all buffers, which `average_batch_norm_stats` sees to where they change."""
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return frozen + [name for name, _ in module.named_buffers()]


def average_batch_norm_stats(module: nn.Module) -> None:
    """Give the running statistics of batch norms the mean over all processes, so that all evaluate the same network.

    SyncBatchNorm's are the same already and stay.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training and m.running_mean is not None]
    statistics = [s for m in norms for s in (m.running_mean, m.running_var) if s is not None]
    if world_size() == 1 or not statistics:
        return
    mean = all_reduce_sum(torch.cat(statistics)) / world_size()
    for old, new in zip(statistics, torch.split(mean, [len(s) for s in statistics]), strict=True):
        old.copy_(new)


class StepLoss:
    """The loss of an optimizer step over all its batches: those of other processes and accumulated ones.

    A step's loss is sum(w_i * L_i) / sum(w_i), where L_i is the mean loss of batch i over its labeled pixels and w_i
    their weight. For cross-entropy that is the loss of all the batches as one. The weights of the others are known only
    when the step is taken, so a batch contributes w_i * L_i / PROVISIONAL_NORMALIZER and `finish` mends the gradients before the step.

    Args:
        shared: Whether there are other batches; where not, everything is left as it is.
        batches: That the engine averages gradients over: processes times accumulated batches.
    """

    def __init__(self, shared: bool, batches: int) -> None:
        self.shared = shared
        self.batches = batches
        self.parts: list[tuple[Tensor, Tensor, list[str]]] = []

    def add(self, loss: Tensor, weight: Tensor, keys: list[str]) -> Tensor:
        """Return what a batch contributes.

        Args:
            loss: Its mean loss, a scalar.
            weight: Of its labeled pixels, a scalar.
            keys: The names of its images, for the error.
        """
        self.parts.append((loss.detach() * weight, weight, keys))
        return loss * weight / PROVISIONAL_NORMALIZER if self.shared else loss

    def finish(self, parameters: Iterable[nn.Parameter], step: int) -> Tensor:
        """Mend the gradients and return the step's loss, the same on all processes.

        Args:
            parameters: Whose gradients the engine has averaged.
            step: Optimizer steps done so far, for the error.

        Raises:
            UserError: The loss is not finite; the message names the images.
        """
        parts, self.parts = self.parts, []
        sums = all_reduce_sum(torch.stack([torch.stack([value, weight]) for value, weight, _ in parts]).sum(0))
        total, weight = sums.unbind()
        if not torch.isfinite(total):
            guilty = [key for value, _, keys in parts if not torch.isfinite(value) for key in keys]
            names = [key for part in all_gather_object(guilty) for key in part]
            raise UserError(
                f"the loss is {total.item()} at step {step}, on the images {', '.join(names)}; "
                "lower lr, or look at these images and masks"
            )
        labeled = weight.clamp(min=torch.finfo(weight.dtype).tiny)  # without any, all gradients are 0
        if self.shared:
            factor = PROVISIONAL_NORMALIZER * self.batches / labeled
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(torch.where(weight > 0, factor, 0.0))
        return total / labeled
