"""Checkpoints that an interruption cannot spoil: written beside the old file and put in its place, often enough."""

import errno
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from early_fusion_seg.distributed import all_reduce_sum
from early_fusion_seg.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint to a temporary file in its own folder, then rename: the file is the old one or the new one.

    Lightning's goes through the system's temporary folder, which may lie on another, smaller disk. Give it to a
    Trainer as `plugins=[AtomicCheckpointIO()]`; the command line does.

    Raises:
        UserError: It cannot be written; the message says why, and the file that was there before is untouched.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file, and see that it is on the disk before it takes its name."""
        path = Path(path)
        part = path.with_name(f".part-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter where a write falls short
            _remove(part)
            cause = error if isinstance(error, OSError) else error.__context__  # where torch's writer fell short
            reason = cause.strerror if isinstance(cause, OSError) else None
            raise UserError(
                f"the checkpoint {path} could not be written ({reason or error}); what was saved before is intact. "
                "Free space or mend the rights, then go on with --ckpt_path"
            ) from error


class LastCheckpoint(Checkpoint):
    """Keep `last.ckpt`, from which training goes on as if never interrupted.

    It is written at the end of each epoch, every few steps within it, before each validation, and where the process
    ends because it was told to (SIGTERM). Not between the accumulated batches of a step, whose gradients would be lost,
    and not before the validation that ends a run: Lightning takes what was saved there for a run that is over.

    A process that was told to end does so as soon as nothing is lost: after the batch that completes a step, or within
    a validation, which whoever goes on starts anew. Several processes end after the same batch, as soon as one of them
    was told to, and finish a validation first, of which they may have unequal shares. Lightning's own handler may end
    within a step, and talks to the other processes wherever each of them is at that moment, which may leave them
    waiting for ever (Lightning-AI/pytorch-lightning#20806), so another takes its place while training.

    Args:
        folder: Where to write.
        every_n_steps: Optimizer steps between two files of one epoch.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 200) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps is {every_n_steps}; expected 1 or more")
        self.filename = "last"
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.resumable = False  # here, between two batches
        self.step = 0  # at the start of the batch
        self.saved = 0  # optimizer steps in the file
        self.stop_requested = False  # to end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on only take note of SIGTERM; Lightning restores the handler in the end."""
        self.stop_requested = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """In a batch, nothing can be saved."""
        self.resumable = False
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if it is time."""
        batches = 1 + (trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx)
        validates = trainer.should_stop or batches % (trainer.val_check_batch or math.inf) == 0
        self.resumable = trainer.global_step > self.step and not validates and not trainer.is_last_batch
        if self.resumable and trainer.global_step - self.saved >= self.every_n_steps:
            self._save(trainer)
        if self.resumable:
            self._stop_if_requested(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, with the validation still to be done."""
        self.resumable = False
        within_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        over = trainer.should_stop or trainer.global_step == trainer.max_steps
        if not within_fit or over or trainer.global_step == self.step:
            return
        progress = cast(Any, trainer.fit_loop.epoch_loop.val_loop.batch_progress.total)
        done = progress.processed
        progress.ready = progress.started = done + 1  # Lightning skips a validation that it does not find begun
        self._save(trainer)
        progress.ready = progress.started = done

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """End a validation within `fit` if told to; see `on_validation_start` for what is in the file."""
        if self.stop_requested and trainer.world_size == 1 and self.saved == trainer.global_step:
            raise SIGTERMException

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and end here if told to, unless this is the end anyway."""
        self.resumable = False
        self._save(trainer)
        if trainer.global_step < trainer.estimated_stepping_batches:
            self._stop_if_requested(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where the process was told to end."""
        if isinstance(exception, SIGTERMException) and self.resumable:
            self._save(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from there."""
        self.saved = state_dict["saved"]

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer steps in the file."""
        return {"saved": self.saved}

    def _on_sigterm(self, *_: Any) -> None:
        self.stop_requested = True

    def _stop_if_requested(self, trainer: Trainer) -> None:
        """Raise SIGTERMException, on all processes if one was told to end."""
        told = torch.tensor(self.stop_requested).int()
        if trainer.world_size > 1:
            told = all_reduce_sum(told.to(trainer.strategy.root_device))
        if told > 0:
            raise SIGTERMException

    def _save(self, trainer: Trainer) -> None:
        if cast(Any, trainer).fast_dev_run:
            return
        self.saved = trainer.global_step
        trainer.save_checkpoint(self.path)


def _sync_folder(folder: Path) -> None:
    """See that the new name is on the disk, where folders can be synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def _remove(part: Path) -> None:
    """Remove what was written of a file, if there is any."""
    try:
        part.unlink(missing_ok=True)
    except OSError:  # the folder itself cannot be written
        return
