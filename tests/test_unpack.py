import shutil
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from archives import pack

from early_fusion_seg.errors import UserError
from early_fusion_seg.io.unpack import unpack

NOISE = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
SUFFIXES = ("zip", "tar", "tgz")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    archive = pack(tmp_path / f"a.{suffix}", {"a": NOISE})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    with pytest.raises(UserError, match="has 2 MB free; 3 MB are needed"):
        unpack(archive, tmp_path / "out")
    assert names(tmp_path) == [archive.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("top", ["", "top/"])
def test_archive_is_unpacked_without_its_single_top_folder(tmp_path: Path, top: str, suffix: str) -> None:
    files = {f"{top}a.png": b"1", f"{top}deep/b.png": b"22", "__MACOSX/._a.png": b"junk"}
    archive = pack(tmp_path / f"a.{suffix}", files)
    if suffix == "zip":
        with zipfile.ZipFile(archive, "a") as opened:
            opened.mkdir(f"{top}empty")
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "stale").write_text("left by an interrupted attempt")
    unpack(archive, tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"a.png", "deep/b.png"}
    assert (tmp_path / "out/deep/b.png").read_bytes() == b"22"
    assert names(tmp_path) == [archive.name, "out"]
    with pytest.raises(UserError, match="out already exists"):
        unpack(archive, tmp_path / "out")


def test_single_file_is_unpacked(tmp_path: Path) -> None:
    unpack(pack(tmp_path / "a.zip", {"a.png": b"1"}), tmp_path / "out")
    assert (tmp_path / "out/a.png").read_bytes() == b"1"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "..\\x", "C:\\x", "C:x", "\\\\host\\share\\x"])
def test_archive_with_a_path_outside_the_folder_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    archive = pack(folder / f"a.{suffix}", {"good": b"1", name: b"2"})
    with pytest.raises(UserError, match="a path outside the folder; it is not unpacked"):
        unpack(archive, folder / "out")
    assert names(folder) == [archive.name]
    assert names(tmp_path) == ["deep"]


@pytest.mark.parametrize("mode", [0o120777, 0o020666])
def test_links_and_devices_are_refused(tmp_path: Path, mode: int) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = mode << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc")
        archive.writestr("link/x", "1")
    with pytest.raises(UserError, match="'link', a link or an encrypted file"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert names(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tar_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="'link', a link or an encrypted file"):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert names(tmp_path) == ["a.tar"]


def test_encrypted_archive_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", {"a": b"1"})
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(data)
    with pytest.raises(UserError, match="a link or an encrypted file"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["zip", "tgz"])
def test_zip_bombs_and_empty_archives_are_refused(tmp_path: Path, suffix: str) -> None:
    bomb = pack(tmp_path / f"a.{suffix}", {"a": bytes(20_000_000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="would unpack to 20000000; it is empty or a zip bomb"):
        unpack(bomb, tmp_path / "out")
    with pytest.raises(UserError, match="would unpack to 0"):
        unpack(pack(tmp_path / f"b.{suffix}", {}), tmp_path / "out")


def test_zip_bomb_with_a_wrong_size_writes_no_more_than_that_size(tmp_path: Path) -> None:
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
    data = bytearray(pack(tmp_path / "a.zip", {"a": NOISE[:5000]}, zipfile.ZIP_DEFLATED).read_bytes())
    data[2000] ^= 255
    (tmp_path / "a.zip").write_bytes({"text": b"no zip", "cut": bytes(data[:3000]), "byte": bytes(data)}[damage])
    with pytest.raises(UserError, match=r"a\.zip is damaged .*delete it and download it again"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["tar", "tgz"])
def test_truncated_tar_file_is_refused(tmp_path: Path, suffix: str) -> None:
    archive = pack(tmp_path / f"a.{suffix}", {"a": NOISE[:50_000], "b": NOISE[:50_000]})
    archive.write_bytes(archive.read_bytes()[:70_000])
    with pytest.raises(UserError, match=r"is damaged .*delete it and download it again"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
