"""Run folders: each run has a folder of its own, also if several runs start together."""

import os
import shutil
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from early_fusion_seg.errors import UserError

if os.name == "posix":
    import fcntl

BEFORE_WORK = (  # not results
    *("*config.yaml", "hparams.yaml", "class_pixel_counts.npz", "events.out.tfevents.*"),
    *("labels.csv", "legend.png"),
)


class RunFolder:
    """The folder of a run. As a context manager around the run, it is locked, so that no other command writes to it.

    If the run ends with an error and has no results yet, a folder that was made for it is removed.

    Args:
        folder: The folder; default: the next free `version_N` in `parent`, made at once.
        parent: Where the numbered folders are.
        writes: Whether this process writes the files of the run. The other processes of a run make no folder and take
            no lock.

    Attributes:
        path: The folder.
    """

    def __init__(self, folder: Path | None, parent: Path, writes: bool = True) -> None:
        self.writes = writes
        self._lock: int | None = None
        self._made = writes and (folder is None or not folder.exists())
        if folder is not None and writes:
            folder.mkdir(parents=True, exist_ok=True)
        self.path = folder or (next_run_folder(parent) if writes else parent)

    def __enter__(self) -> Self:
        """Lock the folder.

        Raises:
            UserError: Another command is writing to it.
        """
        if self.writes:
            self._lock = _lock(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the lock, and remove a folder without results."""
        self.close(failed=error is not None)

    def close(self, failed: bool) -> None:
        """Do the same without a `with` block.

        Args:
            failed: Whether the run ended with an error.
        """
        if self._made and not _has_results(self.path, failed):
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def next_run_folder(parent: Path) -> Path:
    """Make the `version_N` that follows all existing ones in a folder; if another run was faster, the next one."""
    for number in count(last_number(parent, "version_") + 1):
        folder = parent / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError  # count() has no end


def last_number(folder: Path, prefix: str) -> int:
    """Return the highest N of the files and folders named `prefixN` or `prefixN.csv` in a folder, -1 if none exist."""
    names = [path.name.removesuffix(".csv").removeprefix(prefix) for path in folder.glob(f"{prefix}*")]
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def _has_results(folder: Path, failed: bool) -> bool:
    """Return whether a folder is worth keeping: after an error, it has more than what is written at the start."""
    names = list(folder.iterdir()) if folder.is_dir() else []
    return any(not failed or not any(path.match(pattern) for pattern in BEFORE_WORK) for path in names)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends; None where folders cannot be locked."""
    if os.name != "posix":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another command is writing to {folder}; wait until it has ended, or give another --output"
        ) from None
    except OSError:  # some network file systems cannot lock folders
        os.close(descriptor)
        return None
    return descriptor
