"""Fake replicas of COCO's layouts.

The arguments of each function are the folder to write to, the number of images per split, their height and width in
pixels, and the seed of the pixels.
"""

from pathlib import Path

import numpy as np

from early_fusion_seg.data.replica import (
    Size,
    block_scene,
    occurring_classes,
    save_json,
    save_lines,
    save_pixels,
)

STUFF_SPLITS = ("train2017", "val2017")


def fake_coco_stuff(root: str | Path, images: int = 3, size: Size = (48, 64), seed: int = 0) -> Path:
    """Write COCO 2017 with stuffthingmaps, and unlabeled images of test2017."""
    root, rng = Path(root), np.random.default_rng(seed)
    raw_ids, colors = occurring_classes("coco_stuff")
    for split in (*STUFF_SPLITS, "test2017"):
        for number in range(images):
            image, labels = block_scene(rng, size, colors, void_corner=True)
            save_pixels(root / "images" / split / f"{number:012}.jpg", image)
            if split in STUFF_SPLITS:
                save_pixels(root / "stuffthingmaps" / split / f"{number:012}.png", raw_ids[labels].astype(np.uint8))
    return root


def fake_coco_panoptic(root: str | Path, images: int = 3, size: Size = (48, 64), seed: int = 0) -> Path:
    """Write COCO 2017 with panoptic PNGs and JSON; the first segment of each image is a crowd."""
    root, rng = Path(root), np.random.default_rng(seed)
    raw_ids, colors = occurring_classes("coco_panoptic")
    for number in range(images):
        save_pixels(
            root / "images" / "test2017" / f"{number:012}.jpg", block_scene(rng, size, colors, void_corner=True)[0]
        )
    for split in STUFF_SPLITS:
        annotations = []
        for number in range(images):
            image, labels = block_scene(rng, size, colors, void_corner=True)
            ids = np.where(raw_ids[labels] == 0, 0, raw_ids[labels] * 1000 + number)
            channels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)
            save_pixels(root / "images" / split / f"{number:012}.jpg", image)
            save_pixels(root / "annotations" / f"panoptic_{split}" / f"{number:012}.png", channels)
            segments = [
                {"id": int(i), "category_id": int(i) // 1000, "area": int((ids == i).sum()), "iscrowd": int(place == 0)}
                for place, i in enumerate(np.unique(ids[ids > 0]))
            ]
            annotations.append({"image_id": number, "file_name": f"{number:012}.png", "segments_info": segments})
        save_json(root / "annotations" / f"panoptic_{split}.json", {"annotations": annotations})
    return root


def fake_coco_stuff10k(root: str | Path, images: int = 3, size: Size = (48, 64), seed: int = 0) -> Path:
    """Write COCO-Stuff 10k: .mat files, the two lists of images, and all images in one folder."""
    from scipy.io import savemat  # slow to import

    root, rng = Path(root), np.random.default_rng(seed)
    raw_ids, colors = occurring_classes("coco_stuff")
    for split, first in (("train", 0), ("test", images)):
        keys = [f"COCO_train2014_{number:012}" for number in range(first, first + images)]
        for key in keys:
            image, labels = block_scene(rng, size, colors, void_corner=True)
            save_pixels(root / "images" / f"{key}.jpg", image)
            (root / "annotations").mkdir(exist_ok=True)
            savemat(root / "annotations" / f"{key}.mat", {"S": ((raw_ids[labels] + 1) % 256).astype(np.uint16)})
        save_lines(root / "imageLists" / f"{split}.txt", keys)
    return root
