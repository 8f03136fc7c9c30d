"""Fake replicas: tiny synthetic data sets in an official layout, to test readers and training without the real data.

Each data set writes its own replica with the functions below. An image consists of blocks in the colors of their
classes, plus noise, so a network can learn it. Equal arguments write equal pixels.
"""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from early_fusion_seg.labels import LabelRow, packaged_rows

Size = tuple[int, int]  # height, width


class Replica(NamedTuple):
    """A fake replica of one layout.

    Attributes:
        write: Function that writes it. It is called with the folder to write to and the keyword arguments `images`
            (number per split), `size` (height, width) and `seed`.
        options: Command line options with which `fit` reads it.
    """

    write: Callable[..., Path]
    options: str = ""


def block_scene(
    rng: np.random.Generator, size: Size, colors: NDArray[np.uint8], void_corner: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw an image of blocks of random classes.

    Args:
        rng: Random number generator.
        size: Height and width in pixels.
        colors: (K, 3) RGB colors, one per class.
        void_corner: Label 4x4 pixels in the upper left corner of the mask as the last class.

    Returns:
        Image (h, w, 3) and mask (h, w), both uint8.
    """
    height, width = size
    labels = np.full(size, rng.integers(len(colors)), np.uint8)
    for label in rng.permutation(len(colors)):
        top, left = rng.integers(height), rng.integers(width)
        labels[top : top + height // 3 + 1, left : left + width // 3 + 1] = label
    noise = rng.integers(-20, 21, (*size, 3))
    image = np.clip(colors[labels] + noise, 0, 255).astype(np.uint8)
    if void_corner:
        labels[:4, :4] = len(colors) - 1
    return image, labels


def save_pixels(path: Path, pixels: NDArray[Any]) -> None:
    """Write an image in the format of the file's suffix, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_json(path: Path, content: Any) -> None:
    """Write a JSON file, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def save_lines(path: Path, lines: list[str]) -> None:
    """Write a text file, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def zip_folders(root: Path, name: str, folders: list[str]) -> None:
    """Move the PNGs of some folders into a zip file.

    Args:
        root: Folder that contains the folders and the zip file.
        name: Name of the zip file.
        folders: Folders below the root; they are deleted.
    """
    with zipfile.ZipFile(root / name, "w", zipfile.ZIP_STORED) as archive:
        for folder in folders:
            for path in sorted((root / folder).rglob("*.png")):
                archive.write(path, path.relative_to(root))
            shutil.rmtree(root / folder)


def row_colors(rows: list[LabelRow]) -> NDArray[np.uint8]:
    """Return the colors (n, 3) of n rows of a label set."""
    return np.array([row.color for row in rows], np.uint8)


def occurring_classes(table: str) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the raw ids and colors that a replica uses: those of all classes, then those of one ignored label."""
    rows = packaged_rows(table)
    void = next(row for row in reversed(rows) if row.train_id == 255)
    used = [row for row in rows if row.train_id != 255] + [void]
    return np.array([row.raw_id for row in used], np.int64), row_colors(used)
