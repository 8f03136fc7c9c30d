"""The pixels of each class in each image of a split: counted once, then read from a cache while nothing changes.

The cache is `early_fusion_seg/` in XDG_CACHE_HOME or ~/.cache, so that `doctor` and all runs share it; nothing is
written to the data. A file of it is named by a hash of the label map and of each mask's size and time of change. What
is damaged or belongs to other masks is counted anew, and where no cache can be written, each process counts.

Shapes: N images, K classes.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import track

from early_fusion_seg.data.dataset import FileSource, Source
from early_fusion_seg.data.frequencies import Counts
from early_fusion_seg.data.listing import File, ZipMember

try:
    import fcntl
except ImportError:  # Windows: there, processes that start at the same time all count
    fcntl = None  # type: ignore[assignment]  # a module otherwise


def class_pixel_counts(source: Source, num_classes: int, beside: Path | None = None) -> Counts:
    """Return the pixels of each class in each image, at the size of the files.

    Of processes that ask at the same time, on one machine, one counts and the others wait for it. Images that are not
    files are counted each time.

    Args:
        source: N labeled images.
        num_classes: K.
        beside: A file to keep them in too, such as one in the folder of a run.

    Returns:
        (N, K).

    Raises:
        UserError: A mask is missing, broken or holds unknown labels.
    """
    if not isinstance(source, FileSource):
        return count(source, num_classes)
    key, shape = fingerprint(source), (len(source), num_classes)
    kept = None if beside is None else _read(beside, key, shape)
    if kept is not None:
        return kept
    with contextlib.suppress(RuntimeError):  # there is no home
        kept = _cached(cache_folder() / f"class_pixel_counts_{key[:32]}.npz", source, key, shape)
    if kept is None:
        kept = count(source, num_classes)
    if beside is not None:
        with contextlib.suppress(OSError):  # it can be counted again
            beside.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(_packed(key, kept))
    return kept


def count(source: Source, num_classes: int) -> Counts:
    """Count the pixels of each class in each image, with a bar and all cores.

    Args:
        source: N labeled images.
        num_classes: K.

    Returns:
        (N, K).
    """

    def row(index: int) -> Counts:
        labels = source.read_labels(index) if isinstance(source, FileSource) else source.read(index)[1]
        return np.bincount(np.ravel(labels), minlength=num_classes)[:num_classes]  # type: ignore[arg-type]  # labeled

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding runs outside of Python's lock
        rows = pool.map(row, range(len(source)))
        console = Console(stderr=True)
        quiet = not console.is_interactive  # where a bar would leave an empty line
        bar = track(rows, "counting classes", len(source), console=console, transient=True, disable=quiet)
        return np.stack([*bar]).astype(np.int64)


def fingerprint(source: FileSource) -> str:
    """Return a hash of what the counts depend on: the label map, and each mask's key, size and time of last change."""
    labels = None if source.label_set is None else source.label_set.raw_to_train
    digest = hashlib.sha256(repr(labels).encode())
    for item in source.items:
        digest.update(repr((item.key, _state(item.mask))).encode())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return where what can be computed again is kept.

    Raises:
        RuntimeError: The user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "early_fusion_seg"


def _cached(path: Path, source: Source, key: str, shape: tuple[int, int]) -> Counts | None:
    """Read a file of the cache, or count and write it, or give None where that is not possible."""
    if (kept := _read(path, key, shape)) is not None:
        return kept
    with _locked(path) as file:
        if file is None:
            return None
        if (kept := _read(path, key, shape)) is None:  # nobody else has counted in the meantime
            kept = count(source, shape[1])
            with contextlib.suppress(OSError):  # such as a full disk; what is damaged is not read
                file.truncate(0)
                file.write(_packed(key, kept))
                file.flush()
        return kept


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO | None]:
    """Open a file to be written, one process at a time; give None where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        file = path.open("r+b")
    except OSError:
        yield None
        return
    with file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed, also by the end of a process that is killed
        yield file


def _read(path: Path, key: str, shape: tuple[int, int]) -> Counts | None:
    """Read counts, or give None where they are not there, damaged, or of other masks."""
    try:
        with path.open("rb") as file, np.load(file) as stored:  # numpy itself leaves damaged ones open
            counts: Counts = stored["counts"]
            fits = str(stored["key"]) == key and counts.shape == shape and counts.dtype == np.int64
    except Exception:  # whatever numpy and zipfile raise for a damaged file
        return None
    return counts if fits else None


def _packed(key: str, counts: Counts) -> bytes:
    packed = io.BytesIO()
    np.savez_compressed(packed, counts=counts, key=np.array(key))
    return packed.getvalue()


def _state(file: File | None) -> tuple[int, int] | None:
    """Return size and time of last change of a file or of its zip file, or None where there is none to be read."""
    if file is None:
        return None
    try:
        state = Path(file.archive if isinstance(file, ZipMember) else file).stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns
