"""Fetch a file that was asked for, go on where an earlier attempt broke off, and check it."""

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from early_fusion_seg.errors import UserError
from early_fusion_seg.io.unpack import require_space

CHUNK = 1 << 20  # bytes
TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 8  # connections per call; each goes on where the last one broke off
PAUSE = 1.0  # seconds between them
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
        require_space(part.parent, (total or size or start) - start)
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


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
