"""LastCheckpoint: save `last.ckpt` every few steps and on SIGTERM, so that training can resume from it."""

import math
import signal
import threading
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from early_fusion_seg.distributed import all_reduce_sum
from early_fusion_seg.errors import UserError


class LastCheckpoint(Checkpoint):
    """Write `last.ckpt`, from which training resumes as if it had not been interrupted.

    The file is written at the end of each epoch, every `every_n_steps` steps within an epoch, before each validation,
    and when the process is asked to stop (SIGTERM). It is not written in two cases:

    - Between the accumulated batches of a step: their gradients would be lost.
    - Before the final validation: Lightning treats a checkpoint from that moment as a finished run.

    After SIGTERM, a process stops where no work is lost: after the batch that completes a step, or during a validation,
    which the resumed run repeats. If there are several processes and one of them gets SIGTERM, all stop after the same
    batch. They finish a running validation first, because they may have different numbers of validation batches.

    This callback replaces Lightning's SIGTERM handler during training. Lightning's handler may stop within a step. It
    also communicates with the other processes at an arbitrary moment, which can block them forever
    (Lightning-AI/pytorch-lightning#20806).

    Args:
        folder: Folder of `last.ckpt`.
        every_n_steps: Optimizer steps between two checkpoints within an epoch, at least 1.

    Raises:
        UserError: `every_n_steps` is less than 1.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 200) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps is {every_n_steps}; expected 1 or more")
        self.filename = "last"
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.resumable = False  # whether training could resume from a checkpoint saved now
        self.step = 0  # optimizer steps at the start of the batch
        self.saved = 0  # optimizer steps at the last checkpoint
        self.stop_requested = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the SIGTERM handler; Lightning restores the original one at the end of training."""
        self.stop_requested = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Mark the state as not resumable during the batch."""
        self.resumable = False
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every `every_n_steps` steps, and stop if requested."""
        batches = 1 + (trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx)
        validates = trainer.should_stop or batches % (trainer.val_check_batch or math.inf) == 0
        self.resumable = trainer.global_step > self.step and not validates and not trainer.is_last_batch
        if self.resumable and trainer.global_step - self.saved >= self.every_n_steps:
            self._save(trainer)
        if self.resumable:
            self._stop_if_requested(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a checkpoint from which a resumed run starts with this validation."""
        self.resumable = False
        within_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        final = trainer.should_stop or trainer.global_step == trainer.max_steps
        if not within_fit or final or trainer.global_step == self.step:
            return
        progress = cast(Any, trainer.fit_loop.epoch_loop.val_loop.batch_progress.total)
        done = progress.processed
        progress.ready = progress.started = done + 1  # else the resumed run would skip this validation
        self._save(trainer)
        progress.ready = progress.started = done

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop within a validation of `fit` if requested; `on_validation_start` has saved the checkpoint."""
        if self.stop_requested and trainer.world_size == 1 and self.saved == trainer.global_step:
            raise SIGTERMException

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and stop if requested, unless training ends here."""
        self.resumable = False
        self._save(trainer)
        if trainer.global_step < trainer.estimated_stepping_batches:
            self._stop_if_requested(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save after a requested stop."""
        if isinstance(exception, SIGTERMException) and self.resumable:
            self._save(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of steps at the last checkpoint."""
        self.saved = state_dict["saved"]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps at the last checkpoint."""
        return {"saved": self.saved}

    def _on_sigterm(self, *_: Any) -> None:
        self.stop_requested = True

    def _stop_if_requested(self, trainer: Trainer) -> None:
        """Raise SIGTERMException, on all processes if one of them was asked to stop."""
        requested = torch.tensor(self.stop_requested).int()
        if trainer.world_size > 1:
            requested = all_reduce_sum(requested.to(trainer.strategy.root_device))
        if requested > 0:
            raise SIGTERMException

    def _save(self, trainer: Trainer) -> None:
        if cast(Any, trainer).fast_dev_run:
            return
        self.saved = trainer.global_step
        trainer.save_checkpoint(self.path)
