"""Fetch a file that was asked for, go on where an earlier attempt broke off, check it, and unpack it safely."""

import hashlib
import http.client
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote, urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from early_fusion_seg.errors import UserError

CHUNK = 1 << 20  # bytes
TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 8  # connections per call; each goes on where the last one broke off
PAUSE = 1.0  # seconds between them
MAX_RATIO = 100  # unpacked to packed bytes; images do not shrink much, zip bombs do
BROKEN = (http.client.HTTPException, OSError)  # OSError: no connection, reset, timeout, urllib.error.URLError


def download(
    url: str, folder: str | Path, *, size: int | None = None, sha256: str | None = None, md5: str | None = None
) -> Path:
    """Fetch a file into a folder, unless it is there already.

    Until it is complete and checked it is called NAME.part, with which the next call goes on. Where no checksum is
    known, the SHA-256 of the first download is kept in NAME.sha256, and later ones are compared with it.

    Args:
        url: An http or https address that ends in the file's name.
        folder: Where to put it; made where needed.
        size: Expected size in bytes.
        sha256: Expected SHA-256, hexadecimal.
        md5: Expected MD5, for files whose publishers give no better checksum.

    Returns:
        The file.

    Raises:
        UserError: The server cannot be reached or refuses, the disk is too small, or the file is not the expected one.
    """
    name = Path(unquote(urlsplit(url).path)).name
    if urlsplit(url).scheme not in ("http", "https") or name in ("", ".."):
        raise UserError(f"cannot download '{url}'; expected an http or https address that ends in a file's name")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target, part, record = folder / name, folder / f"{name}.part", folder / f"{name}.sha256"
    if target.exists():
        _check(target, record, size, sha256, md5)
        return target
    _fetch(url, part, size)
    try:
        _check(part, record, size, sha256, md5)
    except UserError:
        part.unlink()  # nothing can go on from a wrong file
        raise
    return part.replace(target)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip file as a new folder; a single folder at its top is left out.

    All of it is checked before anything is written, and the folder appears only when it is complete.

    Args:
        archive: The zip file.
        folder: The folder to make.

    Raises:
        UserError: The archive is damaged, would write outside the folder or hold links, or is suspiciously large.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already; delete it to unpack {archive} again")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an attempt that broke off
    try:
        with zipfile.ZipFile(archive) as opened:
            members = _checked_members(archive, opened)
            _require_space(folder.parent, sum(info.file_size for info, _ in members))
            for info, path in members:
                (part / path).parent.mkdir(parents=True, exist_ok=True)
                with opened.open(info) as source, (part / path).open("wb") as sink:
                    shutil.copyfileobj(source, sink, CHUNK)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and download it again") from None
    part.replace(folder)


def _fetch(url: str, part: Path, size: int | None) -> None:
    """Append to a part until it is complete."""
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            if _fetch_once(url, part, size):
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise UserError(f"{url} cannot be downloaded: the server answers {error.code} {error.reason}") from None
            if error.headers.get("Content-Range") == f"bytes */{_length(part)}":  # nothing is missing
                return
            part.unlink()  # longer than the file: another one
            reason = "the server has a shorter file"
        except BROKEN as error:
            reason = str(error)
        time.sleep(PAUSE)
    raise UserError(
        f"{url} broke off {ATTEMPTS} times ({reason}). {part} has {_length(part)} bytes of it; try again to go on."
    )


def _fetch_once(url: str, part: Path, size: int | None) -> bool:
    """Ask for what is missing and write what comes; return whether that was all."""
    start = _length(part)
    if start and start == size:
        return True
    headers = {"User-Agent": "early-fusion-seg"} | ({"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status != 206:  # the server sends all of it again
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        if size is not None and total is not None and total != size:
            raise UserError(f"{url} has {total} bytes; expected {size}. The server has another file.")
        _require_space(part.parent, (total or size or start) - start)
        _save(response, part, start, total)
    return total is None or _length(part) == total


def _save(response: http.client.HTTPResponse, part: Path, start: int, total: int | None) -> None:
    """Write a response to a part from a position on, with a progress bar."""
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with part.open("r+b" if start else "wb") as sink, Progress(*columns, console=Console(stderr=True)) as progress:
        sink.seek(start)
        task = progress.add_task(part.stem, total=total, completed=start)
        while chunk := response.read(CHUNK):
            sink.write(chunk)
            progress.advance(task, len(chunk))


def _check(path: Path, record: Path, size: int | None, sha256: str | None, md5: str | None) -> None:
    """Compare a file with what is known of it, or with the record of the first download, which is made here."""
    if size is not None and _length(path) != size:
        raise UserError(f"{path} has {_length(path)} bytes; expected {size}. Delete it and download it again.")
    for kind, expected in (("sha256", sha256), ("md5", md5)):
        if expected and _digest(path, kind) != expected.lower():
            raise UserError(
                f"{path} has the {kind} {_digest(path, kind)}; expected {expected}. Delete it and download it again."
            )
    if sha256 or md5:
        return
    found = _digest(path, "sha256")
    if not record.exists():
        record.write_text(f"{found}  {record.stem}\n", encoding="utf-8")
    elif (first := record.read_text(encoding="utf-8").split()[0]) != found:
        raise UserError(
            f"{path} has the sha256 {found}; the first download had {first} ({record}). Delete the one that is wrong."
        )


def _checked_members(archive: Path, opened: zipfile.ZipFile) -> list[tuple[zipfile.ZipInfo, Path]]:
    """Return the files of an archive and their places below the folder, all of them harmless."""
    members: dict[Path, zipfile.ZipInfo] = {}
    for info in opened.infolist():
        path = PureWindowsPath(info.filename)  # splits at / and \, and knows drives
        if path.anchor or ".." in path.parts:
            raise UserError(f"{archive} holds '{info.filename}', which lies outside the folder; it is not unpacked")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:
            raise UserError(f"{archive} holds '{info.filename}', which is a link or encrypted; it is not unpacked")
        if not info.is_dir() and path.parts[0] != "__MACOSX":
            members[Path(*path.parts)] = info
    size, packed = sum(info.file_size for info in members.values()), _length(archive)
    if not members or size > MAX_RATIO * packed:
        raise UserError(f"{archive} has {packed} bytes and would unpack to {size}; it is empty or a zip bomb")
    single = len({path.parts[0] for path in members}) == 1 and all(len(path.parts) > 1 for path in members)
    return [(info, Path(*path.parts[1:]) if single else path) for path, info in members.items()]


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{folder} has {free / 1e6:.0f} MB free; {size / 1e6:.0f} MB are needed")


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
