"""Full disks and folders without write permission: one line that names the file, and no traceback."""

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_runs import QUICK, QUIET, SIZE, command, fit_args

from early_fusion_seg import __main__
from early_fusion_seg.__main__ import main
from early_fusion_seg.data.camvid import fake_camvid_segnet
from early_fusion_seg.errors import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """Make the operating system refuse files above a number of bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_no_space_for_the_configuration(camvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with limit_file_size(100):
        assert main(fit_args(camvid, tmp_path / "run")) == 2
    assert last_line(capsys).endswith(
        "run/config.yaml: File too large; check the path, the permissions and the free space"
    )


def test_no_space_for_a_panel_or_the_results(
    camvid: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["validate", "--config=camvid", f"--data.root={camvid}", f"--ckpt_path={checkpoint}", *QUICK, *QUIET]
    with limit_file_size(8000):
        assert main([*args, f"--output={tmp_path}"]) == 2
    assert "File too large; check the path" in (line := last_line(capsys))
    assert f"error: {tmp_path}/panels/val/" in line
    (tmp_path / "file").touch()
    assert main([*args, f"--output={tmp_path / 'file'}"]) == 2
    assert "/file" in last_line(capsys)


def test_no_space_for_a_checkpoint(camvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with limit_file_size(10_000):
        assert main(fit_args(camvid, tmp_path)) == 2
    assert f"error: the checkpoint {tmp_path}/checkpoints/last.ckpt could not be written (File" in last_line(capsys)


def test_a_configuration_that_cannot_be_replaced(
    camvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").mkdir()
    assert main(fit_args(camvid, tmp_path)) == 2
    assert last_line(capsys).endswith("config.yaml: Is a directory; check the path, the permissions and the free space")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_an_os_error_without_a_file_name(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(__main__, "_dispatch", fail)
    assert main([]) == 2
    assert last_line(capsys).startswith(f"early-fusion-seg: error: an output file: {os.strerror(number)};")


def test_the_first_error_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> int:
        try:
            raise UserError("the checkpoint is too large")
        except UserError:
            raise OSError(errno.ENOSPC, "No space left on device")  # noqa: B904  # like a logger that fails in a handler

    monkeypatch.setattr(__main__, "_dispatch", fail)
    assert main([]) == 2
    assert last_line(capsys) == "early-fusion-seg: error: the checkpoint is too large"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("a bug")])
def test_other_errors_are_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(__main__, "_dispatch", fail)
    with pytest.raises(type(error), match=r"Input/output|a bug"):
        main([])


@pytest.mark.slow
def test_if_one_process_fails_the_other_prints_one_line(tmp_path: Path) -> None:
    camvid = fake_camvid_segnet(tmp_path / "camvid", images=3, size=SIZE)
    for path in (camvid / "train").iterdir():
        path.write_bytes(path.read_bytes()[:-99])
        break
    args = fit_args(camvid, tmp_path / "run", "--trainer.devices=2", "--data.batch_size=1", "--data.crop_size=48")
    done = subprocess.run(command(*args), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert sum("is damaged" in line or "truncated" in line for line in errors) == 1, done.stderr
    assert sum("lost the connection to another process" in line for line in errors) == 1, done.stderr
