"""Time and memory of the steps that a trainer takes."""

import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class TimedBatch(NamedTuple):
    """One batch of training or validation.

    Attributes:
        step: Optimizer steps, or batches of the validation, done before it.
        images: Images in it.
        waited: Seconds from the end of the batch before until it was on the device.
        seconds: Seconds from the end of the batch before to its own end.
    """

    step: int
    images: int
    waited: float
    seconds: float


class StepTimer(Callback):
    """Take the time of each batch; on a GPU all that was asked of it is done when the clock is read."""

    def __init__(self) -> None:
        self.timed: list[TimedBatch] = []
        self._step = 0
        self._ended = self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._ended = clock(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the time at which the batch is there."""
        self._step, self._started = trainer.global_step, clock(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        """Take the time at which the step is done."""
        self._end(pl_module, batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._ended = clock(pl_module.device)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        """Take the time at which the batch is there."""
        self._step, self._started = batch_idx, clock(pl_module.device)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Take the time at which the batch is scored."""
        self._end(pl_module, batch)

    def _end(self, module: LightningModule, batch: Mapping[str, Any]) -> None:
        now = clock(module.device)
        waited, seconds = self._started - self._ended, now - self._ended
        self.timed.append(TimedBatch(self._step, len(batch["image"]), waited, seconds))
        self._ended = now


def clock(device: torch.device) -> float:
    """Return the seconds on a clock, once the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use: on a GPU since the last call, else by this process since its start.

    On Windows, where Python cannot tell the latter, 0.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if sys.platform == "win32":
        return 0
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
