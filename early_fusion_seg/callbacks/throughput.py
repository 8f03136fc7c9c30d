"""Throughput: log images per second, time spent waiting for data, and GPU memory."""

import math
import time
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Log throughput every `log_every_n_steps` optimizer steps, measured over the steps since the last log.

    - `train/images_per_second`: images per second of all processes together, without the time of validations.
    - `train/data_wait`: fraction (0..1) of the time between the end of a step and the start of the next: waiting for
      the loader, copying to the device, and Lightning's own work. A GPU may still be computing during this time.
    - `train/gpu_memory_gib`: peak memory of tensors on the first process's GPU since the start, in GiB; CUDA only.

    The device is not synchronized: over many steps the times are right without it. Lightning's ThroughputMonitor
    synchronizes at each step and does not measure waiting.

    Args:
        each_epoch: Log at least once per epoch: lower the trainer's `log_every_n_steps` if an epoch has fewer steps.
    """

    def __init__(self, each_epoch: bool = False) -> None:
        self.each_epoch = each_epoch
        self._ended: float | None = None  # time at the end of the last step or at the start of the epoch
        self._started = 0.0
        self._logged_step = 0
        self._reset()

    def _reset(self) -> None:
        self._waited = self._worked = 0.0
        self._images = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the measurements of an earlier training."""
        engine = cast(Any, trainer)  # its type does not declare log_every_n_steps
        if self.each_epoch and math.isfinite(trainer.num_training_batches):
            steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            engine.log_every_n_steps = max(1, min(engine.log_every_n_steps, steps))
        self._logged_step = trainer.global_step
        self._reset()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure the wait for the first batch, which includes the start of the workers."""
        self._ended = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the time until the next step."""
        self._ended = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the time since the last step to the waiting time."""
        self._started = time.perf_counter()
        if self._ended is not None:
            self._waited += self._started - self._ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the time of the step, and log if it is due."""
        self._ended = time.perf_counter()
        self._worked += self._ended - self._started
        self._images += len(batch["image"])
        step, every = trainer.global_step, cast(Any, trainer).log_every_n_steps  # not declared by the Trainer
        if every and step % every == 0 and step != self._logged_step:  # not while gradients accumulate
            self._logged_step = step
            pl_module.log_dict(self._values(trainer, pl_module.device))
            self._reset()

    def _values(self, trainer: Trainer, device: torch.device) -> dict[str, float]:
        seconds = self._waited + self._worked
        values = {
            "train/images_per_second": self._images * trainer.world_size / seconds,
            "train/data_wait": self._waited / seconds,
        }
        if device.type == "cuda":
            values["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return values
