"""Tiny replicas of the official layouts of Cityscapes, Mapillary Vistas, COCO and PASCAL VOC; see `fake`.

Each writer takes the folder to write to, the images in each split, their height and width, and the seed of the pixels.
"""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from early_fusion_seg.data.fake import Size, save, scene
from early_fusion_seg.images import write_indexed_png
from early_fusion_seg.labels import LabelRow, load_label_set, packaged_rows

CITIES = {"train": "aachen", "val": "frankfurt", "test": "berlin", "train_extra": "augsburg"}
STUFF_SPLITS = ("train2017", "val2017")


def fake_cityscapes(
    root: str | Path, images: int = 3, size: Size = (64, 128), seed: int = 0, zipped: bool = False
) -> Path:
    """Write Cityscapes with train_extra, and void masks for test as the real one has; `zipped`: as its zip files."""
    root, rng = Path(root), np.random.default_rng(seed)
    colors = _colors(packaged_rows("cityscapes"))
    ids = load_label_set("cityscapes")
    for split, city in CITIES.items():
        kind = "gtCoarse" if split == "train_extra" else "gtFine"
        for number in range(images):
            name = f"{city}/{city}_{number:06}_000019"
            image, raw = scene(rng, size, colors)
            raw = np.full_like(raw, 1) if split == "test" else raw  # ego vehicle
            save(root / "leftImg8bit" / split / f"{name}_leftImg8bit.png", image)
            save(root / kind / split / f"{name}_{kind}_labelIds.png", raw)
            if not zipped:
                save(root / kind / split / f"{name}_{kind}_labelTrainIds.png", ids.encode(raw, name))
    if zipped:
        _zip(root, "leftImg8bit_trainvaltest.zip", [f"leftImg8bit/{s}" for s in ("train", "val", "test")])
        _zip(root, "leftImg8bit_trainextra.zip", ["leftImg8bit/train_extra"])
        _zip(root, "gtFine_trainvaltest.zip", ["gtFine"])
        _zip(root, "gtCoarse.zip", ["gtCoarse"])
        shutil.rmtree(root / "leftImg8bit")
    return root


def fake_mapillary(
    root: str | Path, images: int = 3, size: Size = (60, 80), seed: int = 0, version: str = "v2.0"
) -> Path:
    """Write Mapillary Vistas: "v1.1" as its download, anything else as that of 2.0, which holds v1.2 and v2.0."""
    root, rng = Path(root), np.random.default_rng(seed)
    versions = {"": "mapillary_v1.2"} if version == "v1.1" else {f"{v}/": f"mapillary_{v}" for v in ("v1.2", "v2.0")}
    for place, table in versions.items():
        rows = packaged_rows(table)
        labels = [
            {
                "name": r.name.lower().replace(" ", "-"),
                "readable": r.name,
                "color": r.color,
                "evaluate": r.train_id < 255,
            }
            for r in rows
        ]
        name = f"config_{place[:-1]}.json" if place else "config.json"
        _write_json(root / name, {"version": place[1:-1] or "1.1", "mapping": "public", "labels": labels})
    colors = _colors(packaged_rows("mapillary_v1.2"))
    for split in ("training", "validation", "testing"):
        for number in range(images):
            key = f"{split[:2]}{number:020}"
            image, raw = scene(rng, size, colors)
            save(root / split / "images" / f"{key}.jpg", image)
            for place in versions if split != "testing" else ():
                shift = 58 if place == "v2.0/" else 0  # to its highest label, 123
                write_indexed_png(root / split / f"{place}labels" / f"{key}.png", raw + np.uint8(shift), colors)
    return root


def fake_coco_stuff(root: str | Path, images: int = 3, size: Size = (48, 64), seed: int = 0) -> Path:
    """Write COCO 2017 with stuffthingmaps, and images of test2017."""
    root, rng = Path(root), np.random.default_rng(seed)
    raw_ids, colors = _classes("coco_stuff")
    for split in (*STUFF_SPLITS, "test2017"):
        for number in range(images):
            image, labels = _scene_with_void(rng, size, colors)
            save(root / "images" / split / f"{number:012}.jpg", image)
            if split in STUFF_SPLITS:
                save(root / "stuffthingmaps" / split / f"{number:012}.png", raw_ids[labels].astype(np.uint8))
    return root


def fake_coco_panoptic(root: str | Path, images: int = 3, size: Size = (48, 64), seed: int = 0) -> Path:
    """Write COCO 2017 with panoptic PNGs and JSON, in which the first segment of each image is a crowd."""
    root, rng = Path(root), np.random.default_rng(seed)
    raw_ids, colors = _classes("coco_panoptic")
    for number in range(images):
        save(root / "images" / "test2017" / f"{number:012}.jpg", _scene_with_void(rng, size, colors)[0])
    for split in STUFF_SPLITS:
        annotations = []
        for number in range(images):
            image, labels = _scene_with_void(rng, size, colors)
            ids = np.where(raw_ids[labels] == 0, 0, raw_ids[labels] * 1000 + number)
            channels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)
            save(root / "images" / split / f"{number:012}.jpg", image)
            save(root / "annotations" / f"panoptic_{split}" / f"{number:012}.png", channels)
            segments = [
                {"id": int(i), "category_id": int(i) // 1000, "area": int((ids == i).sum()), "iscrowd": int(place == 0)}
                for place, i in enumerate(np.unique(ids[ids > 0]))
            ]
            annotations.append({"image_id": number, "file_name": f"{number:012}.png", "segments_info": segments})
        _write_json(root / "annotations" / f"panoptic_{split}.json", {"annotations": annotations})
    return root


def fake_coco_stuff10k(root: str | Path, images: int = 3, size: Size = (48, 64), seed: int = 0) -> Path:
    """Write COCO-Stuff 10k: .mat files, and the images of both lists in one folder."""
    from scipy.io import savemat

    root, rng = Path(root), np.random.default_rng(seed)
    raw_ids, colors = _classes("coco_stuff")
    for split, first in (("train", 0), ("test", images)):
        keys = [f"COCO_train2014_{number:012}" for number in range(first, first + images)]
        for key in keys:
            image, labels = _scene_with_void(rng, size, colors)
            save(root / "images" / f"{key}.jpg", image)
            (root / "annotations").mkdir(exist_ok=True)
            savemat(root / "annotations" / f"{key}.mat", {"S": ((raw_ids[labels] + 1) % 256).astype(np.uint16)})
        _write_lines(root / "imageLists" / f"{split}.txt", keys)
    return root


def fake_voc(root: str | Path, images: int = 3, size: Size = (50, 60), seed: int = 0, extra: str = "sbd") -> Path:
    """Write PASCAL VOC 2012 and more training images.

    Args:
        root: Folder to write to.
        images: Images in each of train, val, test and the additional ones.
        size: Height and width.
        seed: Of the pixels.
        extra: "sbd": .mat files, of images of train and val too, as SBD has; "aug": SegmentationClassAug with those of
            train and val (DrSleep's); "aug_only": with the additional ones alone (mmsegmentation's); "none".
    """
    from scipy.io import savemat

    root, rng = Path(root), np.random.default_rng(seed)
    voc = root / "VOCdevkit" / "VOC2012"
    colors = _colors(packaged_rows("voc2012"))
    raw_ids = np.array([row.raw_id for row in packaged_rows("voc2012")])
    keys = {s: [f"20{7 + i:02}_{n:06}" for n in range(images)] for i, s in enumerate(("train", "val", "test", "extra"))}
    for split, names in keys.items():
        for key in names:
            image, labels = scene(rng, size, colors)
            raw = raw_ids[labels].astype(np.uint8)
            save(voc / "JPEGImages" / f"{key}.jpg", image)
            if split in ("train", "val"):
                write_indexed_png(voc / "SegmentationClass" / f"{key}.png", raw, colors[:21])
            if extra == "sbd" and split != "test":
                folder = root / "benchmark_RELEASE" / "dataset" / "cls"
                folder.mkdir(parents=True, exist_ok=True)
                savemat(folder / f"{key}.mat", {"GTcls": {"Segmentation": np.where(raw == 255, 0, raw)}})
            if split in {"aug": ("train", "val", "extra"), "aug_only": ("extra",)}.get(extra, ()):
                save(voc / "SegmentationClassAug" / f"{key}.png", raw)
    for name in ("train", "val", "test"):
        _write_lines(voc / "ImageSets" / "Segmentation" / f"{name}.txt", keys[name])
    _write_lines(voc / "ImageSets" / "Segmentation" / "trainval.txt", keys["train"] + keys["val"])
    return root


def _colors(rows: list[LabelRow]) -> NDArray[np.uint8]:
    return np.array([row.color for row in rows], np.uint8)


def _classes(table: str) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return raw ids and colors of the rows that occur in the data: the classes, and one that means void."""
    rows = packaged_rows(table)
    void = next(row for row in reversed(rows) if row.train_id == 255)
    used = [row for row in rows if row.train_id != 255] + [void]
    return np.array([row.raw_id for row in used], np.int64), _colors(used)


def _scene_with_void(
    rng: np.random.Generator, size: Size, colors: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw a scene whose upper left corner has the last label."""
    image, labels = scene(rng, size, colors)
    labels[:4, :4] = len(colors) - 1
    return image, labels


def _zip(root: Path, name: str, folders: list[str]) -> None:
    """Pack folders as a zip file and delete them."""
    with zipfile.ZipFile(root / name, "w", zipfile.ZIP_STORED) as archive:
        for folder in folders:
            for path in sorted((root / folder).rglob("*.png")):
                archive.write(path, path.relative_to(root))
            shutil.rmtree(root / folder)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
