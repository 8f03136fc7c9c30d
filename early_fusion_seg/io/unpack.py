"""Unpack zip and tar files such that nothing lands outside their folder, and nothing at all if they are not sound."""

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
MAX_RATIO = 100  # unpacked to packed bytes; images do not shrink much, zip bombs do
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, NotImplementedError)
"""What zipfile and tarfile raise for archives that are damaged, cut off or compressed in a way they do not know."""


class Member(NamedTuple):
    """A file of an archive."""

    name: str
    size: int  # bytes, unpacked
    plain: bool  # neither link nor device nor encrypted
    open: Callable[[], IO[bytes] | None]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip file, or a tar file compressed or not, as a new folder; a single folder at its top is left out.

    All of it is checked before anything is written, and the folder appears only when it is complete.

    Args:
        archive: The file.
        folder: The folder to make.

    Raises:
        UserError: The archive is damaged, would write outside the folder or hold links, or is suspiciously large.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already; delete it to unpack {archive} again")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an attempt that broke off
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _members(archive) as members:
            files = _checked(archive, members)
            require_space(folder.parent, sum(member.size for member in files.values()))
            for path, member in files.items():
                (part / path).parent.mkdir(parents=True, exist_ok=True)
                source = member.open()
                assert source is not None  # of a plain file there is always one
                with source, (part / path).open("wb") as sink:
                    shutil.copyfileobj(source, sink, CHUNK)
    except DAMAGE as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and download it again") from None
    part.replace(folder)


def require_space(folder: Path, size: int) -> None:
    """Check that the disk of a folder has room for `size` bytes."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{folder} has {free / 1e6:.0f} MB free; {size / 1e6:.0f} MB are needed")


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    """Open an archive and list its members, without folders."""
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            yield (Member(i.name, i.size, i.isreg(), partial(tar.extractfile, i)) for i in tar if not i.isdir())
    else:
        with zipfile.ZipFile(archive) as opened:
            infos = [info for info in opened.infolist() if not info.is_dir()]
            yield (Member(i.filename, i.file_size, _is_plain(i), partial(opened.open, i)) for i in infos)


def _is_plain(info: zipfile.ZipInfo) -> bool:
    return stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG) and not info.flag_bits & 1


def _checked(archive: Path, members: Iterator[Member]) -> dict[Path, Member]:
    """Return the files of an archive by their places below the folder, all of them harmless."""
    files: dict[Path, Member] = {}
    size, packed = 0, archive.stat().st_size
    for member in members:
        path = PureWindowsPath(member.name)  # splits at / and \, and knows drives
        if path.anchor or ".." in path.parts:
            raise UserError(f"{archive} holds '{member.name}', which lies outside the folder; it is not unpacked")
        if not member.plain:
            raise UserError(f"{archive} holds '{member.name}', which is a link or encrypted; it is not unpacked")
        if path.parts[0] != "__MACOSX":
            files[Path(*path.parts)] = member
            size += member.size
        if size > MAX_RATIO * packed:
            break
    if not files or size > MAX_RATIO * packed:
        raise UserError(f"{archive} has {packed} bytes and would unpack to {size}; it is empty or a zip bomb")
    single = len({path.parts[0] for path in files}) == 1 and all(len(path.parts) > 1 for path in files)
    return {Path(*path.parts[1:]) if single else path: member for path, member in files.items()}
