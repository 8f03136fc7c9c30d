"""List the files of a data set, in folders or in zip files as downloaded."""

import io
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from early_fusion_seg.errors import MissingFileError, UserError


class ZipMember(NamedTuple):
    """A file in a zip file; it can be opened and printed like a path."""

    archive: Path
    name: str

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def open(self, _: str = "rb") -> BinaryIO:
        """Read the file into memory and return it as a binary stream."""
        try:
            return io.BytesIO(_open_archive(self.archive, os.getpid()).read(self.name))
        # errors of zipfile for a damaged member; the last two for an unknown compression and for encryption
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{self} cannot be read ({error}); download the zip file again") from None


File = str | Path | ZipMember


def files_below(root: Path, folder: str, suffix: str, archives: Iterable[str] = ()) -> dict[str, File]:
    """List the files below a folder or, if it does not exist, below the same folder in zip files.

    Args:
        root: Folder that contains the folder and the zip files.
        folder: Path of the folder below the root, with slashes.
        suffix: End of the names of the files to list.
        archives: Names of zip files below the root that may contain the folder; missing ones are skipped.

    Returns:
        Key -> file, sorted by key. The key is the path below the folder, with slashes and without the suffix.
    """
    found: dict[str, File] = {}
    if (root / folder).is_dir():
        base = str(root / folder)
        found = {key: f"{base}/{key}{suffix}" for key in _walk(base, "", suffix)}  # Paths would take four times as long
    else:
        for archive in [root / name for name in archives if (root / name).is_file()]:
            names = _member_names(archive)
            members = [name for name in names if name.startswith(f"{folder}/") and name.endswith(suffix)]
            found |= {name[len(folder) + 1 : len(name) - len(suffix)]: ZipMember(archive, name) for name in members}
    return {key: found[key] for key in sorted(found)}


def _walk(folder: str, prefix: str, suffix: str) -> Iterable[str]:
    """Yield the keys of the files below a folder, without hidden files and folders."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.endswith(suffix):
                yield prefix + entry.name[: len(entry.name) - len(suffix)]
            elif entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", suffix)


def require_folder(folder: Path, tree: str, where: str) -> None:
    """Check that a folder exists.

    Args:
        folder: The folder.
        tree: Expected contents, one file or folder per line.
        where: Where to get the data.

    Raises:
        MissingFileError: The folder does not exist; the message shows `tree` and `where`.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder. Expected there:\n{tree}\n{where}")


def matched(images: Mapping[str, File], masks: Mapping[str, File], what: str) -> list[tuple[str, File, File]]:
    """Pair each image with the mask of the same key.

    Args:
        images: Key -> file.
        masks: Key -> file; masks without an image are skipped.
        what: Where masks were expected, for the message.

    Returns:
        Tuples (key, image, mask) in the order of the images.

    Raises:
        MissingFileError: An image has no mask.
    """
    if unmatched := [key for key in images if key not in masks]:
        example = images[unmatched[0]]
        raise MissingFileError(f"{len(unmatched)} image(s) have no mask, such as {example}; expected {what}")
    return [(key, image, masks[key]) for key, image in images.items()]


@lru_cache(maxsize=16)
def _member_names(archive: Path) -> tuple[str, ...]:
    return tuple(_open_archive(archive, os.getpid()).namelist())


@lru_cache(maxsize=16)
def _open_archive(archive: Path, process_id: int) -> zipfile.ZipFile:
    """Open a zip file once per process; processes that share an open file would change each other's read position."""
    try:
        return zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{archive} cannot be read as a zip file ({error}); download it again") from None
