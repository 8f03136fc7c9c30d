import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import SAMPLES, needs_samples
from scipy.io import loadmat

from early_fusion_seg import COCODataModule
from early_fusion_seg.data.coco.replica import fake_coco_panoptic, fake_coco_stuff, fake_coco_stuff10k
from early_fusion_seg.errors import MissingFileError, UserError

UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # COCO ids that no image has, from the README of cocostuff


def stuff_class(coco_id: int) -> int:
    """Return the class of a COCO category id: its position among the ids 1..182 that occur."""
    return 255 if coco_id in UNUSED or not 1 <= coco_id <= 182 else coco_id - 1 - sum(n < coco_id for n in UNUSED)


@pytest.fixture(scope="module")
def panoptic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_coco_panoptic(tmp_path_factory.mktemp("data") / "panoptic", images=3)


def test_classes_and_rules_need_no_files() -> None:
    dm = COCODataModule("nowhere")
    assert (dm.num_classes, dm.absent, dm.pred_void) == (171, "gt-only", "fn")
    assert dm.class_names[:2] == ["person", "bicycle"]
    assert dm.class_names[-1] == "wood"
    assert "ceiling-other" in dm.class_names
    dm = COCODataModule("nowhere", labels="panoptic")
    assert (dm.num_classes, dm.class_names[79], dm.class_names[80]) == (133, "toothbrush", "banner")


@pytest.mark.parametrize("folder", ["stuffthingmaps", "annotations"])
@pytest.mark.parametrize("images", ["images/train2017", "train2017"])
def test_stuffthingmaps_have_category_id_minus_one(tmp_path: Path, folder: str, images: str) -> None:
    fake_coco_stuff(tmp_path, images=2)
    (tmp_path / "stuffthingmaps").rename(tmp_path / folder)
    if images == "train2017":
        (tmp_path / "images/train2017").rename(tmp_path / "train2017")
    dm = COCODataModule(tmp_path, train_transform=lambda **data: data)
    sample = dm.dataset("train")[1]
    stored = np.asarray(Image.open(tmp_path / folder / "train2017/000000000001.png"))
    np.testing.assert_array_equal(sample["mask"], [[stuff_class(v + 1) for v in row] for row in stored.tolist()])
    assert sample["key"] == "000000000001"
    assert dm.dataset("predict")[0].keys() == {"key", "image"}


def test_every_number_in_stuffthingmaps() -> None:
    label_set = COCODataModule("nowhere").label_set
    numbers = np.array([*range(182), 255])
    assert label_set.encode(numbers, "x").tolist() == [stuff_class(n + 1) for n in numbers]
    with pytest.raises(UserError, match="x holds the label 182"):
        label_set.encode(np.array([182]), "x")


def test_10k_has_the_same_classes_with_other_numbers(tmp_path: Path) -> None:
    fake_coco_stuff10k(tmp_path, images=2)
    dm = COCODataModule(tmp_path, labels="stuff10k", train_transform=lambda **data: data)
    assert dm.class_names == COCODataModule(tmp_path).class_names
    sample = dm.dataset("train")[1]
    stored = loadmat(tmp_path / "annotations/COCO_train2014_000000000001.mat")["S"]
    np.testing.assert_array_equal(sample["mask"], [[stuff_class(v) for v in row] for row in stored.tolist()])
    assert dm.label_set.encode(np.arange(183), "x").tolist() == [stuff_class(n) for n in range(183)]
    assert [dm.dataset(split)[0]["key"][-1] for split in ("val", "test", "predict")] == ["2", "2", "2"]
    assert dm.dataset("test").source.labeled
    assert "mask" not in dm.dataset("predict")[0]
    parent = COCODataModule(tmp_path.parent, labels="stuff10k")
    tmp_path.rename(tmp_path.parent / "cocostuff-10k-v1.1")
    assert len(parent.dataset("val")) == 2


def test_panoptic_segments_are_mapped_to_their_categories(panoptic: Path) -> None:
    dm = COCODataModule(panoptic, labels="panoptic")
    dataset = dm.dataset("val")
    content = json.loads((panoptic / "annotations/panoptic_val2017.json").read_text())
    assert any(segment["iscrowd"] for segment in content["annotations"][1]["segments_info"])
    categories = [row["id"] for row in _categories()]
    pixels = np.asarray(Image.open(panoptic / "annotations/panoptic_val2017/000000000001.png")).astype(int)
    ids = pixels @ (1, 256, 65536)
    expected = np.full(ids.shape, 255)
    for segment in content["annotations"][1]["segments_info"]:
        expected[ids == segment["id"]] = categories.index(segment["category_id"])
    assert (expected == 255).any()
    np.testing.assert_array_equal(dataset[1]["mask"], expected)


def _categories() -> list[dict[str, int]]:
    """Return the ids of panoptic_coco_categories.json: things up to 90 and stuff up to 200, with gaps."""
    things = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    stuff = [92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151,
             154, 155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, *range(184, 201)]  # fmt: skip
    return [{"id": i} for i in things + stuff]


def test_errors_name_files_that_do_not_match(tmp_path: Path) -> None:
    fake_coco_panoptic(tmp_path, images=2)
    dm = COCODataModule(tmp_path, labels="panoptic")
    path = tmp_path / "annotations/panoptic_val2017.json"
    content = json.loads(path.read_text())
    dropped = content["annotations"][0]["segments_info"].pop()["id"]
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=rf"000000000000.png has a segment {dropped} that .*panoptic_val2017.json does not"
    ):
        dm.dataset("val")[0]
    content["annotations"][1]["file_name"] = "000000000777.png"
    path.write_text(json.dumps(content))
    with pytest.raises(
        MissingFileError, match=r"lists 1 image\(s\) not in val2017/, such as 000000000777.jpg; .* val2017.zip again"
    ):
        dm.dataset("val")
    path.write_text("{}")
    with pytest.raises(
        UserError, match=r"panoptic_val2017.json is not a panoptic JSON.*panoptic_annotations.*zip again"
    ):
        dm.dataset("val")
    (tmp_path / "annotations/panoptic_train2017/000000000001.png").unlink()
    with pytest.raises(
        MissingFileError,
        match=r"000000000001.jpg; expected .*panoptic_train2017/\*.png; .*panoptic_annotations.*zip again",
    ):
        dm.dataset("train")


def test_errors_name_missing_files(tmp_path: Path) -> None:
    for labels, word in (("stuff", "stuffthingmaps_trainval2017.zip"), ("panoptic", "panoptic_annotations"),
                         ("stuff10k", "cocostuff-10k-v1.1.zip")):  # fmt: skip
        with pytest.raises(MissingFileError, match=rf"(?s)nowhere does not hold COCO's.*{word}"):
            COCODataModule("nowhere", labels=labels).dataset("train")
    fake_coco_stuff(tmp_path, images=1)
    with pytest.raises(MissingFileError, match=r"panoptic_val2017.json"):
        COCODataModule(tmp_path, labels="panoptic").dataset("val")
    for path in (tmp_path / "stuffthingmaps/val2017").iterdir():
        path.unlink()
    with pytest.raises(MissingFileError, match=r"masks .*stuffthingmaps/val2017"):
        COCODataModule(tmp_path).dataset("val")
    fake_coco_stuff10k(tmp_path / "10k", images=1)
    mat = tmp_path / "10k/annotations/COCO_train2014_000000000000.mat"
    dataset = COCODataModule(tmp_path / "10k", labels="stuff10k").dataset("train")
    mat.write_bytes(mat.read_bytes()[:150])
    with pytest.raises(UserError, match=r"COCO_train2014_000000000000.mat is damaged"):
        dataset[0]
    mat.unlink()
    with pytest.raises(MissingFileError, match=r"there is no file .*COCO_train2014_000000000000.mat"):
        dataset[0]
    (tmp_path / "10k/imageLists/train.txt").unlink()
    with pytest.raises(MissingFileError, match=r"there is no list .*train.txt; .*cocostuff-10k-v1.1.zip again"):
        COCODataModule(tmp_path / "10k", labels="stuff10k").dataset("train")
    with pytest.raises(UserError, match="expected one of"):
        COCODataModule(tmp_path, labels="things")


@needs_samples
def test_real_files() -> None:
    dm = COCODataModule(SAMPLES / "coco", labels="panoptic")
    dataset = dm.dataset("val")
    content = json.loads((SAMPLES / "coco/annotations/panoptic_val2017.json").read_text())
    categories = json.loads((SAMPLES / "coco/panoptic_coco_categories.json").read_text())
    assert dm.class_names == [category["name"] for category in categories]
    assert dm.palette == [category["color"] for category in categories]
    position = {category["id"]: i for i, category in enumerate(categories)}
    for i in range(2):
        sample = dataset[i]
        segments = next(a for a in content["annotations"] if a["file_name"] == f"{sample['key']}.png")["segments_info"]
        for class_id in {position[s["category_id"]] for s in segments}:
            area = sum(s["area"] for s in segments if position[s["category_id"]] == class_id)
            assert int((sample["mask"] == class_id).sum()) == area
        assert int((sample["mask"] != 255).sum()) == sum(s["area"] for s in segments)
    names = (SAMPLES / "coco/cocostuff_labels.txt").read_text().splitlines()
    by_id = {int(line.split(": ")[0]): line.split(": ")[1] for line in names}
    stuff = COCODataModule(SAMPLES / "coco")
    assert stuff.class_names == [by_id[i] for i in range(1, 183) if i not in UNUSED]
