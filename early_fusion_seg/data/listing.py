"""List the files of a data set, in folders or in zip files as downloaded."""

import io
import os
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from early_fusion_seg.errors import MissingFileError, UserError, first_five
from early_fusion_seg.io.images import OUTPUT_MARK


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

SYSTEM_NAMES = {  # files and folders that operating systems and file servers add, in lower case; some hold thumbnails
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    *("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"),
}


def files_below(root: Path, folder: str, suffix: str, archives: Iterable[str] = ()) -> dict[str, File]:
    """List the files below a folder or, if it does not exist, below the same folder in zip files.

    Args:
        root: Folder that contains the folder and the zip files.
        folder: Path of the folder below the root, with slashes.
        suffix: End of the names of the files to list; upper and lower case are the same.
        archives: Names of zip files below the root that may contain the folder; missing ones are skipped.

    Returns:
        Key -> file, sorted by key. The key is the path below the folder, with slashes, without the suffix, in the
        composed Unicode form.

    Raises:
        UserError: Two files have the same key, or a folder cannot be read.
    """
    found: dict[str, File] = {}
    if (root / folder).is_dir():
        base = str(root / folder)
        names = list(walk(base))
        if unreadable := [name for name in names if name == "." or name.endswith("/")]:
            raise UserError(f"the folder {base}/{unreadable[0]} cannot be read; change its permissions")
        found = {key: f"{base}/{name}" for key, name in _by_key(base, names, suffix)}  # Paths would take longer
    else:
        for archive in [root / name for name in archives if (root / name).is_file()]:
            members = [name for name in _member_names(archive) if name.startswith(f"{folder}/")]
            by_key = _by_key(str(archive), members, suffix)
            found |= {key[len(folder) + 1 :]: ZipMember(archive, name) for key, name in by_key}
    return {key: found[key] for key in sorted(found)}


def _by_key(place: str, names: Iterable[str], suffix: str) -> Iterable[tuple[str, str]]:
    """Return the keys and names of the files with a suffix.

    Raises:
        UserError: Two files have the same key.
    """
    found: dict[str, str] = {}
    for name in names:
        if name[-len(suffix) :].lower() == suffix.lower():
            key = composed(name[: -len(suffix)])
            if (other := found.setdefault(key, name)) != name:
                raise UserError(
                    f"{place} has {other} and {name}, which differ only in the case of {suffix} or in the Unicode form "
                    "of a character; delete or rename one"
                )
    return found.items()


def composed(name: str) -> str:
    """Return a name in the composed Unicode form (NFC); a Mac may write an accent as a character of its own."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def walk(
    folder: str, prefix: str = "", above: tuple[tuple[int, int], ...] = (), skip_outputs: bool = False
) -> Iterator[str]:
    """Yield the paths of the files below a folder, with slashes, in no order.

    Links to folders are followed, but not back to a folder above. Hidden files and those of the system are left out.
    What cannot be read is listed too, so that nobody misses it: a link that leads nowhere like a file, and a folder
    without permission as `FOLDER/`, or "." for the uppermost.

    Args:
        folder: The folder.
        prefix: Start of the paths: empty, or with a slash at its end.
        above: Device and inode of each folder above.
        skip_outputs: Leave out the folders below that are marked as written by this package.
    """
    try:
        status = Path(folder).stat()
        with os.scandir(folder) as opened:
            entries = list(opened)
    except OSError:
        yield prefix or "."
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above or (skip_outputs and above and any(entry.name == OUTPUT_MARK for entry in entries)):
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES:
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file() or entry.is_symlink()
        except OSError:  # a link that leads to itself
            is_folder, is_file = False, True
        if is_folder:
            yield from walk(entry.path, f"{prefix}{entry.name}/", (*above, identity), skip_outputs)
        elif is_file:
            yield prefix + entry.name


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
    if unmatched := [images[key] for key in images if key not in masks]:
        raise MissingFileError(f"{len(unmatched)} image(s) have no mask: {first_five(unmatched)}; expected {what}")
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
