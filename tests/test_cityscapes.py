import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import SAMPLES, needs_samples

from early_fusion_seg import CityscapesDataModule
from early_fusion_seg.data.cityscapes import fake_cityscapes
from early_fusion_seg.errors import MissingFileError, UserError

EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # cityscapesScripts, labels.py


def to_train_ids(ids: np.ndarray) -> np.ndarray:
    """Convert pixel by pixel, without a label set of this package."""
    return np.array([[EVALUATED.index(i) if i in EVALUATED else 255 for i in row] for row in ids.tolist()])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cityscapes(tmp_path_factory.mktemp("data") / "cityscapes", images=2)


def test_classes_and_rules_need_no_files() -> None:
    dm = CityscapesDataModule("nowhere")
    assert dm.class_names[:2] == ["road", "sidewalk"]
    assert (dm.num_classes, dm.palette[0], dm.absent, dm.pred_void) == (19, [128, 64, 128], "nan-skip", "fn")


def test_ids_are_mapped_to_train_ids(root: Path) -> None:
    sample = CityscapesDataModule(root).dataset("val")[1]
    stem = root / "gtFine/val/frankfurt" / "frankfurt_000001_000019_gtFine"
    ids = np.asarray(Image.open(f"{stem}_labelIds.png"))
    assert sample["key"] == "frankfurt_000001_000019"
    np.testing.assert_array_equal(sample["mask"], to_train_ids(ids))
    image = Image.open(root / "leftImg8bit/val/frankfurt/frankfurt_000001_000019_leftImg8bit.png")
    np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), image)
    by_train_id = CityscapesDataModule(root, labels="labelTrainIds").dataset("val")[1]
    np.testing.assert_array_equal(by_train_id["mask"], sample["mask"])


@pytest.mark.parametrize(
    ("train_split", "first", "count"),
    [
        ("train", "aachen_000000_000019", 2),
        ("train_extra", "augsburg_000000_000019", 2),
        ("train+train_extra", "aachen_000000_000019", 4),
        ("train+val", "aachen_000000_000019", 4),
    ],
)
def test_train_splits(root: Path, train_split: str, first: str, count: int) -> None:
    dataset = CityscapesDataModule(root, train_split=train_split).dataset("train")
    assert len(dataset) == len({dataset.source.key(i) for i in range(count)}) == count
    assert dataset.source.key(0) == first
    assert all("mask" in dataset[i] for i in range(count))


def test_zip_files_give_the_same_samples_as_folders(root: Path, tmp_path: Path) -> None:
    fake_cityscapes(tmp_path, images=2, zipped=True)
    assert not (tmp_path / "gtFine").exists()
    for train_split in ("train", "train+train_extra"):
        for split in ("train", "val", "predict"):
            plain = CityscapesDataModule(root, train_split=train_split, num_workers=0).dataset(split)
            zipped = CityscapesDataModule(tmp_path, train_split=train_split, num_workers=0).dataset(split)
            assert len(plain) == len(zipped)
            for i in range(len(plain)):
                a, b = plain[0, i], zipped[0, i]
                assert a.keys() == b.keys()
                assert a["key"] == b["key"]
                np.testing.assert_array_equal(a["image"], b["image"])
                np.testing.assert_array_equal(a.get("mask", 0), b.get("mask", 0))


def test_workers_read_the_same_zip_file_in_parallel(tmp_path: Path) -> None:
    fake_cityscapes(tmp_path, images=6, zipped=True)
    dm = CityscapesDataModule(tmp_path, num_workers=2)
    dataset = dm.dataset("val")
    first = dataset[0]  # the archive is open before the workers start
    batches = list(dm.val_dataloader())
    assert [b["key"][0] for b in batches] == [dataset.source.key(i) for i in range(6)]
    np.testing.assert_array_equal(batches[0]["image"][0], first["image"])
    for i, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["mask"][0], dataset[i]["mask"])


def test_test_split_has_no_labels_although_its_folder_has_masks(root: Path) -> None:
    assert list((root / "gtFine/test").rglob("*_labelIds.png"))
    dm = CityscapesDataModule(root, num_workers=0)
    for split in ("test", "predict"):
        dataset = dm.dataset(split)
        assert [dataset[i].keys() for i in range(2)] == [{"key", "image"}] * 2
    with pytest.raises(UserError, match="test split has no labels to score"):
        dm.test_dataloader()


def test_errors_name_missing_files(root: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"(?s)nowhere holds no images.*csDownload"):
        CityscapesDataModule("nowhere").dataset("train")
    fake_cityscapes(tmp_path, images=2)
    for path in (tmp_path / "gtFine").rglob("aachen_000001*_labelTrainIds.png"):
        path.unlink()
    with pytest.raises(
        MissingFileError, match=r"1 image.*aachen_000001_000019_leftImg8bit.png.*csCreateTrainIdLabelImgs"
    ):
        CityscapesDataModule(tmp_path, labels="labelTrainIds").dataset("train")
    for wrong in ({"labels": "color"}, {"train_split": "test"}):
        with pytest.raises(UserError, match="expected one of"):
            CityscapesDataModule(root, **wrong)


def test_errors_name_unknown_ids_and_damaged_zip_files(tmp_path: Path) -> None:
    fake_cityscapes(tmp_path / "a", images=1)
    mask = tmp_path / "a/gtFine/val/frankfurt/frankfurt_000000_000019_gtFine_labelIds.png"
    Image.fromarray(np.full((64, 128), 34, np.uint8)).save(mask)
    with pytest.raises(UserError, match=r"frankfurt_000000_000019_gtFine_labelIds.png holds the label 34"):
        CityscapesDataModule(tmp_path / "a").dataset("val")[0]
    fake_cityscapes(tmp_path / "b", images=1, zipped=True)
    archive = tmp_path / "b/leftImg8bit_trainvaltest.zip"
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(
        UserError, match=r"leftImg8bit_trainvaltest.zip cannot be read as a zip file.*download it again"
    ):
        CityscapesDataModule(tmp_path / "b").dataset("val")
    fake_cityscapes(tmp_path / "c", images=1, zipped=True)
    with zipfile.ZipFile(tmp_path / "c/gtFine_trainvaltest.zip") as opened:
        offset = opened.getinfo("gtFine/val/frankfurt/frankfurt_000000_000019_gtFine_labelIds.png").header_offset
    content = bytearray((tmp_path / "c/gtFine_trainvaltest.zip").read_bytes())
    content[offset + 200] ^= 255
    (tmp_path / "c/gtFine_trainvaltest.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"frankfurt_000000_000019_gtFine_labelIds.png.*(damaged|cannot be read)"):
        CityscapesDataModule(tmp_path / "c").dataset("val")[0]


@needs_samples
def test_real_files() -> None:
    dm = CityscapesDataModule(SAMPLES / "cityscapes_256x128")
    dataset = dm.dataset("val")
    sample = dataset[0]
    stem = "gtFine/val/frankfurt/frankfurt_000000_000294_gtFine"
    instances = np.asarray(Image.open(SAMPLES / "cityscapes_256x128" / f"{stem}_instanceIds.png")).astype(int)
    ids = np.where(instances >= 1000, instances // 1000, instances)
    np.testing.assert_array_equal(sample["mask"], to_train_ids(ids))
