import hashlib
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from archives import pack, pack_folder

import early_fusion_seg.data.camvid as camvid
import early_fusion_seg.data.coco.datamodule as coco
import early_fusion_seg.data.voc as voc
from early_fusion_seg import COCODataModule, VOCDataModule
from early_fusion_seg.data.camvid import CamVidDataModule, fake_camvid_original
from early_fusion_seg.data.coco.replica import fake_coco_panoptic, fake_coco_stuff, fake_coco_stuff10k
from early_fusion_seg.data.voc import fake_voc
from early_fusion_seg.errors import UserError
from early_fusion_seg.io import download as module
from early_fusion_seg.io.download import Archive, download, download_and_unpack

BODY = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """A server of bodies by path; each of the next connections is closed after the number of bytes in `cuts`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: dict[str, bytes] = {"/a.bin": BODY}
        self.cuts: list[int] = []
        self.ranges = True
        self.lengths = True
        self.status = 0
        self.requested: list[str | None] = []

    def url(self, path: str = "/a.bin") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        span = self.headers["Range"]
        self.server.requested.append(span)
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
    monkeypatch.setattr(module, "RETRY_DELAY", 0.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_is_downloaded_once_and_its_checksum_recorded(server: Server, tmp_path: Path) -> None:
    path = download(server.url(), tmp_path / "new")
    assert path == tmp_path / "new" / "a.bin"
    assert path.read_bytes() == BODY
    assert (tmp_path / "new" / "a.bin.sha256").read_text() == f"{SHA256}  a.bin\n"
    assert names(tmp_path / "new") == ["a.bin", "a.bin.sha256"]
    assert download(server.url(), tmp_path / "new") == path
    assert len(server.requested) == 1


def test_published_checksums_are_verified_and_none_is_recorded(server: Server, tmp_path: Path) -> None:
    md5 = hashlib.md5(BODY).hexdigest()
    download(server.url(), tmp_path, size=len(BODY), sha256=SHA256.upper(), md5=md5)
    assert names(tmp_path) == ["a.bin"]


def test_closed_connections_are_resumed(server: Server, tmp_path: Path) -> None:
    server.cuts = [1_000_000, 500_000]
    assert download(server.url(), tmp_path, sha256=SHA256).read_bytes() == BODY
    assert server.requested == [None, "bytes=1000000-", "bytes=1500000-"]


def test_later_call_resumes_an_incomplete_download(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000] * module.ATTEMPTS
    with pytest.raises(
        UserError, match=r"failed 8 times \(the connection was closed early\).*a\.bin\.part has 800000 bytes"
    ):
        download(server.url(), tmp_path)
    assert names(tmp_path) == ["a.bin.part"]
    assert download(server.url(), tmp_path, size=len(BODY)).read_bytes() == BODY
    assert server.requested[-1] == "bytes=800000-"


def test_server_that_ignores_ranges_sends_the_whole_file(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [1_000_000]
    assert download(server.url(), tmp_path, sha256=SHA256).read_bytes() == BODY
    assert server.requested == [None, "bytes=1000000-"]


def test_server_without_content_length(server: Server, tmp_path: Path) -> None:
    server.lengths = False
    assert download(server.url(), tmp_path).read_bytes() == BODY
    server.bodies["/b.bin"] = BODY
    server.cuts = [1000]
    with pytest.raises(UserError, match=r"b\.bin\.part has 1000 bytes; expected 3000000"):
        download(server.url("/b.bin"), tmp_path, size=len(BODY))


@pytest.mark.parametrize("size", [None, len(BODY)])
def test_complete_partial_file_is_only_verified(server: Server, tmp_path: Path, size: int | None) -> None:
    (tmp_path / "a.bin.part").write_bytes(BODY)
    assert download(server.url(), tmp_path, size=size, sha256=SHA256).read_bytes() == BODY
    assert server.requested == ([] if size else ["bytes=3000000-"])


def test_partial_file_that_is_too_long_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(BODY + b"more")
    assert download(server.url(), tmp_path).read_bytes() == BODY


def test_wrong_size_is_refused_before_the_transfer(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"a\.bin has 3000000 bytes; expected 7\. The file on the server is not the expected one"
    ):
        download(server.url(), tmp_path, size=7)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_wrong_checksum_is_refused_and_leaves_nothing(server: Server, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=rf"a\.bin\.part has the {kind} [0-9a-f]+; expected 00ff"):
        download(server.url(), tmp_path, **{kind: "00ff"})
    assert names(tmp_path) == []


def test_existing_file_is_verified_and_kept(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"a\.bin has 4 bytes; expected 3000000"):
        download(server.url(), tmp_path, size=len(BODY))
    assert (tmp_path / "a.bin").read_bytes() == b"mine"
    assert server.requested == []


def test_file_that_changed_since_the_first_download_is_refused(server: Server, tmp_path: Path) -> None:
    download(server.url(), tmp_path).unlink()
    server.bodies["/a.bin"] = b"other"
    with pytest.raises(UserError, match=rf"the first download had {SHA256} \(.*a\.bin\.sha256\)"):
        download(server.url(), tmp_path)


def test_server_errors_are_reported(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.zip cannot be downloaded: the server returned 404 Not Found"):
        download(server.url("/gone.zip"), tmp_path)
    server.status = 503
    with pytest.raises(UserError, match="the server returned 503"):
        download(server.url(), tmp_path)


def test_unreachable_server_is_reported(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"failed 8 times \(.*refused.*has 0 bytes"):
        download("http://127.0.0.1:9/a.bin", tmp_path)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a.zip", "http://host/", "a.zip"])
def test_other_urls_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="expected an http or https URL"):
        download(url, tmp_path)


def test_name_in_the_url_cannot_leave_the_folder(server: Server, tmp_path: Path) -> None:
    server.bodies["/x%2F..%2Fevil.bin"] = b"1"
    assert download(server.url("/x%2F..%2Fevil.bin"), tmp_path / "in") == tmp_path / "in" / "evil.bin"
    for name in ("..", "%2E%2E"):
        with pytest.raises(UserError, match="expected an http"):
            download(server.url(f"/a/{name}"), tmp_path)


def test_full_disk_is_reported_before_the_transfer(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    with pytest.raises(UserError, match="has 2 MB free; 3 MB are needed"):
        download(server.url(), tmp_path)


def test_camvid_is_downloaded_unpacked_and_read(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fake_camvid_original(tmp_path / "made", images=2, size=(12, 16))
    for name, top in ((camvid.IMAGES, f"{camvid.IMAGES}/"), (camvid.MASKS, "")):  # as in the real archives
        server.bodies[f"/{name}.zip"] = pack_folder(tmp_path / "x.zip", made / name, top).read_bytes()
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


def test_voc_and_sbd_are_downloaded_unpacked_and_read(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_voc(tmp_path / "made", images=1)
    archives = {"VOC": pack_folder(tmp_path / "voc.tar", made / "VOCdevkit", "VOCdevkit/"),
                "SBD": pack_folder(tmp_path / "sbd.tgz", made / "benchmark_RELEASE", "benchmark_RELEASE/")}  # fmt: skip
    for name, archive in archives.items():
        server.bodies[f"/{archive.name}"] = archive.read_bytes()
        monkeypatch.setattr(voc, f"{name}_URL", server.url(f"/{archive.name}"))
        monkeypatch.setattr(voc, f"{name}_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    server.cuts = [700, 900]
    dm = VOCDataModule(tmp_path / "root", download=True)
    dm.prepare_data()
    assert [len(dm.dataset(split)) for split in ("train", "val", "test")] == [2, 1, 1]
    assert dm.dataset("train")[1]["key"] == "2010_000000"
    server.bodies.clear()
    dm.prepare_data()  # nothing is missing
    monkeypatch.setattr(voc, "VOC_MD5", "0" * 32)
    server.bodies["/voc.tar"] = archives["VOC"].read_bytes()
    with pytest.raises(UserError, match="has the md5"):
        VOCDataModule(tmp_path / "other", download=True).prepare_data()
    assert not (tmp_path / "other/VOCdevkit").exists()


def test_voc_is_downloaded_beside_voc2007(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_voc(tmp_path / "made", images=1)
    archive = pack_folder(tmp_path / "voc.tar", made / "VOCdevkit", "VOCdevkit/")
    server.bodies["/voc.tar"] = archive.read_bytes()
    monkeypatch.setattr(voc, "VOC_URL", server.url("/voc.tar"))
    monkeypatch.setattr(voc, "VOC_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    other = tmp_path / "root/VOCdevkit/VOC2007/ImageSets/Segmentation/train.txt"
    other.parent.mkdir(parents=True)
    other.write_text("000032")
    dm = VOCDataModule(tmp_path / "root", augmented=False, download=True)
    dm.prepare_data()
    assert [len(dm.dataset(split)) for split in ("train", "val")] == [1, 1]
    assert other.read_text() == "000032"


def test_a_folder_in_the_way_is_named_before_any_download(server, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").write_text("mine")
    (tmp_path / "a").mkdir()  # an empty folder is not in the way
    archives = {tmp_path / name: Archive(server.url(f"/{name}.zip")) for name in "ab"}
    with pytest.raises(UserError, match=r"/b already exists; rename or delete it to unpack http.*/b\.zip there"):
        download_and_unpack(archives, tmp_path)
    assert server.requested == []
    server.bodies["/a.zip"] = pack(tmp_path / "x.zip", {"top/in/1.txt": b"1", "top/2.txt": b"2"}).read_bytes()
    download_and_unpack({tmp_path / "a": Archive(server.url("/a.zip"), inside="in")}, tmp_path)
    assert names(tmp_path / "a") == ["1.txt"]
    with pytest.raises(UserError, match="has no folder gone"):
        download_and_unpack({tmp_path / "c": Archive(server.url("/a.zip"), inside="gone")}, tmp_path)


@pytest.mark.parametrize(
    ("labels", "moves"),
    [
        ("stuff", {"images/train2017": "train2017", "images/val2017": "val2017"}),
        ("stuff", {"stuffthingmaps": "annotations"}),
        ("stuff", {"stuffthingmaps": "stuffthingmaps_trainval2017"}),
        ("panoptic", {"images/train2017": "train2017", "images/val2017": "val2017"}),
        ("stuff10k", {}),
    ],
)
def test_coco_is_not_downloaded_again_in_another_documented_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str, moves: dict[str, str]
) -> None:
    fake = {"stuff": fake_coco_stuff, "panoptic": fake_coco_panoptic, "stuff10k": fake_coco_stuff10k}[labels]
    root = fake(tmp_path, images=1)
    for old, new in moves.items():
        (root / old).rename(root / new)
        if old.startswith("images/"):
            (root / old).mkdir()  # empty
    monkeypatch.setattr(module, "download", lambda url, *_, **__: pytest.fail(f"downloads {url}"))
    dm = COCODataModule(root, labels=labels, download=True)
    dm.prepare_data()
    assert [len(dm.dataset(split)) for split in ("train", "val")] == [1, 1]


@pytest.mark.parametrize("labels", ["stuff", "panoptic", "stuff10k"])
def test_coco_is_downloaded_unpacked_and_read(
    server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str
) -> None:
    made = {"stuff": fake_coco_stuff, "panoptic": fake_coco_panoptic, "stuff10k": fake_coco_stuff10k}[labels](
        tmp_path / "made", images=2
    )
    sources = {f"{split}2017.zip": (made / "images" / f"{split}2017", f"{split}2017/") for split in ("train", "val")}
    if labels == "panoptic":  # zip files inside the zip file
        for split in ("train", "val"):
            folder = made / "annotations" / f"panoptic_{split}2017"
            pack_folder(folder.with_suffix(".zip"), folder, f"{folder.name}/")
            shutil.rmtree(folder)
    sources["stuffthingmaps_trainval2017.zip"] = (made / "stuffthingmaps", "")
    sources["panoptic_annotations_trainval2017.zip"] = (made / "annotations", "annotations/")
    sources["cocostuff-10k-v1.1.zip"] = (made, "")
    wanted = coco.ARCHIVES[labels]
    for url in wanted.values():
        name = url.rpartition("/")[2]
        server.bodies[f"/{name}"] = pack_folder(tmp_path / "x.zip", *sources[name]).read_bytes()
    urls = {folder: server.url("/" + url.rpartition("/")[2]) for folder, url in wanted.items()}
    monkeypatch.setitem(coco.ARCHIVES, labels, urls)
    dm = COCODataModule(tmp_path / "root", labels=labels, download=True)
    dm.prepare_data()
    assert [len(dm.dataset(split)) for split in ("train", "val")] == [2, 2]
    assert (dm.dataset("val")[1]["mask"] != 255).any()
    server.bodies.clear()
    dm.prepare_data()  # nothing is missing
    COCODataModule(tmp_path / "nowhere", labels=labels).prepare_data()  # download is off
    assert not (tmp_path / "nowhere").exists()
