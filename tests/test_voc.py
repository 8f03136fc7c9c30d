import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import SAMPLES, needs_samples
from scipy.io import loadmat

from early_fusion_seg import VOCDataModule
from early_fusion_seg.data.voc import fake_voc, read_ids
from early_fusion_seg.errors import MissingFileError, UserError

VOC = "VOCdevkit/VOC2012"


@pytest.fixture(scope="module")
def sbd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_voc(tmp_path_factory.mktemp("data") / "voc", images=2)


def keys(dm: VOCDataModule, split: str) -> list[str]:
    source = dm.dataset(split).source
    return [source.key(i) for i in range(len(source))]


def plain(root: Path, **options) -> VOCDataModule:
    return VOCDataModule(root, train_transform=lambda **data: data, **options)


def test_classes_and_rules_need_no_files() -> None:
    dm = VOCDataModule("nowhere")
    assert (dm.num_classes, dm.class_names[0], dm.class_names[-1]) == (21, "background", "tvmonitor")
    assert (dm.palette[15], dm.rules) == ([192, 128, 128], ("strict-nan", "error"))


@pytest.mark.parametrize("parent", ["VOCdevkit/VOC2012", "VOC2012", "."])
def test_splits_and_masks(tmp_path: Path, parent: str) -> None:
    fake_voc(tmp_path, images=2, extra="none")
    if parent == "VOC2012":
        (tmp_path / VOC).rename(tmp_path / parent)
    dm = plain(tmp_path / VOC if parent == "." else tmp_path, augmented=False)
    assert keys(dm, "train") == ["2007_000000", "2007_000001"]
    assert keys(dm, "val") == ["2008_000000", "2008_000001"]
    assert keys(dm, "test") == keys(dm, "predict") == ["2009_000000", "2009_000001"]
    assert keys(plain(dm.root, augmented=False, train_split="trainval"), "train") == keys(dm, "train") + keys(dm, "val")
    folder = next(tmp_path.rglob("SegmentationClass"))
    for split in ("train", "val"):
        sample = dm.dataset(split)[1]
        stored = Image.open(folder / f"{sample['key']}.png")
        assert stored.mode == "P"
        np.testing.assert_array_equal(sample["mask"], stored)
    with pytest.raises(UserError, match="no labels to score"):
        dm.test_dataloader()


@pytest.mark.parametrize("extra", ["sbd", "aug", "aug_only"])
def test_augmented_training_has_no_validation_image(tmp_path: Path, extra: str) -> None:
    fake_voc(tmp_path, images=2, extra=extra)
    dm = plain(tmp_path)
    assert keys(dm, "train") == ["2007_000000", "2007_000001", "2010_000000", "2010_000001"]
    assert keys(plain(tmp_path, train_split="trainval"), "train") == sorted(keys(dm, "train") + keys(dm, "val"))
    own, added = dm.dataset("train")[1], dm.dataset("train")[3]
    official = np.asarray(Image.open(tmp_path / VOC / "SegmentationClass/2007_000001.png"))
    assert (official == 255).any()  # SBD has no void, so this is the mask of VOC
    np.testing.assert_array_equal(own["mask"], official)
    if extra == "sbd":
        content = loadmat(tmp_path / "benchmark_RELEASE/dataset/cls/2010_000001.mat")
        stored = content["GTcls"][0]["Segmentation"][0]  # as torchvision's SBDataset reads it
    else:
        stored = np.asarray(Image.open(tmp_path / VOC / "SegmentationClassAug/2010_000001.png"))
    np.testing.assert_array_equal(added["mask"], stored)


def test_lists_in_the_format_of_deeplab(sbd: Path, tmp_path: Path) -> None:
    root = shutil.copytree(sbd, tmp_path / "voc")
    listing = root / VOC / "ImageSets/Segmentation/train.txt"
    listing.write_text("/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png\n\n2007_000000")
    assert read_ids(root / VOC, "train") == ["2007_000001", "2007_000000"]
    assert keys(plain(root, augmented=False), "train") == ["2007_000000", "2007_000001"]


def test_errors_name_missing_files(sbd: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"(?s)nowhere does not hold.*download=True"):
        VOCDataModule("nowhere").dataset("train")
    fake_voc(tmp_path, images=1, extra="none")
    with pytest.raises(MissingFileError, match=r"(?s)neither SBD nor SegmentationClassAug.*augmented=False"):
        VOCDataModule(tmp_path).dataset("train")
    (tmp_path / VOC / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(MissingFileError, match=r"there is no list .*val.txt; .* tar file of VOC's val images again"):
        VOCDataModule(tmp_path, augmented=True).dataset("val")
    (tmp_path / VOC / "SegmentationClass/2007_000000.png").unlink()
    with pytest.raises(MissingFileError, match=r"no file .*SegmentationClass/2007_000000.png"):
        VOCDataModule(tmp_path, augmented=False).dataset("train")[0]
    with pytest.raises(UserError, match="expected one of"):
        VOCDataModule(sbd, train_split="trainaug")


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: path.write_bytes(b"MATLAB"), "damaged or not a .mat file"),
    (lambda path: __import__("scipy.io").io.savemat(path, {"GTinst": 1}), "no variable GTcls"),
])  # fmt: skip
def test_error_names_the_invalid_mat_file(tmp_path: Path, write, message: str) -> None:
    fake_voc(tmp_path, images=1)
    write(tmp_path / "benchmark_RELEASE/dataset/cls/2010_000000.mat")
    with pytest.raises(UserError, match=rf"2010_000000.mat (is|has) {message}"):
        plain(tmp_path).dataset("train")[1]


@needs_samples
def test_real_files(tmp_path: Path) -> None:
    real = SAMPLES / "voc2012" / VOC
    ids = {name: read_ids(real, name) for name in ("train", "val", "test", "trainaug")}
    assert [len(ids[name]) for name in ids] == [1464, 1449, 1456, 10582]
    sample = VOCDataModule(SAMPLES / "voc2012")
    place = ids["val"].index("2007_000129")
    mask = sample.dataset("val")[place]["mask"]
    # counted without this package
    assert [int((mask == c).sum()) for c in (0, 2, 15, 255)] == [54389, 34183, 61143, 17285]
    # all images of SBD, which include many of val, must give exactly the published list of trainaug
    voc = tmp_path / VOC
    shutil.copytree(real / "ImageSets", voc / "ImageSets")
    (tmp_path / "benchmark_RELEASE/dataset/cls").mkdir(parents=True)
    sbd = sorted({*ids["trainaug"], *random.Random(0).sample(ids["val"], 773)})
    for key in sbd:
        (tmp_path / "benchmark_RELEASE/dataset/cls" / f"{key}.mat").touch()
    assert keys(VOCDataModule(tmp_path), "train") == sorted(ids["trainaug"])
