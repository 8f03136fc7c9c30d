import resource
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from test_segmenter import SMALL, loader, trainer

from early_fusion_seg.checkpointing import AtomicCheckpointIO, LastCheckpoint
from early_fusion_seg.cli.devices import distributed_settings
from early_fusion_seg.errors import UserError
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
    with pytest.raises(UserError, match=r"last\.ckpt could not be written \(.*; what was saved before is intact"):
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
    """The optimiser steps at which last.ckpt is written."""
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
        (3, {}, [3, 6, 8, 11, 14, 16]),
        (100, {}, [8, 16]),
        (1, {"accumulate_grad_batches": 3}, [1, 2, 3, 4, 5, 6]),  # between steps only
        (1, {"val_check_interval": 0.25}, [1, 3, 5, 7, 8, 9, 11, 13, 15, 16]),  # not before a validation
        (1, {"val_check_interval": 3, "check_val_every_n_epoch": None}, [1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]),
        (2, {"fast_dev_run": 4}, []),
    ],
)
def test_the_last_checkpoint_is_written_every_few_steps_where_a_run_can_go_on(tmp_path, every, options, expected):
    assert saved_steps(tmp_path, every, **options) == expected


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
