import hashlib
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import early_fusion_seg.data.camvid as camvid
from early_fusion_seg.data import download as module
from early_fusion_seg.data.camvid import CamVidDataModule
from early_fusion_seg.data.download import download, unpack
from early_fusion_seg.data.fake import fake_camvid_original
from early_fusion_seg.errors import UserError

BODY = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves bodies by path; `cuts` bytes are sent before each of the next connections breaks."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: dict[str, bytes] = {"/a.bin": BODY}
        self.cuts: list[int] = []
        self.ranges = True
        self.lengths = True
        self.status = 0
        self.asked: list[str | None] = []

    def url(self, path: str = "/a.bin") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        span = self.headers["Range"]
        self.server.asked.append(span)
        body = self.server.bodies.get(self.path)
        if body is None or self.server.status:
            return self.send_error(self.server.status or 404)
        start = int(span.removeprefix("bytes=").removesuffix("-")) if span and self.server.ranges else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if self.server.lengths:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        self.wfile.write(body[start:] if cut is None else body[start : start + cut])
        return None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_is_fetched_recorded_and_not_fetched_again(server: Server, tmp_path: Path) -> None:
    path = download(server.url(), tmp_path / "new")
    assert path == tmp_path / "new" / "a.bin"
    assert path.read_bytes() == BODY
    assert (tmp_path / "new" / "a.bin.sha256").read_text() == f"{SHA256}  a.bin\n"
    assert names(tmp_path / "new") == ["a.bin", "a.bin.sha256"]
    assert download(server.url(), tmp_path / "new") == path
    assert len(server.asked) == 1


def test_published_facts_are_checked_and_nothing_is_recorded(server: Server, tmp_path: Path) -> None:
    md5 = hashlib.md5(BODY).hexdigest()
    download(server.url(), tmp_path, size=len(BODY), sha256=SHA256.upper(), md5=md5)
    assert names(tmp_path) == ["a.bin"]


def test_cut_connections_are_resumed(server: Server, tmp_path: Path) -> None:
    server.cuts = [1_000_000, 500_000]
    assert download(server.url(), tmp_path, sha256=SHA256).read_bytes() == BODY
    assert server.asked == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_later_call_goes_on_where_the_last_one_gave_up(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000] * module.ATTEMPTS
    with pytest.raises(UserError, match=r"broke off 8 times \(the connection was cut\).*a\.bin\.part has 800000 bytes"):
        download(server.url(), tmp_path)
    assert names(tmp_path) == ["a.bin.part"]
    assert download(server.url(), tmp_path, size=len(BODY)).read_bytes() == BODY
    assert server.asked[-1] == "bytes=800000-"


def test_server_that_ignores_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [1_000_000]
    assert download(server.url(), tmp_path, sha256=SHA256).read_bytes() == BODY
    assert server.asked == [None, "bytes=1000000-"]


def test_server_that_tells_no_length(server: Server, tmp_path: Path) -> None:
    server.lengths = False
    assert download(server.url(), tmp_path).read_bytes() == BODY
    server.bodies["/b.bin"] = BODY
    server.cuts = [1000]
    with pytest.raises(UserError, match=r"b\.bin\.part has 1000 bytes; expected 3000000"):
        download(server.url("/b.bin"), tmp_path, size=len(BODY))


@pytest.mark.parametrize("size", [None, len(BODY)])
def test_complete_part_is_only_checked(server: Server, tmp_path: Path, size: int | None) -> None:
    (tmp_path / "a.bin.part").write_bytes(BODY)
    assert download(server.url(), tmp_path, size=size, sha256=SHA256).read_bytes() == BODY
    assert server.asked == ([] if size else ["bytes=3000000-"])


def test_part_of_a_longer_file_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(BODY + b"more")
    assert download(server.url(), tmp_path).read_bytes() == BODY


def test_wrong_size_is_refused_before_the_transfer(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.bin has 3000000 bytes; expected 7\. The server has another file"):
        download(server.url(), tmp_path, size=7)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_wrong_checksum_is_refused_and_leaves_nothing(server: Server, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=rf"a\.bin\.part has the {kind} [0-9a-f]+; expected 00ff"):
        download(server.url(), tmp_path, **{kind: "00ff"})
    assert names(tmp_path) == []


def test_file_there_is_checked_too_and_kept(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"a\.bin has 4 bytes; expected 3000000"):
        download(server.url(), tmp_path, size=len(BODY))
    assert (tmp_path / "a.bin").read_bytes() == b"mine"
    assert server.asked == []


def test_file_that_changed_since_the_first_download_is_refused(server: Server, tmp_path: Path) -> None:
    download(server.url(), tmp_path).unlink()
    server.bodies["/a.bin"] = b"other"
    with pytest.raises(UserError, match=rf"the first download had {SHA256} \(.*a\.bin\.sha256\)"):
        download(server.url(), tmp_path)


def test_server_errors_are_told(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.zip cannot be downloaded: the server answers 404 Not Found"):
        download(server.url("/gone.zip"), tmp_path)
    server.status = 503
    with pytest.raises(UserError, match="answers 503"):
        download(server.url(), tmp_path)


def test_unreachable_server_is_told(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"broke off 8 times \(.*refused.*has 0 bytes"):
        download("http://127.0.0.1:9/a.bin", tmp_path)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a.zip", "http://host/", "a.zip"])
def test_other_addresses_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="expected an http or https address"):
        download(url, tmp_path)


def test_name_in_the_address_cannot_leave_the_folder(server: Server, tmp_path: Path) -> None:
    server.bodies["/x%2F..%2Fevil.bin"] = b"1"
    assert download(server.url("/x%2F..%2Fevil.bin"), tmp_path / "in") == tmp_path / "in" / "evil.bin"
    for name in ("..", "%2E%2E"):
        with pytest.raises(UserError, match="expected an http"):
            download(server.url(f"/a/{name}"), tmp_path)


def test_full_disk_is_told_before_the_transfer(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    with pytest.raises(UserError, match="has 2 MB free; 3 MB are needed"):
        download(server.url(), tmp_path)
    pack(tmp_path / "a.zip", {"a": BODY})
    with pytest.raises(UserError, match="has 2 MB free; 3 MB are needed"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def pack(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("top", ["", "top/"])
def test_archive_is_unpacked_without_its_single_top_folder(tmp_path: Path, top: str) -> None:
    files = {f"{top}a.png": b"1", f"{top}deep/b.png": b"22", "__MACOSX/._a.png": b"junk"}
    archive = pack(tmp_path / "a.zip", files)
    with zipfile.ZipFile(archive, "a") as opened:
        opened.mkdir(f"{top}empty")
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "stale").write_text("of an attempt that broke off")
    unpack(archive, tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"a.png", "deep/b.png"}
    assert (tmp_path / "out/deep/b.png").read_bytes() == b"22"
    assert names(tmp_path) == ["a.zip", "out"]
    with pytest.raises(UserError, match="out is there already"):
        unpack(archive, tmp_path / "out")


def test_single_file_is_unpacked(tmp_path: Path) -> None:
    unpack(pack(tmp_path / "a.zip", {"a.png": b"1"}), tmp_path / "out")
    assert (tmp_path / "out/a.png").read_bytes() == b"1"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "..\\x", "C:\\x", "C:x", "\\\\host\\share\\x"])
def test_archive_that_would_write_elsewhere_is_refused_whole(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    archive = pack(folder / "a.zip", {"good": b"1", name: b"2"})
    with pytest.raises(UserError, match="lies outside the folder; it is not unpacked"):
        unpack(archive, folder / "out")
    assert names(folder) == ["a.zip"]
    assert names(tmp_path) == ["deep"]


@pytest.mark.parametrize("mode", [0o120777, 0o020666])
def test_links_and_devices_are_refused(tmp_path: Path, mode: int) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = mode << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc")
        archive.writestr("link/x", "1")
    with pytest.raises(UserError, match="'link', which is a link or encrypted"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert names(tmp_path) == ["a.zip"]


def test_encrypted_archive_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", {"a": b"1"})
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(data)
    with pytest.raises(UserError, match="link or encrypted"):
        unpack(archive, tmp_path / "out")


def test_bombs_and_empty_archives_are_refused(tmp_path: Path) -> None:
    bomb = pack(tmp_path / "a.zip", {"a": bytes(20_000_000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="would unpack to 20000000; it is empty or a zip bomb"):
        unpack(bomb, tmp_path / "out")
    with pytest.raises(UserError, match="would unpack to 0"):
        unpack(pack(tmp_path / "b.zip", {}), tmp_path / "out")


def test_bomb_that_lies_about_its_size_writes_no_more_than_it_says(tmp_path: Path) -> None:
    bomb = pack(tmp_path / "a.zip", {"a": bytes(20_000_000)}, zipfile.ZIP_DEFLATED)
    data = bytearray(bomb.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (1000).to_bytes(4, "little")
    bomb.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        unpack(bomb, tmp_path / "out")
    assert (tmp_path / "out.part" / "a").stat().st_size <= 1000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["text", "cut", "byte"])
def test_damaged_archive_is_refused(tmp_path: Path, damage: str) -> None:
    data = bytearray(pack(tmp_path / "a.zip", {"a": BODY[:5000]}, zipfile.ZIP_DEFLATED).read_bytes())
    data[2000] ^= 255
    (tmp_path / "a.zip").write_bytes({"text": b"no zip", "cut": bytes(data[:3000]), "byte": bytes(data)}[damage])
    with pytest.raises(UserError, match=r"a\.zip is damaged .*delete it and download it again"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_camvid_from_the_site_to_a_sample(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_camvid_original(tmp_path / "made", images=2, size=(12, 16))
    for name, top in ((camvid.IMAGES, f"{camvid.IMAGES}/"), (camvid.MASKS, "")):  # as the real archives are made
        files = {f"{top}{path.name}": path.read_bytes() for path in (made / name).iterdir()}
        server.bodies[f"/{name}.zip"] = pack(tmp_path / "x.zip", files).read_bytes()
    monkeypatch.setattr(
        camvid, "ARCHIVES", {name: server.url(f"/{name}.zip") for name in (camvid.IMAGES, camvid.MASKS)}
    )
    server.cuts = [500]
    dm = CamVidDataModule(tmp_path / "root", download=True)
    dm.prepare_data()
    sample = dm.dataset("val")[1]
    assert sample["key"] == "0016E5_07961"
    assert sample["mask"].shape == (12, 16)
    assert (tmp_path / "root" / f"{camvid.MASKS}.zip.sha256").exists()
