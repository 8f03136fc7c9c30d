import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_listing import refuse_folder

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
        FolderDataModule(tmp_path / "nowhere").dataset("train")
    with pytest.raises(MissingFileError, match=r"no images at .*nowhere; expected a folder of images, an image, a pat"):
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


def test_numbers_from_torch_are_taken(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=10, splits=False)
    numbers = {"val_fraction": 0.3, "short_side": 20, "random_scale": [0.5, 1.0]}
    tensors = {name: torch.tensor(value) for name, value in numbers.items()}
    plain, given = (FolderDataModule(tmp_path, crop_size=16, **options) for options in (numbers, tensors))
    assert keys(given, "val") == keys(plain, "val")
    assert next(iter(given.train_dataloader()))["image"].shape[2:] == (16, 16)


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


def move(root: Path, old: str, new: str) -> None:
    for kind in ("images", "masks"):
        (root / kind / old).rename(root / kind / new)


@pytest.mark.parametrize(
    ("train", "val"), [("training", "validation"), ("Train", "Val"), ("TRAIN", "valid"), ("train", "Valid")]
)
def test_other_names_of_split_folders_are_known(tmp_path: Path, train: str, val: str) -> None:
    fake_folder(tmp_path, images=2)
    move(tmp_path, "train", train)
    (tmp_path / "images/val").rename(tmp_path / "images" / val)  # masks/val keeps its name
    for split, folder in (("train", train), ("val", val)):
        items = FolderDataModule(tmp_path).source(split).items
        assert [item.image for item in items] == [tmp_path / "images" / folder / f"{i:03}.jpg" for i in range(2)]


@pytest.mark.parametrize("test", ["test", "Test", "testing"])
def test_images_of_a_test_folder_are_in_no_other_split(tmp_path: Path, test: str) -> None:
    fake_folder(tmp_path, images=10, splits=False)
    before = {split: keys(FolderDataModule(tmp_path), split) for split in ("train", "val")}
    fake_folder(tmp_path / "more", images=3, splits=False)
    for kind in ("images", "masks"):
        (tmp_path / "more" / kind).rename(tmp_path / kind / test)
    dm = FolderDataModule(tmp_path)
    assert {split: keys(dm, split) for split in ("train", "val")} == before
    assert keys(dm, "test") == ["000.jpg", "001.jpg", "002.jpg"]


@pytest.mark.parametrize(
    "name",
    [
        *("train2017", "val_2", "test-set", "dev", "my.test", "street/test", "street/Valid/1"),
        *("trainset", "TestImages", "val_data", "hold-out", "hold_out", "holdout", "tst"),
    ],
)
def test_folders_that_look_like_splits_are_not_mixed(tmp_path: Path, name: str) -> None:
    fake_folder(tmp_path, images=2, splits=False)
    fake_folder(tmp_path / "more", images=2, splits=False)
    for kind in ("images", "masks"):
        (tmp_path / kind / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "more" / kind).rename(tmp_path / kind / name)
    with pytest.raises(UserError, match=rf"images has folders that look like splits: {name}\. Name the folders"):
        FolderDataModule(tmp_path).source("train")


def test_folders_with_other_names_are_no_splits(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=1, splits=False)
    for name in ("valley", "trains", "contest", "evaluated", "testudo"):
        for kind in ("images", "masks"):
            for path in (tmp_path / kind).glob("*.*"):
                (tmp_path / kind / name).mkdir()
                (tmp_path / kind / name / path.name).write_bytes(path.read_bytes())
    assert len(keys(FolderDataModule(tmp_path), "train") + keys(FolderDataModule(tmp_path), "val")) == 6


@pytest.mark.parametrize("beside", ["images/a.jpg", "images/street/a.jpg"])
def test_images_beside_the_folders_of_splits_are_refused(tmp_path: Path, beside: str) -> None:
    fake_folder(tmp_path, images=1)
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    Image.fromarray(PIXELS).save(tmp_path / beside)
    with pytest.raises(UserError, match=r"folders of splits \(train, val\), and 1 file\(s\) outside of them: .*a\.jpg"):
        FolderDataModule(tmp_path).source("train")


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=1)
    (tmp_path / "images/training").mkdir()
    with pytest.raises(UserError, match=r"images/train and .*images/training are both folders of the train split"):
        FolderDataModule(tmp_path).source("val")


def test_linked_folders_are_used(tmp_path: Path) -> None:
    root = fake_folder(tmp_path / "data", images=2, splits=False)
    fake_folder(tmp_path / "more", images=3, splits=False)
    for kind in ("images", "masks"):
        (root / kind / "more").symlink_to(tmp_path / "more" / kind)
    dm = FolderDataModule(root)
    assert len(keys(dm, "train") + keys(dm, "val")) == 5
    assert len(keys(FolderDataModule(root / "images"), "predict")) == 5


def test_what_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "b.png")
    (tmp_path / "locked").mkdir()
    (tmp_path / "lost").symlink_to("nowhere")
    refuse_folder(monkeypatch, "locked")
    batches = list(FolderDataModule(tmp_path, num_workers=0).predict_dataloader())
    errors = [batch["error"][0] for batch in batches if "error" in batch]
    assert len(batches) == 3
    assert "the folder" in errors[0]
    assert "locked cannot be read (Permission denied)" in errors[0]
    assert "lost is a link to nowhere, which does not exist" in errors[1]


def test_files_of_systems_and_tools_are_passed_over(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=5, splits=False)
    names = (
        "Thumbs.db",
        "desktop.ini",
        ".DS_Store",
        "000.json",
        "001.txt",
        "002.XML",
        "classes.txt",
        "a.yaml",
        "000.TFW",
    )
    for name in names:
        (tmp_path / "images" / name).write_text("x")
        (tmp_path / "masks" / name).write_text("x")
    dm = FolderDataModule(tmp_path)
    assert len(keys(dm, "train") + keys(dm, "val")) == 5
    assert keys(FolderDataModule(tmp_path / "images"), "predict") == [f"{i:03}.jpg" for i in range(5)]


def test_files_that_are_no_images_are_named_together(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=2, splits=False)
    for name in ("000.mp4", "notes.docx"):  # one beside its image, one alone
        (tmp_path / "images" / name).write_text("x")
    with pytest.raises(UserError, match=r"^2 file\(s\) below .*images are not images: .*000\.mp4, .*notes\.docx; move"):
        FolderDataModule(tmp_path).source("train")


def test_an_image_without_a_known_suffix_is_used(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=2, splits=False)
    (tmp_path / "images/000.jpg").rename(tmp_path / "images/000.img")
    dm = FolderDataModule(tmp_path)
    assert sorted(keys(dm, "train") + keys(dm, "val")) == ["000.img", "001.jpg"]


def test_missing_masks_are_counted_and_similar_names_shown(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=8, splits=False)
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_suffix(".tif"))
    text = r"^8 images below .* have no mask: 000\.jpg, .*, 004\.jpg and 3 more; expected .*000\.png; .*\.tif is there"
    with pytest.raises(MissingFileError, match=text):
        FolderDataModule(tmp_path).source("train")
    (tmp_path / "images").rename(tmp_path / "kept")
    fake_folder(tmp_path, images=1, splits=False)
    (tmp_path / "masks/000.tif").unlink()
    (tmp_path / "masks/000.png").rename(tmp_path / "masks/A.png")
    (tmp_path / "images/000.jpg").rename(tmp_path / "images/a.jpg")
    with pytest.raises(MissingFileError, match=r"a\.jpg has no mask; expected .*a\.png; .*masks/A\.png is there"):
        FolderDataModule(tmp_path).source("train")


@pytest.mark.parametrize("images_form", ["NFC", "NFD"])
def test_names_match_in_either_unicode_form_and_case_of_the_suffix(tmp_path: Path, images_form: str) -> None:
    masks_form = {"NFC": "NFD", "NFD": "NFC"}[images_form]
    fake_folder(tmp_path, images=3, splits=False)
    for i in range(3):
        name = f"caf\u00e9{i}"
        image, mask = unicodedata.normalize(images_form, name), unicodedata.normalize(masks_form, name)
        (tmp_path / f"images/{i:03}.jpg").rename(tmp_path / f"images/{image}.JPG")
        (tmp_path / f"masks/{i:03}.png").rename(tmp_path / f"masks/{mask}.PNG")
    dm = FolderDataModule(tmp_path)
    assert sorted(keys(dm, "train") + keys(dm, "val")) == [f"caf\u00e9{i}.JPG" for i in range(3)]
    assert dm.dataset("train")[0]["mask"].shape == (36, 48)


def test_names_that_differ_in_the_unicode_form_are_both_predicted(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD")]
    for name in names:
        Image.fromarray(PIXELS).save(tmp_path / name)
    source = FolderDataModule(tmp_path).source("predict")
    assert sorted(item.image.name for item in source.items) == sorted(names)
    assert len({item.key for item in source.items}) == 2


def test_names_that_are_not_utf8_are_split(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=4, splits=False)
    for path in (tmp_path / "images/000.jpg", tmp_path / "masks/000.png"):
        path.rename(path.with_stem(os.fsdecode(b"caf\xe9")))
    dm = FolderDataModule(tmp_path)
    assert sorted(keys(dm, "train") + keys(dm, "val")) == ["001.jpg", "002.jpg", "003.jpg", "caf\udce9.jpg"]
