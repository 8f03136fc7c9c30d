import os
import shutil
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from early_fusion_seg import CityscapesDataModule, FolderDataModule, SyntheticDataModule
from early_fusion_seg.data import class_pixel_counts
from early_fusion_seg.data.cityscapes import fake_cityscapes
from early_fusion_seg.data.class_pixel_counts import cache_folder as real_cache_folder
from early_fusion_seg.data.dataset import FileSource
from early_fusion_seg.data.folder import fake_folder
from early_fusion_seg.errors import UserError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(class_pixel_counts, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets one entry per counting of masks."""
    calls: list[int] = []
    real = class_pixel_counts.count
    monkeypatch.setattr(class_pixel_counts, "count", lambda source, k: calls.append(k) or real(source, k))
    return calls


def by_hand(root: Path) -> np.ndarray:
    """Count the pixels of raw ids 1, 2 and 5, the classes of fake_folder, in its masks."""
    masks = [np.asarray(Image.open(path)) for path in sorted((root / "masks/train").iterdir())]
    return np.array([[(mask == raw_id).sum() for raw_id in (1, 2, 5)] for mask in masks])


def train(root: Path) -> FileSource:
    source = FolderDataModule(root).source("train")
    assert isinstance(source, FileSource)
    return source


def test_pixels_are_counted_per_image_and_class(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = fake_folder(tmp_path / "data", images=5)
    counts = class_pixel_counts.class_pixel_counts(train(root), 3)
    np.testing.assert_array_equal(counts, by_hand(root))
    assert counts.dtype == np.int64
    assert capsys.readouterr() == ("", "")  # no progress bar without a terminal
    scenes = SyntheticDataModule(size=(24, 32), train_scenes=2)  # not files, so not cached
    expected = [np.bincount(scenes.source("train").read(i)[1].ravel(), minlength=11) for i in range(2)]
    np.testing.assert_array_equal(class_pixel_counts.class_pixel_counts(scenes.source("train"), 11), expected)
    assert len(list(cache.iterdir())) == 1


def test_counts_are_cached_until_a_mask_changes(tmp_path: Path, cache: Path, counted: list[int]) -> None:
    root = fake_folder(tmp_path / "data", images=3)
    before = sorted(root.rglob("*"))
    first = class_pixel_counts.class_pixel_counts(train(root), 3)
    np.testing.assert_array_equal(class_pixel_counts.class_pixel_counts(train(root), 3), first)
    moved = Path(shutil.move(root, tmp_path / "moved"))
    np.testing.assert_array_equal(class_pixel_counts.class_pixel_counts(train(moved), 3), first)
    shutil.move(moved, root)
    assert len(counted) == 1
    assert sorted(root.rglob("*")) == before  # nothing is written to the data

    path = root / "masks/train/001.png"
    mask = np.asarray(Image.open(path)).copy()
    mask[:, ::2] = 5
    Image.fromarray(mask).save(path)
    os.utime(path, ns=(1, 1))
    changed = class_pixel_counts.class_pixel_counts(train(root), 3)
    np.testing.assert_array_equal(changed, by_hand(root))
    assert not np.array_equal(changed, first)
    os.utime(path, ns=(2, 2))
    class_pixel_counts.class_pixel_counts(train(root), 3)
    assert len(counted) == 3
    labels = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(labels.replace("1,0,", "1,9,").replace("2,1,", "2,0,").replace("1,9,", "1,1,"))
    class_pixel_counts.class_pixel_counts(train(root), 3)
    assert len(counted) == 4


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * (len(b) + 99), lambda b: b[:-30]]
)
def test_damaged_cache_file_is_replaced(damage, tmp_path: Path, cache: Path, counted: list[int]) -> None:
    root = fake_folder(tmp_path / "data", images=2)
    class_pixel_counts.class_pixel_counts(train(root), 3)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    for _ in range(2):
        np.testing.assert_array_equal(class_pixel_counts.class_pixel_counts(train(root), 3), by_hand(root))
    assert len(counted) == 2
    assert len(file.read_bytes()) == len(whole)


def test_counts_are_also_stored_in_the_folder_of_the_run(tmp_path: Path, cache: Path, counted: list[int]) -> None:
    root, run_file = fake_folder(tmp_path / "data", images=2), tmp_path / "run" / "class_pixel_counts.npz"
    class_pixel_counts.class_pixel_counts(train(root), 3, run_file)
    with np.load(run_file) as stored:
        np.testing.assert_array_equal(stored["counts"], by_hand(root))
    shutil.rmtree(cache)
    class_pixel_counts.class_pixel_counts(train(root), 3, run_file)
    assert len(counted) == 1
    other = fake_folder(tmp_path / "other", images=2, seed=9)  # same run folder, other data
    np.testing.assert_array_equal(class_pixel_counts.class_pixel_counts(train(other), 3, run_file), by_hand(other))
    with np.load(run_file) as stored:
        np.testing.assert_array_equal(stored["counts"], by_hand(other))


def test_without_a_cache_pixels_are_counted_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[int]
) -> None:
    root = fake_folder(tmp_path / "data", images=2)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        monkeypatch.setattr(class_pixel_counts, "cache_folder", lambda folder=folder: folder)
        np.testing.assert_array_equal(
            class_pixel_counts.class_pixel_counts(train(root), 3, folder / "run" / "x"), by_hand(root)
        )
    assert len(counted) == 2

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(class_pixel_counts, "cache_folder", no_home)
    assert class_pixel_counts.class_pixel_counts(train(root), 3).shape == (2, 3)


def test_only_one_of_several_simultaneous_callers_counts(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fake_folder(tmp_path / "data", images=2)
    everyone = threading.Barrier(3)
    calls: list[int] = []
    lock_file, real = class_pixel_counts._lock_file, class_pixel_counts.count

    def wait_then_lock(path: Path):
        everyone.wait(60)  # until all threads have found the cache empty
        return lock_file(path)

    monkeypatch.setattr(class_pixel_counts, "_lock_file", wait_then_lock)
    monkeypatch.setattr(class_pixel_counts, "count", lambda source, k: calls.append(k) or real(source, k))
    results: list[np.ndarray] = []
    call = lambda: results.append(class_pixel_counts.class_pixel_counts(train(root), 3))  # noqa: E731  # used once, in threads
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(results) == 3
    for counts in results:
        np.testing.assert_array_equal(counts, by_hand(root))


def test_error_names_the_damaged_mask(tmp_path: Path, cache: Path) -> None:
    root = fake_folder(tmp_path / "data", images=3)
    (root / "masks/train/001.png").write_bytes(b"no image")
    source = train(root)
    with pytest.raises(UserError, match=r"masks/train/001\.png"):
        class_pixel_counts.class_pixel_counts(source, 3)
    (root / "masks/train/001.png").unlink()
    with pytest.raises(UserError, match=r"masks/train/001\.png"):
        class_pixel_counts.class_pixel_counts(source, 3)


def test_masks_in_zip_files_give_the_same_counts(tmp_path: Path, cache: Path, counted: list[int]) -> None:
    root = fake_cityscapes(tmp_path / "folders", images=2)
    (zipped := tmp_path / "zipped").mkdir()
    for folder, name in (("leftImg8bit", "leftImg8bit_trainvaltest.zip"), ("gtFine", "gtFine_trainvaltest.zip")):
        with zipfile.ZipFile(zipped / name, "w") as archive:
            for path in (root / folder).rglob("*.png"):
                archive.write(path, path.relative_to(root).as_posix())
    folders, zips = (CityscapesDataModule(place).class_pixel_counts() for place in (root, zipped))
    np.testing.assert_array_equal(folders, zips)
    assert folders.shape == (2, 19)
    assert len(counted) == 2
    CityscapesDataModule(zipped).class_pixel_counts()
    assert len(counted) == 2


def test_cache_folder_follows_xdg_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert real_cache_folder() == tmp_path / "early_fusion_seg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert real_cache_folder() == tmp_path / "me" / ".cache" / "early_fusion_seg"
