import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ddp_run import Uneven, model
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from test_segmenter import SMALL, loader, trainer

from early_fusion_seg.callbacks.ema import HeadEMA
from early_fusion_seg.callbacks.last_checkpoint import STOP_SIGNALS, LastCheckpoint
from early_fusion_seg.errors import UserError, is_ctrl_c
from early_fusion_seg.segmenter import ReverseHRNetSeg


def saved_steps(folder: Path, every: int, **options: object) -> list[int]:
    """Return the optimizer steps at which last.ckpt is written."""
    steps = []
    callback = LastCheckpoint(folder, every)
    engine: Trainer = trainer(folder, callbacks=[callback], enable_checkpointing=True, max_epochs=2, **options)
    save = engine.save_checkpoint
    engine.save_checkpoint = lambda *a, **k: steps.append(engine.global_step) or save(*a, **k)
    engine.fit(ReverseHRNetSeg(**SMALL), loader(16, 2), loader(2, 1))  # 8 batches an epoch
    return steps


@pytest.mark.parametrize(
    ("every", "options", "expected"),
    [
        (3, {}, [3, 6, 8, 8, 11, 14, 16, 16]),  # before the validation and at the end of an epoch
        (100, {}, [8, 8, 16, 16]),
        (100, {"max_steps": 16}, [8, 8, 16]),  # not before the validation that ends the run
        (1, {"accumulate_grad_batches": 3}, [1, 2, 3, 3, 4, 5, 6, 6]),  # between steps only
        (
            9,
            {"accumulate_grad_batches": 3, "val_check_interval": 4},
            [3, 3, 6, 6],
        ),  # before validations within an epoch too
        (1, {"val_check_interval": 0.25}, [1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13, 14, 15, 16, 16]),
        (3, {"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6, 8, 9, 12, 15, 16]),
        (2, {"fast_dev_run": 4}, []),
    ],
)
def test_last_ckpt_is_written_where_training_can_resume(tmp_path, every, options, expected):
    assert saved_steps(tmp_path, every, **options) == expected


@pytest.fixture(autouse=True)
def _handled_signals() -> Iterator[None]:
    """Give the signals Python's handlers: a process in the background ignores SIGINT, and one under nohup SIGHUP."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    handlers = {number: signal.signal(number, default) for number, default in defaults.items()}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class SendSignal(Callback):
    """Sends a signal to this process in a batch or a validation, and records finished validations."""

    def __init__(self, batch: int = 0, validation: int = 0, number: signal.Signals = signal.SIGTERM) -> None:
        self.number = number
        self.batch = batch  # number of the training batch, from 1; 0: none
        self.validation = validation  # number of the validation, from 1; 0: none
        self.validated: list[int] = []  # optimizer steps before each finished validation

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.send_if(trainer.fit_loop.total_batch_idx + 1 == self.batch)

    def on_validation_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.send_if(not trainer.sanity_checking and len(self.validated) + 1 == self.validation)

    def on_validation_end(self, trainer: Trainer, module: object) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)

    def send_if(self, now: bool) -> None:
        if now:
            os.kill(os.getpid(), self.number)


def run(
    folder: Path, callback: SendSignal, checkpoint: Path | None = None, **options: object
) -> dict[str, torch.Tensor]:
    data = Uneven("", batch_size=2, num_workers=0, crop_size=48)
    data.sizes = data.sizes | {"train": 16}  # 8 batches an epoch
    last = LastCheckpoint(folder)
    engine = trainer(folder, callbacks=[HeadEMA(0.9), callback, last], max_epochs=2, **options)
    made = model(freeze_norms=False)
    engine.fit(made, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return made.state_dict()


@pytest.mark.parametrize(
    ("sender", "options", "step"),
    [
        (SendSignal(batch=3), {}, 3),
        (SendSignal(batch=8), {}, 8),  # before a validation
        (SendSignal(validation=1), {}, 8),
        (SendSignal(batch=3, number=signal.SIGINT), {}, 3),
        (SendSignal(validation=1, number=signal.SIGINT), {}, 8),
        (SendSignal(batch=3, number=signal.SIGHUP), {}, 3),
        (SendSignal(batch=4), {"accumulate_grad_batches": 3}, 2),  # the step needs two more batches
        (SendSignal(batch=3), {"accumulate_grad_batches": 80}, 1),  # the epoch ends before the step has all batches
        (
            SendSignal(validation=2),
            {"accumulate_grad_batches": 3, "val_check_interval": 2},
            2,
        ),  # between the batches of a step
        (SendSignal(validation=3), {"val_check_interval": 0.25}, 6),
        (SendSignal(validation=1), {"val_check_interval": 3, "check_val_every_n_epoch": None}, 3),
    ],
)
def test_training_stopped_by_a_signal_resumes_exactly(tmp_path, sender, options, step):
    options = options | {"enable_checkpointing": True, "num_sanity_val_steps": 1}
    uninterrupted, resumed = SendSignal(), SendSignal()
    expected = run(tmp_path / "uninterrupted", uninterrupted, **options)
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(SIGTERMException):
        run(tmp_path, sender, **options)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    last = tmp_path / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step
    found = run(tmp_path, resumed, last, **options)
    assert sender.validated + resumed.validated == uninterrupted.validated
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_zero_steps_between_checkpoints_are_refused(tmp_path):
    with pytest.raises(UserError, match="every_n_steps is 0"):
        LastCheckpoint(tmp_path, 0)


class PressTwice(SendSignal):
    """Sends SIGINT twice in one batch."""

    def send_if(self, now: bool) -> None:
        super().send_if(now)
        super().send_if(now)


def test_a_second_ctrl_c_ends_training_at_once(tmp_path):
    with pytest.raises(SystemExit) as caught:  # Lightning's answer to a KeyboardInterrupt
        run(tmp_path, PressTwice(batch=3, number=signal.SIGINT), enable_checkpointing=True)
    assert is_ctrl_c(caught.value)
    assert not (tmp_path / "last.ckpt").exists()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_an_ignored_signal_stays_ignored(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    run(tmp_path, SendSignal(batch=3, number=signal.SIGHUP), enable_checkpointing=True)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 16


class WorkerKilled(SendSignal):
    """Raises, before a batch, what a loader raises if the signal has ended its workers too."""

    def send_if(self, now: bool) -> None:
        super().send_if(now)
        if now:
            raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        pass

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        self.send_if(trainer.global_step + 1 == self.batch)


def test_a_signal_that_ends_the_workers_first_loses_no_step(tmp_path):
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        run(tmp_path, WorkerKilled(batch=3, number=signal.SIGINT), enable_checkpointing=True)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
