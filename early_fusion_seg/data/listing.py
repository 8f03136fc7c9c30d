"""The files of a data set: listed quickly, in folders or in the zip files that its site gives."""

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
    """A file in a zip file, to be opened and printed like a path."""

    archive: Path
    name: str

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def open(self, _: str = "rb") -> BinaryIO:
        """Read the file into memory and open it there."""
        try:
            return io.BytesIO(_opened(self.archive, os.getpid()).read(self.name))
        # what zipfile raises for a damaged member; the last two for a compression and an encryption it does not know
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{self} cannot be read ({error}); download the zip file again") from None


File = str | Path | ZipMember


def files_below(root: Path, folder: str, suffix: str, archives: Iterable[str] = ()) -> dict[str, File]:
    """List the files below a folder or, where it is not there, those of the same place in zip files.

    Args:
        root: Where folder and zip files are.
        folder: Path below the root, with slashes.
        suffix: How the names of the wanted files end.
        archives: Names of zip files below the root that may hold the folder; they need not be there.

    Returns:
        The path below the folder, with slashes and without the suffix -> the file, sorted.
    """
    found: dict[str, File] = {}
    if (root / folder).is_dir():
        base = str(root / folder)
        found = {key: f"{base}/{key}{suffix}" for key in _walk(base, "", suffix)}  # Paths would take four times as long
    else:
        for archive in [root / name for name in archives if (root / name).is_file()]:
            members = [name for name in _names(archive) if name.startswith(f"{folder}/") and name.endswith(suffix)]
            found |= {name[len(folder) + 1 : len(name) - len(suffix)]: ZipMember(archive, name) for name in members}
    return {key: found[key] for key in sorted(found)}


def _walk(folder: str, prefix: str, suffix: str) -> Iterable[str]:
    """Yield the keys of the files below a folder; hidden ones are left aside."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.endswith(suffix):
                yield prefix + entry.name[: len(entry.name) - len(suffix)]
            elif entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", suffix)


def require_folder(folder: Path, tree: str, where: str) -> None:
    """Check that a folder is there.

    Args:
        folder: The folder.
        tree: What was expected below it, one file or folder per line.
        where: Where to get it.

    Raises:
        MissingFileError: It is not; the message shows tree and where.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder. Expected there:\n{tree}\n{where}")


def matched(images: Mapping[str, File], masks: Mapping[str, File], what: str) -> list[tuple[str, File, File]]:
    """Match images with masks of the same key.

    Args:
        images: Key -> file.
        masks: Key -> file; those without an image are left aside.
        what: Where masks were expected, for the message.

    Returns:
        (key, image, mask) in the order of the images.

    Raises:
        MissingFileError: An image has no mask.
    """
    if alone := [key for key in images if key not in masks]:
        raise MissingFileError(f"{len(alone)} image(s) have no mask, such as {images[alone[0]]}; expected {what}")
    return [(key, image, masks[key]) for key, image in images.items()]


@lru_cache(maxsize=16)
def _names(archive: Path) -> tuple[str, ...]:
    return tuple(_opened(archive, os.getpid()).namelist())


@lru_cache(maxsize=16)
def _opened(archive: Path, _: int) -> zipfile.ZipFile:
    """Open a zip file once in each process: two that share one would move each other's position."""
    try:
        return zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{archive} cannot be read as a zip file ({error}); download it again") from None
