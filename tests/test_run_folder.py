import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from early_fusion_seg.errors import UserError
from early_fusion_seg.io.run_folder import RunFolder, next_run_folder


def test_runs_that_start_together_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: next_run_folder(tmp_path / "runs" / "fit"), range(40)))
    assert sorted(folder.name for folder in folders) == sorted(f"version_{i}" for i in range(40))
    assert all(folder.is_dir() for folder in folders)


def test_the_number_follows_the_highest_one(tmp_path: Path) -> None:
    (tmp_path / "version_4").touch()
    (tmp_path / "version_x").mkdir()
    (tmp_path / "version_5").symlink_to(tmp_path / "gone")
    assert next_run_folder(tmp_path) == tmp_path / "version_6"


def test_two_commands_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path, tmp_path), pytest.raises(UserError, match=r"another command is writing to .*--output"):
        RunFolder(tmp_path, tmp_path).__enter__()
    with RunFolder(tmp_path, tmp_path):
        pass


def test_the_lock_of_a_killed_command_is_free(tmp_path: Path) -> None:
    lines = "import os, pathlib\nfrom early_fusion_seg.io.run_folder import RunFolder"
    code = f"{lines}\nRunFolder(pathlib.Path({str(tmp_path)!r}), None).__enter__()\nos._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with RunFolder(tmp_path, tmp_path):
        pass


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        ([], False),
        (["config.yaml"], False),
        (["predict_config.yaml", "hparams.yaml", "class_pixel_counts.npz", "events.out.tfevents.1"], False),
        (["config.yaml", "metrics.csv"], True),
        (["checkpoints"], True),
        (["masks"], True),
    ],
)
def test_a_run_that_fails_before_it_has_results_leaves_no_folder(tmp_path: Path, files: list[str], kept: bool) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(None, tmp_path) as run:  # noqa: PT012  # the error is within the run
        for name in files:
            (run.path / name).touch()
        raise ZeroDivisionError
    assert run.path.exists() == kept


def test_a_folder_that_was_there_before_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path, tmp_path):
        raise ZeroDivisionError
    assert tmp_path.exists()


def test_a_run_without_an_error_keeps_its_configuration(tmp_path: Path) -> None:
    with RunFolder(None, tmp_path) as run:
        (run.path / "config.yaml").touch()
    assert run.path.exists()
    with RunFolder(None, tmp_path) as empty:
        pass
    assert not empty.path.exists()


def test_the_other_processes_of_a_run_make_no_folder(tmp_path: Path) -> None:
    before = os.listdir(tmp_path)  # noqa: PTH208  # names
    for folder in (None, tmp_path / "run"):
        with RunFolder(folder, tmp_path, writes=False):
            pass
    assert os.listdir(tmp_path) == before  # noqa: PTH208
