"""LastCheckpoint: save `last.ckpt` every few steps and on SIGTERM or Ctrl-C, so that training can resume from it."""

import math
import os
import signal
import stat
import threading
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from early_fusion_seg.distributed import all_reduce_sum
from early_fusion_seg.errors import UserError

STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, `kill` and SLURM, a closed terminal
    if hasattr(signal, name)  # Windows has no SIGHUP
]


class LastCheckpoint(Checkpoint):
    """Write `last.ckpt`, from which training resumes as if it had not been interrupted.

    The file is written at the end of each epoch, every `every_n_steps` steps within an epoch, before each validation,
    and when the process is asked to stop: by SIGTERM, by Ctrl-C (SIGINT), or by a terminal that is closed (SIGHUP). A
    second Ctrl-C raises KeyboardInterrupt at once. `last.ckpt` is not written in two cases:

    - Between the accumulated batches of a step: their gradients would be lost.
    - Before the final validation: Lightning treats a checkpoint from that moment as a finished run.

    After such a signal, a process stops where no work is lost: after the batch that completes a step, or during a
    validation, which the resumed run repeats. Then `trainer.fit` raises SIGTERMException. If there are several
    processes and one of them gets a signal, all stop after the same batch. They finish a running validation first,
    because they may have different numbers of validation batches.

    This callback replaces Lightning's signal handlers during training. Lightning's SIGTERM handler may stop within a
    step. It also communicates with the other processes at an arbitrary moment, which can block them forever
    (Lightning-AI/pytorch-lightning#20806). A signal that the process ignores, as under nohup, stays ignored.

    Args:
        folder: Folder of `last.ckpt`.
        every_n_steps: Optimizer steps between two checkpoints within an epoch, at least 1.

    Attributes:
        received: The signal that asked this process, or another one of the run, to stop; None if none did.

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
        self.received: signal.Signals | None = None
        self.prints = True  # whether this process answers a Ctrl-C

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the signal handlers; Lightning restores the original ones at the end of training."""
        self.received = None
        self.prints = trainer.is_global_zero
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

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
        if not self.resumable:
            return
        stop = self._stop_requested(trainer)
        if stop or trainer.global_step - self.saved >= self.every_n_steps:
            self._save(trainer)
        if stop:
            raise SIGTERMException

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
        if self.received and trainer.world_size == 1 and self.saved == trainer.global_step:
            raise SIGTERMException

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and stop if requested, unless training ends here."""
        self.resumable = False
        self._save(trainer)
        if trainer.global_step < trainer.estimated_stepping_batches and self._stop_requested(trainer):
            raise SIGTERMException

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if the signal ended something else first, such as the workers of another library's loader."""
        if self.received and self.resumable and trainer.world_size == 1 and self.saved < trainer.global_step:
            self._save(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of steps at the last checkpoint."""
        self.saved = state_dict["saved"]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps at the last checkpoint."""
        return {"saved": self.saved}

    def _on_signal(self, number: int, frame: Any) -> None:
        """Note the signal. The handler may run within any call, so it does as little as possible."""
        if number == signal.SIGINT and self.received is not None:
            signal.default_int_handler(number, frame)  # the second Ctrl-C
        if number == signal.SIGINT and self.prints:
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")
        if number not in (signal.SIGINT, signal.SIGTERM):
            _leave_terminal()
        self.received = signal.Signals(number)

    def _stop_requested(self, trainer: Trainer) -> bool:
        """Return whether this process or another one was asked to stop; equal on all processes."""
        if trainer.world_size > 1:
            counts = torch.tensor([int(number == self.received) for number in STOP_SIGNALS])
            counts = all_reduce_sum(counts.to(trainer.strategy.root_device))
            if not counts.any():
                return False  # also if a signal has come in the meantime
            self.received = self.received or STOP_SIGNALS[int(counts.argmax())]
        return self.received is not None

    def _save(self, trainer: Trainer) -> None:
        if cast(Any, trainer).fast_dev_run:
            return
        self.saved = trainer.global_step
        trainer.save_checkpoint(self.path)


def _leave_terminal() -> None:
    """Discard the output to a terminal that is gone, where each write is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            try:
                os.write(descriptor, b"\n")
            except OSError:
                os.dup2(nowhere, descriptor)
    os.close(nowhere)
