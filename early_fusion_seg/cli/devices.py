"""What the trainer is given where it runs in several processes."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy


def distributed_settings(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Choose strategy and batch norms for several processes; nothing for one, or where the user named another strategy.

    Args:
        trainer: The arguments of Lightning's Trainer.

    Returns:
        `strategy`: DDP whose gradients are not copied to be sent, and with a static graph where no gradients are
        accumulated (torch fails with both); `sync_batchnorm`: on for CUDA devices, it has no form for the CPU.
    """
    on_cuda = trainer["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if trainer["strategy"] not in ("auto", "ddp") or process_count(trainer, on_cuda) == 1:
        return {}
    accumulates = trainer["accumulate_grad_batches"] > 1
    strategy = DDPStrategy(gradient_as_bucket_view=True, static_graph=not accumulates)
    return {"strategy": strategy, "sync_batchnorm": trainer["sync_batchnorm"] or on_cuda}


def process_count(trainer: Mapping[str, Any], on_cuda: bool) -> int:
    """Return the number of processes over all machines.

    >>> process_count({"devices": "0,1", "num_nodes": 2}, on_cuda=True)
    4
    >>> process_count({"devices": "auto", "num_nodes": 1}, on_cuda=False)
    1
    """
    devices = trainer["devices"]
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list):
        here = len(devices)
    elif devices in ("auto", "-1", -1):
        here = torch.cuda.device_count() if on_cuda else 1
    else:
        here = int(devices)
    return here * int(trainer["num_nodes"])
