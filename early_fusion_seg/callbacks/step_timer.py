"""StepTimer: measure the time of each training step and validation batch."""

import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class TimedBatch(NamedTuple):
    """Times of one batch of training or validation.

    Attributes:
        step: Optimizer steps done before it, or validation batches done before it.
        images: Number of its images.
        waited: Seconds from the end of the previous batch until this batch was on the device.
        seconds: Seconds from the end of the previous batch to the end of this one.
    """

    step: int
    images: int
    waited: float
    seconds: float


class StepTimer(Callback):
    """Measure the time of each batch. On a GPU, pending work is finished before each reading of the clock.

    Attributes:
        timed: Times of all batches, in order.
    """

    def __init__(self) -> None:
        self.timed: list[TimedBatch] = []
        self._step = 0
        self._ended = self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure."""
        self._ended = clock(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record when the batch was loaded."""
        self._step, self._started = trainer.global_step, clock(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        """Record the time of the step."""
        self._record(pl_module, batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure."""
        self._ended = clock(pl_module.device)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        """Record when the batch was loaded."""
        self._step, self._started = batch_idx, clock(pl_module.device)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Record the time of the validation batch."""
        self._record(pl_module, batch)

    def _record(self, module: LightningModule, batch: Mapping[str, Any]) -> None:
        now = clock(module.device)
        waited, seconds = self._started - self._ended, now - self._ended
        self.timed.append(TimedBatch(self._step, len(batch["image"]), waited, seconds))
        self._ended = now


def clock(device: torch.device) -> float:
    """Synchronize with the device and return the time in seconds, from an arbitrary start."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU since the last call, or of this process since its start.

    The latter is 0 on Windows, where Python cannot measure it.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if sys.platform == "win32":
        return 0
    import resource  # exists on Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
