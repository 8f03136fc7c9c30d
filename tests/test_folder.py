from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from early_fusion_seg.data.folder import FolderDataModule, fake_folder, validation_keys
from early_fusion_seg.errors import MissingFileError, UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def keys(dm: FolderDataModule, split: str) -> list[str]:
    dataset = dm.dataset(split)
    return [dataset.source.key(i) for i in range(len(dataset))]


def test_predict_uses_every_visible_file_below_the_root_sorted(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "a.png", "deep/er/c.tif", "deep/.hidden.png", ".cache/x.png", "Z.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(path)
    dm = FolderDataModule(tmp_path)
    assert keys(dm, "predict") == ["Z.webp", "a.jpg", "a.png", "b.png", "deep/er/c.tif"]
    np.testing.assert_array_equal(dm.dataset("predict")[2]["image"].permute(1, 2, 0), PIXELS)


def test_predict_reports_and_skips_files_that_are_not_images(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "b.png")
    (tmp_path / "a.mp4").write_text("a film")
    batches = list(FolderDataModule(tmp_path, num_workers=0).predict_dataloader())
    assert batches[0]["key"] == ["a.mp4"]
    assert "a.mp4 is not an image" in batches[0]["error"][0]
    assert "image" not in batches[0]
    assert batches[1]["image"].shape == (1, 3, 6, 8)


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"(?s)nowhere is not a folder.*labels\.csv.*any folder with images"):
        FolderDataModule(tmp_path / "nowhere").dataset("predict")
    with pytest.raises(MissingFileError, match=r"the predict split below .* has no images"):
        FolderDataModule(tmp_path).dataset("predict")


def test_label_csv_is_read_at_the_first_use(tmp_path: Path) -> None:
    dm = FolderDataModule(tmp_path)
    for name in ("class_names", "num_classes", "palette", "label_set"):
        with pytest.raises(MissingFileError, match=r"(?s)labels\.csv.*raw_id,train_id,name,color\n0,0,road"):
            getattr(dm, name)
    fake_folder(tmp_path)
    assert dm.class_names == ["ground", "plant", "sky"]
    (tmp_path / "labels.csv").rename(tmp_path / "other.csv")
    assert FolderDataModule(tmp_path, labels=tmp_path / "other.csv").palette[1] == [0, 160, 0]


def test_splits_in_folders(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=3)
    dm = FolderDataModule(tmp_path)
    assert keys(dm, "train") == keys(dm, "val") == ["000.jpg", "001.jpg", "002.jpg"]
    sample, raw = dm.dataset("val")[1], np.asarray(Image.open(tmp_path / "masks/val/001.png"))
    assert set(np.unique(raw)) == {1, 2, 5, 9}
    np.testing.assert_array_equal(sample["mask"], np.select([raw == 1, raw == 2, raw == 5], [0, 1, 2], 255))
    with pytest.raises(MissingFileError, match=r"(?s)images/test is not a folder.*images/train/a\.jpg"):
        dm.dataset("test")
    (tmp_path / "images/val").rename(tmp_path / "images/test")
    (tmp_path / "masks/val").rename(tmp_path / "masks/test")
    assert len(dm.dataset("test")) == 3
    with pytest.raises(MissingFileError, match="images/val is not a folder"):
        dm.dataset("val")


def test_splits_by_fraction_are_disjoint_complete_and_stable(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=10, splits=False)
    dm = FolderDataModule(tmp_path, val_fraction=0.3)
    train, val = keys(dm, "train"), keys(dm, "val")
    assert (len(train), len(val)) == (7, 3)
    assert sorted(train + val) == [f"{i:03}.jpg" for i in range(10)]
    assert val == ["000.jpg", "003.jpg", "009.jpg"]  # the three lowest values of sha256sum
    with pytest.raises(MissingFileError, match="no test split; expected images/test and masks/test"):
        dm.dataset("test")


def test_validation_keys_change_little_when_images_are_added() -> None:
    few, many = [f"{i}.png" for i in range(100)], [f"{i}.png" for i in range(110)]
    assert len(validation_keys(few, 0.2)) == 20
    assert len(validation_keys(few, 0.2) - validation_keys(many, 0.2)) <= 5
    assert len(validation_keys(["a", "b"], 0.01)) == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match="val_fraction is"):
        FolderDataModule("nowhere", val_fraction=fraction)


def test_errors_name_unpaired_files(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=2)
    dm = FolderDataModule(tmp_path)
    mask = tmp_path / "masks/train/001.png"
    mask.rename(tmp_path / "masks/train/spare.png")
    with pytest.raises(MissingFileError, match=r"images/train/001\.jpg has no mask; expected .*masks/train/001\.png"):
        dm.dataset("train")
    Image.open(tmp_path / "masks/train/spare.png").save(mask)
    with pytest.raises(MissingFileError, match=r"1 mask\(s\) have no image below .*spare\.png"):
        dm.dataset("train")
    Image.fromarray(PIXELS).save(tmp_path / "images/train/spare.jpg")
    Image.fromarray(PIXELS).save(tmp_path / "images/train/spare.png")
    with pytest.raises(UserError, match=r"spare\.jpg and .*spare\.png share the mask .*spare\.png"):
        dm.dataset("train")


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_missing_images_or_masks_show_the_expected_files(tmp_path: Path, folder: str) -> None:
    fake_folder(tmp_path, images=1)
    (tmp_path / folder).rename(tmp_path / "moved")
    with pytest.raises(MissingFileError, match=rf"(?s){folder} is not a folder.*masks/train/a\.png"):
        FolderDataModule(tmp_path).dataset("train")


def test_error_of_a_missing_mask_folder_names_the_first_mask(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=1)
    (tmp_path / "masks/val").rename(tmp_path / "masks/other")
    with pytest.raises(MissingFileError, match=r"images/val/000\.jpg has no mask; expected .*masks/val/000\.png"):
        FolderDataModule(tmp_path).dataset("val")


def test_subfolders_are_kept_in_keys_and_masks(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=2, splits=False)
    for kind, name in (("images", "000.jpg"), ("masks", "000.png")):
        (tmp_path / kind / "street").mkdir()
        (tmp_path / kind / name).rename(tmp_path / kind / "street" / name)
    dm = FolderDataModule(tmp_path, val_fraction=0.5)
    assert sorted(keys(dm, "train") + keys(dm, "val")) == ["001.jpg", "street/000.jpg"]
