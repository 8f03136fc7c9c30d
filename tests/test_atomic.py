import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from early_fusion_seg.errors import UserError
from early_fusion_seg.io.atomic import AtomicCheckpointIO, replace_file


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    replace_file(path, lambda part: part.write_text("first", encoding="utf-8") and None)

    def interrupted(part: Path) -> None:
        part.write_text("sec", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, interrupted)
    assert path.read_text(encoding="utf-8") == "first"


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        part.write_text("sec", encoding="utf-8")
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011  # the test's own error
        replace_file(tmp_path / "a.png", fail)
    assert list(tmp_path.iterdir()) == []


def test_any_name_that_the_file_system_takes_is_written(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".png", "\u5199" * 83 + ".png", "x" * 255, "x." + "y" * 253):
        replace_file(tmp_path / name, lambda part: part.write_text("whole", encoding="utf-8"))
        assert (tmp_path / name).read_text(encoding="utf-8") == "whole"
    with pytest.raises(OSError, match="File name too long") as error:
        replace_file(tmp_path / ("x" * 256), lambda part: part.write_text("whole", encoding="utf-8"))
    assert error.value.filename == str(tmp_path / ("x" * 256))
    assert all(len(path.name) > 80 for path in tmp_path.iterdir())  # no temporary file is left


@pytest.fixture
def _full_disk():
    """Limit the size of files to 100 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("_full_disk")
def test_a_checkpoint_on_a_full_disk_leaves_the_old_one(tmp_path):
    path = tmp_path / "run" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(UserError, match=r"last\.ckpt could not be written \(File too large\); what was saved"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_an_unwritable_folder_is_named_in_the_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run/last\.ckpt could not be written \(Not a directory\)"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "run" / "last.ckpt")


def test_a_checkpoint_is_renamed_only_when_it_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    seen = []
    monkeypatch.setattr("os.fsync", lambda _: seen.append(sorted(p.name for p in tmp_path.iterdir())))
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    assert seen == [[".part-last.ckpt"], ["last.ckpt"]]  # the file is synced before the rename, its folder after it


def test_a_checkpoint_is_complete_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    open_file = os.open

    def as_on_windows(path, *args, **kwargs):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", as_on_windows)
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"step": 1}


def test_an_interrupted_checkpoint_is_an_interruption(tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # torch's writer raises this while it closes the file

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())
