"""Communication between processes: sums, collected objects, equality checks, averages of batch norm statistics.

Without `torch.distributed`, all functions behave as with one process.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from early_fusion_seg.errors import UserError


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum over all processes; every process must call it."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_gather_object(value: Any) -> list[Any]:
    """Return the values of all processes in the order of their ranks; every process must call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def check_equal_across_ranks(value: str, what: str) -> None:
    """Check that all processes have the same value.

    Args:
        value: The value of this process.
        what: Plural noun for the message, such as "encoders".

    Raises:
        UserError: The values differ; raised on all processes.
    """
    values = all_gather_object(value)
    if len(set(values)) > 1:
        raise UserError(f"the processes have different {what}: {[v[:12] for v in values]}; give all processes the same")


def ddp_ignored_names(module: nn.Module) -> list[str]:
    """Return the names of the tensors that DistributedDataParallel must not synchronize.

    These are the frozen parameters and all buffers. `average_batch_norm_stats` synchronizes the buffers that change.
    """
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return frozen + [name for name, _ in module.named_buffers()]


def average_batch_norm_stats(module: nn.Module) -> None:
    """Average the running statistics of batch norms over all processes, so that all evaluate the same network.

    SyncBatchNorm is left out: its statistics are already equal.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training and m.running_mean is not None]
    statistics = [s for m in norms for s in (m.running_mean, m.running_var) if s is not None]
    if world_size() == 1 or not statistics:
        return
    mean = all_reduce_sum(torch.cat(statistics)) / world_size()
    for old, new in zip(statistics, torch.split(mean, [len(s) for s in statistics]), strict=True):
        old.copy_(new)
