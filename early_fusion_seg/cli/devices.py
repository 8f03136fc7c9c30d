"""Trainer settings for runs with several processes (DDP)."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from early_fusion_seg.errors import UserError


def distributed_settings(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the strategy and the batch norms of several processes.

    Args:
        trainer: The arguments of Lightning's Trainer.

    Returns:
        `strategy`: DDP with `gradient_as_bucket_view`, and a static graph unless gradients are accumulated (torch fails
        with both); `sync_batchnorm`: on for CUDA devices, as torch has none for the CPU. Empty for one process, and if
        the user chose another strategy.

    Raises:
        UserError: The strategy is not supported, or torchrun or srun started another number of processes than devices
            times machines.
    """
    on_cuda = trainer["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if not _is_ddp(trainer["strategy"]):
        return {}
    count, launched = process_count(trainer, on_cuda), launched_count()
    if launched not in (1, count):  # with a count of 1, each process would train alone and write the same files
        raise UserError(
            f"{launched} processes were started, but --trainer.devices {trainer['devices']} and --trainer.num_nodes "
            f"{trainer['num_nodes']} make {count}; set devices to the number of processes on each machine"
        )
    if count == 1:
        return {}
    accumulates = trainer["accumulate_grad_batches"] > 1
    strategy = DDPStrategy(gradient_as_bucket_view=True, static_graph=not accumulates)
    return {"strategy": strategy, "sync_batchnorm": trainer["sync_batchnorm"] or on_cuda}


def _is_ddp(strategy: str | Mapping[str, Any]) -> bool:
    """Return whether a strategy, by name or class path, is the one for which `distributed_settings` has settings."""
    name = strategy if isinstance(strategy, str) else str(strategy["class_path"]).rpartition(".")[2]
    if name in ("auto", "ddp"):
        return True
    if not name.lower().startswith(("ddp", "single")):
        raise UserError(
            f"--trainer.strategy {name} is not supported: checkpoints and scores are tested with ddp only; the frozen "
            "encoder needs little memory, so that ddp is enough"
        )
    if name != "single_device":
        rank_zero_warn(f"--trainer.strategy {name} is not tested; use ddp if something is wrong")
    return False


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
        local = len(devices)
    elif devices in ("auto", "-1", -1):
        local = torch.cuda.device_count() if on_cuda else 1
    else:
        local = int(devices)
    return local * int(trainer["num_nodes"])


def is_first_process() -> bool:
    """Return whether this process writes the files of the run. It is known before the processes are connected."""
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0)))  # without a launcher, RANK is not set
    return node == 0 and getattr(rank_zero_only, "rank", 0) == 0


def launched_count() -> int:
    """Return the number of processes that torchrun or srun started on all machines; 1 without them."""
    name = "WORLD_SIZE" if TorchElasticEnvironment.detect() else "SLURM_STEP_NUM_TASKS"
    return int(os.environ.get(name, 1))
