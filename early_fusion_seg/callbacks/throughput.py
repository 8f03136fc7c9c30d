"""How fast training goes, and how much of the time it waits for the loader."""

import time
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Log speed, waiting and GPU memory every `log_every_n_steps` steps, over the steps since the last time.

    - `train/images_per_second`: of all processes together, validation left out.
    - `train/data_wait`: the share, 0..1, of the time that passes between the end of a step and the start of the next:
      waiting for the loader, copying to the device, and what Lightning does between. A GPU may still be at work then.
    - `train/gpu_memory_gib`: the most that tensors have taken so far on the first process's GPU; with CUDA only.

    The device is never waited for: over many steps the clock is right without (Lightning's ThroughputMonitor
    synchronizes at each step, and does not know of waiting).
    """

    def __init__(self) -> None:
        self._ended: float | None = None  # when the last step ended, or the epoch began
        self._started = 0.0
        self._logged_step = 0
        self._reset()

    def _reset(self) -> None:
        self._waited = self._worked = 0.0
        self._images = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier training."""
        self._logged_step = trainer.global_step
        self._reset()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock: the loader's workers start now."""
        self._ended = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out what passes until the next step."""
        self._ended = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the time that has passed since the last step."""
        self._started = time.perf_counter()
        if self._ended is not None:
            self._waited += self._started - self._ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the time of the step, and log where it is time to."""
        self._ended = time.perf_counter()
        self._worked += self._ended - self._started
        self._images += len(batch["image"])
        step, every = trainer.global_step, cast(Any, trainer).log_every_n_steps  # the Trainer does not declare it
        if every and step % every == 0 and step != self._logged_step:  # it stays where gradients are accumulated
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
