import os
import unicodedata
import zipfile
from pathlib import Path

import pytest

from early_fusion_seg.data.listing import files_below, matched, walk
from early_fusion_seg.errors import MissingFileError, UserError

NFC = "caf\u00e9"
NFD = unicodedata.normalize("NFD", NFC)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def refuse_folder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make scandir refuse the folders of a name, also for root, who may read any folder."""
    scandir = os.scandir

    def refusing(folder):
        if str(folder).rpartition("/")[2] == name:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)


def test_walk_leaves_out_hidden_files_and_those_of_systems(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "deep/b.png", ".DS_Store", "._a.png", ".git/c.png", "Thumbs.db", "deep/Desktop.ini")
    touch(tmp_path, "__MACOSX/deep/b.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "lost+found/x.png", "Icon\r")
    assert sorted(walk(str(tmp_path))) == ["a.png", "deep/b.png"]


def test_walk_follows_links_to_folders_but_not_in_circles(tmp_path: Path) -> None:
    root, other = touch(tmp_path / "root", "a.png", "deep/b.png"), touch(tmp_path / "other", "c.png", "in/d.png")
    (root / "link").symlink_to(other)
    (root / "deep" / "up").symlink_to(root)
    (other / "in" / "up").symlink_to(other)
    (root / "self").symlink_to("self")
    (root / "lost.png").symlink_to("nowhere.png")
    expected = ["a.png", "deep/b.png", "link/c.png", "link/in/d.png", "lost.png", "self"]
    assert sorted(walk(str(root))) == expected


def test_walk_lists_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.png", "deep/locked/b.png")
    refuse_folder(monkeypatch, "locked")
    assert sorted(walk(str(tmp_path))) == ["a.png", "deep/locked/"]
    assert list(walk(str(tmp_path / "deep" / "locked"))) == ["."]
    with pytest.raises(UserError, match=r"the folder .*deep/locked/ cannot be read"):
        files_below(tmp_path, ".", ".png")


def test_special_files_are_left_out(tmp_path: Path) -> None:
    os.mkfifo(touch(tmp_path, "a.png") / "pipe.png")  # reading it would wait forever
    assert list(walk(str(tmp_path))) == ["a.png"]


@pytest.mark.parametrize("zipped", [False, True])
def test_keys_have_one_unicode_form_and_suffixes_any_case(tmp_path: Path, zipped: bool) -> None:
    names = [f"x/{NFD}.png", "x/b.PNG", "x/c.Png", "x/d.jpg"]
    if zipped:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for name in names:
                archive.writestr(name, "")
    else:
        touch(tmp_path, *names)
    found = files_below(tmp_path, "x", ".png", ["a.zip"])
    assert list(found) == ["b", "c", NFC]
    assert str(found[NFC]).endswith(f"/{NFD}.png")
    assert str(found["b"]).endswith("/b.PNG")


@pytest.mark.parametrize("other", ["a.PNG", f"{NFC}.png"])
def test_files_with_one_key_are_refused(tmp_path: Path, other: str) -> None:
    touch(tmp_path, "a.png", f"{NFD}.png", other)
    with pytest.raises(UserError, match=r"differ only in the case of \.png or in the Unicode form"):
        files_below(tmp_path, ".", ".png")


def test_missing_masks_are_counted_and_five_are_named() -> None:
    images = {str(i): f"{i}.jpg" for i in range(8)}
    with pytest.raises(MissingFileError, match=r"^7 image\(s\) have no mask: 1.jpg, .*, 5.jpg and 2 more; expected X"):
        matched(images, {"0": "0.png"}, "X")
