import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from ddp_run import Uneven, model
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from test_segmenter import SMALL, loader, trainer

from early_fusion_seg.callbacks.ema import HeadEMA
from early_fusion_seg.callbacks.last_checkpoint import LastCheckpoint
from early_fusion_seg.cli.devices import distributed_settings
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.atomic import AtomicCheckpointIO
from early_fusion_seg.segmenter import ReverseHRNetSeg


@pytest.fixture
def _small_disk():
    """No file can grow beyond 100 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("_small_disk")
def test_a_checkpoint_for_which_there_is_no_room_leaves_the_old_one(tmp_path):
    path = tmp_path / "run" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(UserError, match=r"last\.ckpt could not be written \(File too large\); what was saved"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run/last\.ckpt could not be written \(Not a directory\)"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "run" / "last.ckpt")


def test_the_file_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    seen = []
    monkeypatch.setattr("os.fsync", lambda _: seen.append(sorted(p.name for p in tmp_path.iterdir())))
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    assert seen == [[".part-last.ckpt"], ["last.ckpt"]]  # the file is synced before it is renamed, its folder after


def saved_steps(folder: Path, every: int, **options: object) -> list[int]:
    """The optimizer steps at which last.ckpt is written."""
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
        (9, {"accumulate_grad_batches": 3, "val_check_interval": 4}, [3, 3, 6, 6]),  # also where it validates
        (1, {"val_check_interval": 0.25}, [1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13, 14, 15, 16, 16]),
        (3, {"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6, 8, 9, 12, 15, 16]),
        (2, {"fast_dev_run": 4}, []),
    ],
)
def test_the_last_checkpoint_is_written_every_few_steps_where_a_run_can_go_on(tmp_path, every, options, expected):
    assert saved_steps(tmp_path, every, **options) == expected


class Told(Callback):
    """Tells this process to end, and counts the validations that are done."""

    def __init__(self, batch: int = 0, validation: int = 0) -> None:
        self.batch = batch  # the how many-th one of the run, in which the signal comes
        self.validation = validation
        self.done: list[int] = []  # steps before each validation

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.tell(trainer.fit_loop.total_batch_idx + 1 == self.batch)

    def on_validation_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.tell(not trainer.sanity_checking and len(self.done) + 1 == self.validation)

    def on_validation_end(self, trainer: Trainer, module: object) -> None:
        if not trainer.sanity_checking:
            self.done.append(trainer.global_step)

    def tell(self, now: bool) -> None:
        if now:
            os.kill(os.getpid(), signal.SIGTERM)


def run(folder: Path, callback: Told, checkpoint: Path | None = None, **options: object) -> dict[str, torch.Tensor]:
    data = Uneven("", batch_size=2, num_workers=0, crop_size=48)
    data.sizes = data.sizes | {"train": 16}  # 8 batches an epoch
    last = LastCheckpoint(folder)
    engine = trainer(folder, callbacks=[HeadEMA(0.9), callback, last], max_epochs=2, **options)
    made = model(still=False)
    engine.fit(made, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return made.state_dict()


@pytest.mark.parametrize(
    ("told", "options", "step"),
    [
        (Told(batch=3), {}, 3),
        (Told(batch=8), {}, 8),  # a validation comes next
        (Told(validation=1), {}, 8),
        (Told(batch=4), {"accumulate_grad_batches": 3}, 2),  # the step takes two batches more
        (Told(batch=3), {"accumulate_grad_batches": 80}, 1),  # the epoch ends before the step is full
        (Told(validation=2), {"accumulate_grad_batches": 3, "val_check_interval": 2}, 2),  # within a step
        (Told(validation=3), {"val_check_interval": 0.25}, 6),
        (Told(validation=1), {"val_check_interval": 3, "check_val_every_n_epoch": None}, 3),
    ],
)
def test_told_to_end_it_saves_where_nothing_is_lost_and_goes_on_as_if_it_had_not_been(tmp_path, told, options, step):
    options = options | {"enable_checkpointing": True, "num_sanity_val_steps": 1}
    whole, again = Told(), Told()
    expected = run(tmp_path / "whole", whole, **options)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        run(tmp_path, told, **options)
    assert signal.getsignal(signal.SIGTERM) == handler
    last = tmp_path / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step
    found = run(tmp_path, again, last, **options)
    assert told.done + again.done == whole.done
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_checkpoint_every_zero_steps_is_refused(tmp_path):
    with pytest.raises(UserError, match="every_n_steps is 0"):
        LastCheckpoint(tmp_path, 0)


SETTINGS = {
    "accelerator": "auto", "strategy": "auto", "devices": "auto", "num_nodes": 1, "accumulate_grad_batches": 1,
    "sync_batchnorm": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "gpus", "static", "sync"),
    [
        ({}, 4, True, True),
        ({"devices": 2}, 0, True, False),
        ({"devices": "0,1", "accumulate_grad_batches": 2}, 4, False, True),
        ({"devices": [0, 1], "strategy": "ddp"}, 4, True, True),
        ({"devices": 1, "num_nodes": 2, "accelerator": "cpu"}, 4, True, False),
    ],
)
def test_several_processes_get_a_lean_ddp_and_common_norms_on_gpus(monkeypatch, given, gpus, static, sync):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    settings = distributed_settings(SETTINGS | given)
    strategy = settings["strategy"]
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True, "static_graph": static}
    assert settings["sync_batchnorm"] is sync


@pytest.mark.parametrize("given", [{}, {"devices": 1}, {"devices": 2, "strategy": "fsdp"}, {"devices": "-1"}])
def test_one_process_and_other_strategies_are_left_as_they_are(monkeypatch, given):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed_settings(SETTINGS | given) == {}
