"""Unpack zip and tar files safely: no file outside the target folder, and no target folder from a damaged archive."""

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO, NamedTuple

from early_fusion_seg.errors import UserError

CHUNK = 1 << 20  # bytes
MAX_RATIO = 100  # unpacked to packed bytes; images compress little, zip bombs a lot
ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, NotImplementedError)
"""Errors of zipfile and tarfile for archives that are damaged, truncated or compressed by an unknown method."""


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    size: int  # bytes, unpacked
    is_regular: bool  # not a link, not a device, not encrypted
    open: Callable[[], IO[bytes] | None]


def unpack(archive: Path, folder: Path, inside: str = "") -> None:
    """Unpack a zip file, or a compressed or plain tar file, into a new folder.

    If the archive has a single folder at its top, the contents of that folder are unpacked. All names and sizes are
    checked before anything is written. The new folder gets its name when it is complete.

    Args:
        archive: The file to unpack.
        folder: The folder to create; it may exist if it is empty.
        inside: Unpack only the contents of this folder, below the single folder at the top.

    Raises:
        UserError: The folder already exists, or the archive is damaged, has files outside the folder, links or
            encrypted files, or unpacks to a suspicious size.
    """
    require_new(folder, archive)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by an interrupted attempt
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _list_members(archive) as members:
            files = _check_members(archive, members, inside)
            require_space(folder.parent, sum(member.size for member in files.values()))
            for path, member in files.items():
                (part / path).parent.mkdir(parents=True, exist_ok=True)
                source = member.open()
                assert source is not None  # tarfile returns None only for members that are not regular files
                with source, (part / path).open("wb") as sink:
                    shutil.copyfileobj(source, sink, CHUNK)
    except ARCHIVE_ERRORS as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and download it again") from None
    if folder.exists():
        folder.rmdir()  # empty; not every system replaces it
    part.replace(folder)


def require_new(folder: Path, archive: Path | str) -> None:
    """Check that an archive can be unpacked into a folder: it does not exist, or is empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} already exists; rename or delete it to unpack {archive} there")


def require_space(folder: Path, size: int) -> None:
    """Check that the disk of a folder has room for `size` bytes."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder} has {free / 1e6:.0f} MB free; {size / 1e6:.0f} MB are needed. Free space on its disk."
        )


@contextmanager
def _list_members(archive: Path) -> Iterator[Iterator[Member]]:
    """Open an archive and list its members, without folders."""
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            yield (Member(i.name, i.size, i.isreg(), partial(tar.extractfile, i)) for i in tar if not i.isdir())
    else:
        with zipfile.ZipFile(archive) as opened:
            infos = [info for info in opened.infolist() if not info.is_dir()]
            yield (Member(i.filename, i.file_size, _is_regular(i), partial(opened.open, i)) for i in infos)


def _is_regular(info: zipfile.ZipInfo) -> bool:
    return stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG) and not info.flag_bits & 1


def _check_members(archive: Path, members: Iterator[Member], inside: str) -> dict[Path, Member]:
    """Check that all members of an archive are safe to unpack.

    Returns:
        Path below the target folder -> member, for the members in the folder `inside`.
    """
    files: dict[Path, Member] = {}
    size, packed = 0, archive.stat().st_size
    for member in members:
        path = PureWindowsPath(member.name)  # splits at / and \, and recognizes drives
        if path.anchor or ".." in path.parts:
            raise UserError(f"{archive} contains '{member.name}', a path outside the folder; it is not unpacked")
        if not member.is_regular:
            raise UserError(f"{archive} contains '{member.name}', a link or an encrypted file; it is not unpacked")
        if path.parts[0] != "__MACOSX":
            files[Path(*path.parts)] = member
            size += member.size
        if size > MAX_RATIO * packed:
            break
    if not files or size > MAX_RATIO * packed:
        raise UserError(f"{archive} has {packed} bytes and would unpack to {size}; it is empty or a zip bomb")
    single = len({path.parts[0] for path in files}) == 1 and all(len(path.parts) > 1 for path in files)
    below = {Path(*path.parts[1:]) if single else path: member for path, member in files.items()}
    chosen = {path.relative_to(inside): member for path, member in below.items() if path.is_relative_to(inside)}
    if not chosen:
        raise UserError(f"{archive} has no folder {inside}; delete it and download it again")
    return chosen
