"""Fake replicas: tiny synthetic copies of a data set in its official layout, to try readers and training without data.

Each data set writes its own replica with the functions below. Images are blocks in the colors of their classes with
noise, so that a network can learn them. The same arguments write the same pixels.
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
        write: Called with the folder to write to and the keywords `images` (per split), `size` (height, width) and
            `seed`.
        options: Command line options of `fit` that read it.
    """

    write: Callable[..., Path]
    options: str = ""


def block_scene(
    rng: np.random.Generator, size: Size, colors: NDArray[np.uint8], void_corner: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw blocks of random classes.

    Args:
        rng: Random numbers.
        size: Height and width.
        colors: (K, 3), one per class.
        void_corner: Give the upper left corner the last class in the mask.

    Returns:
        Image (h, w, 3) and mask (h, w).
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
    """Write pixels in the format of the file's suffix; folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_json(path: Path, content: Any) -> None:
    """Write JSON; folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def save_lines(path: Path, lines: list[str]) -> None:
    """Write lines of text; folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def zip_folders(root: Path, name: str, folders: list[str]) -> None:
    """Pack the PNGs of folders into a zip file and delete the folders."""
    with zipfile.ZipFile(root / name, "w", zipfile.ZIP_STORED) as archive:
        for folder in folders:
            for path in sorted((root / folder).rglob("*.png")):
                archive.write(path, path.relative_to(root))
            shutil.rmtree(root / folder)


def row_colors(rows: list[LabelRow]) -> NDArray[np.uint8]:
    """Return the colors (n, 3) of rows of a label set."""
    return np.array([row.color for row in rows], np.uint8)


def occurring_classes(table: str) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return raw ids and colors of the rows that occur in masks: the classes, then one that is ignored."""
    rows = packaged_rows(table)
    void = next(row for row in reversed(rows) if row.train_id == 255)
    used = [row for row in rows if row.train_id != 255] + [void]
    return np.array([row.raw_id for row in used], np.int64), row_colors(used)
