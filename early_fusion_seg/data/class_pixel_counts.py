"""Count the pixels of each class in each image of a split, and cache the counts until a mask changes.

The cache is the folder `early_fusion_seg/` in XDG_CACHE_HOME or ~/.cache. The command `doctor` and all runs share it.
Nothing is written to the folder of the data. The name of a cache file is a hash of the label map and of the size and
modification time of each mask. If the file is damaged or belongs to other masks, the pixels are counted again. If no
cache can be written, each process counts.

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
except ImportError:  # Windows: no file locks, so processes that start at the same time all count
    fcntl = None  # type: ignore[assignment]  # a module otherwise


def class_pixel_counts(source: Source, num_classes: int, run_file: Path | None = None) -> Counts:
    """Return the number of pixels of each class in each image, at the size of the files.

    If several processes on one machine call this at the same time, one counts and the others wait for its result.
    Images that are not files are counted on every call.

    Args:
        source: N labeled images.
        num_classes: K.
        run_file: Second file for the counts, such as a file in the folder of a run; read first, and written.

    Returns:
        (N, K) counts.

    Raises:
        UserError: A mask is missing, damaged or contains unknown labels.
    """
    if not isinstance(source, FileSource):
        return count(source, num_classes)
    key, shape = fingerprint(source), (len(source), num_classes)
    counts = None if run_file is None else _read_counts(run_file, key, shape)
    if counts is not None:
        return counts
    with contextlib.suppress(RuntimeError):  # the user has no home folder
        counts = _read_or_count(_cache_file(key), source, key, shape)
    if counts is None:
        counts = count(source, num_classes)
    if run_file is not None:
        with contextlib.suppress(OSError):  # not fatal: the pixels can be counted again
            run_file.parent.mkdir(parents=True, exist_ok=True)
            run_file.write_bytes(_npz_bytes(key, counts))
    return counts


def cached_counts(source: FileSource, num_classes: int) -> Counts | None:
    """Return the counts of `class_pixel_counts` if they are in the cache."""
    key = fingerprint(source)
    with contextlib.suppress(RuntimeError):  # the user has no home folder
        return _read_counts(_cache_file(key), key, (len(source), num_classes))
    return None


def count(source: Source, num_classes: int) -> Counts:
    """Count the pixels of each class in each image on all CPU cores, with a progress bar.

    Args:
        source: N labeled images.
        num_classes: K.

    Returns:
        (N, K) counts.
    """

    def row(index: int) -> Counts:
        labels = source.read_labels(index) if isinstance(source, FileSource) else source.read(index)[1]
        return np.bincount(np.ravel(labels), minlength=num_classes)[:num_classes]  # type: ignore[arg-type]  # labeled

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the GIL
        rows = pool.map(row, range(len(source)))
        console = Console(stderr=True)
        quiet = not console.is_interactive  # otherwise the bar would leave an empty line in a log file
        bar = track(rows, "counting classes", len(source), console=console, transient=True, disable=quiet)
        return np.stack([*bar]).astype(np.int64)


def fingerprint(source: FileSource) -> str:
    """Return a hash of everything that determines the counts.

    It covers the label map, the colors of masks in colors, and the key, file size and modification time of each mask.
    """
    labels = None if source.label_set is None else (source.label_set.raw_to_train, source.label_set.colors)
    digest = hashlib.sha256(repr(labels).encode())
    for item in source.items:
        digest.update(repr((item.key, _size_and_mtime(item.mask))).encode())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return the cache folder of this package.

    Raises:
        RuntimeError: The user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "early_fusion_seg"


def _cache_file(key: str) -> Path:
    return cache_folder() / f"class_pixel_counts_{key[:32]}.npz"


def _read_or_count(path: Path, source: Source, key: str, shape: tuple[int, int]) -> Counts | None:
    """Read a cache file, or count and write it; return None if the file cannot be opened for writing."""
    if (counts := _read_counts(path, key, shape)) is not None:
        return counts
    with _lock_file(path) as file:
        if file is None:
            return None
        if (counts := _read_counts(path, key, shape)) is None:  # no other process has counted in the meantime
            counts = count(source, shape[1])
            with contextlib.suppress(OSError):  # such as a full disk; a damaged file is ignored on reading
                file.truncate(0)
                file.write(_npz_bytes(key, counts))
                file.flush()
        return counts


@contextlib.contextmanager
def cache_lock(name: str) -> Iterator[None]:
    """Let one process of this machine at a time run a block; if there is no cache folder, they do not wait."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):  # the user has no home folder
            stack.enter_context(_lock_file(cache_folder() / f"{name}.lock"))
        yield


@contextlib.contextmanager
def _lock_file(path: Path) -> Iterator[BinaryIO | None]:
    """Open a file for writing by one process at a time; yield None if it cannot be opened."""
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
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also if the process is killed
        yield file


def _read_counts(path: Path, key: str, shape: tuple[int, int]) -> Counts | None:
    """Read counts; return None if the file is missing, damaged, or belongs to other masks."""
    try:
        with path.open("rb") as file, np.load(file) as stored:  # np.load(path) would leave a damaged file open
            counts: Counts = stored["counts"]
            valid = str(stored["key"]) == key and counts.shape == shape and counts.dtype == np.int64
    except Exception:  # numpy and zipfile raise many types of errors for damaged files
        return None
    return counts if valid else None


def _npz_bytes(key: str, counts: Counts) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, counts=counts, key=np.array(key))
    return buffer.getvalue()


def _size_and_mtime(file: File | None) -> tuple[int, int] | None:
    """Return size (bytes) and modification time (ns) of a file or its zip file; None if there is no readable file."""
    if file is None:
        return None
    try:
        status = Path(file.archive if isinstance(file, ZipMember) else file).stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
