"""Download a file, resume an interrupted download, and verify the file."""

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from early_fusion_seg.errors import UserError
from early_fusion_seg.io.unpack import require_new, require_space, unpack

CHUNK = 1 << 20  # bytes
TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 8  # connections per call; each resumes where the previous one stopped
RETRY_DELAY = 1.0  # seconds between connections
CONNECTION_ERRORS = (http.client.HTTPException, OSError)  # OSError: refused, reset, timeout, urllib.error.URLError


def download(
    url: str, folder: str | Path, *, size: int | None = None, sha256: str | None = None, md5: str | None = None
) -> Path:
    """Download a file into a folder, or only verify it if it already exists.

    An incomplete download is named NAME.part; the next call resumes it. The file gets its name when it is complete and
    verified. If no checksum is given, the SHA-256 of the first download is stored in NAME.sha256, and later downloads
    are compared with it.

    Args:
        url: An http or https URL that ends in the name of the file.
        folder: Target folder; created if needed.
        size: Expected size in bytes.
        sha256: Expected SHA-256, hexadecimal.
        md5: Expected MD5, for files that are published without a better checksum.

    Returns:
        The path of the file.

    Raises:
        UserError: The server cannot be reached or returns an error, the disk is full, or the file is not as expected.
    """
    name = Path(unquote(urlsplit(url).path)).name
    if urlsplit(url).scheme not in ("http", "https") or name in ("", ".."):
        raise UserError(f"cannot download '{url}'; expected an http or https URL that ends in the name of a file")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target, part, record = folder / name, folder / f"{name}.part", folder / f"{name}.sha256"
    if target.exists():
        _verify(target, record, size, sha256, md5)
        return target
    _fetch(url, part, size)
    try:
        _verify(part, record, size, sha256, md5)
    except UserError:
        part.unlink()  # a wrong file cannot be resumed
        raise
    return part.replace(target)


class Archive(NamedTuple):
    """An archive on a server.

    Attributes:
        url: An http or https URL that ends in the name of the file.
        md5: Published MD5, if any.
        inside: Folder in it whose contents are unpacked; see `unpack`.
    """

    url: str
    md5: str | None = None
    inside: str = ""


def download_and_unpack(archives: Mapping[Path, Archive], folder: Path) -> None:
    """Download archives and unpack each into a new folder. Before the first download, check all these folders.

    Args:
        archives: Folder to create -> archive.
        folder: Where the archives are kept.

    Raises:
        UserError: A folder to create is not empty, or see `download` and `unpack`.
    """
    for target, archive in archives.items():
        require_new(target, archive.url)
    for target, archive in archives.items():
        unpack(download(archive.url, folder, md5=archive.md5), target, archive.inside)


def _fetch(url: str, part: Path, size: int | None) -> None:
    """Append to a partial file until it is complete."""
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            if _fetch_once(url, part, size):
                return
            reason = "the connection was closed early"
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise UserError(
                    f"{url} cannot be downloaded: the server returned {error.code} {error.reason}; "
                    "check the URL, or try again later"
                ) from None
            if error.headers.get("Content-Range") == f"bytes */{_file_size(part)}":  # the partial file is complete
                return
            part.unlink()  # longer than the file on the server, so a part of another file
            reason = "the file on the server is shorter"
        except CONNECTION_ERRORS as error:
            reason = str(error)
        time.sleep(RETRY_DELAY)
    raise UserError(
        f"the download of {url} failed {ATTEMPTS} times ({reason}). {part} has {_file_size(part)} bytes of it; "
        "run the command again to resume."
    )


def _fetch_once(url: str, part: Path, size: int | None) -> bool:
    """Request the missing bytes and append them; return whether the file is complete."""
    start = _file_size(part)
    if start and start == size:
        return True
    headers = {"User-Agent": "early-fusion-seg"} | ({"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status != 206:  # the server ignores the range and sends the whole file
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        if size is not None and total is not None and total != size:
            raise UserError(
                f"{url} has {total} bytes; expected {size}. The file on the server is not the expected one."
            )
        require_space(part.parent, (total or size or start) - start)
        _write_response(response, part, start, total)
    return total is None or _file_size(part) == total


def _write_response(response: http.client.HTTPResponse, part: Path, start: int, total: int | None) -> None:
    """Write a response to a partial file, starting at byte `start`, with a progress bar."""
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with part.open("r+b" if start else "wb") as sink, Progress(*columns, console=Console(stderr=True)) as progress:
        sink.seek(start)
        task = progress.add_task(part.stem, total=total, completed=start)
        while chunk := response.read(CHUNK):
            sink.write(chunk)
            progress.advance(task, len(chunk))


def _verify(path: Path, record: Path, size: int | None, sha256: str | None, md5: str | None) -> None:
    """Compare a file with its expected size and checksums, or else with the checksum recorded at the first download.

    Args:
        path: The file.
        record: File with the SHA-256 of the first download; written if it does not exist.
        size: Expected size in bytes, or None.
        sha256: Expected SHA-256, or None.
        md5: Expected MD5, or None.
    """
    if size is not None and _file_size(path) != size:
        raise UserError(f"{path} has {_file_size(path)} bytes; expected {size}. Delete it and download it again.")
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


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
