"""FolderDataModule: a user's own images, as a folder to predict, or with masks and a label CSV to train on."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from early_fusion_seg.data.datamodule import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import FileSource, Item, Source
from early_fusion_seg.data.layout import Layout
from early_fusion_seg.data.listing import require_folder
from early_fusion_seg.data.replica import Replica, Size, block_scene, save_lines, save_pixels
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.io.images import write_indexed_png
from early_fusion_seg.labels import LabelSet

TREE = """  labels.csv              one line per class: raw_id,train_id,name,color
  images/train/a.jpg      any format; the same for images/val, and optionally images/test
  masks/train/a.png       the same name with .png; each pixel is the raw_id of its class
  or, without the folders train and val: images/a.jpg and masks/a.png, split by val_fraction"""
WHERE = "To predict, any folder with images can be used."


class FolderDataModule(SegmentationDataModule):
    """A folder of images, with masks and a label CSV for training.

    `predict` uses every file below `root` except hidden files; the key of an image is its path below `root`. A file
    that is not an image is reported and skipped.

    Training and evaluation use images/train/a.jpg with masks/train/a.png, the same with val/ and optionally test/. If
    there are no folders train/ and val/, images/a.jpg and masks/a.png are split by `val_fraction`: images whose keys
    have the lowest SHA-256 are used for validation. This split is the same on every machine, and changes little when
    images are added.

    Args:
        root: The folder.
        labels: Label CSV with the columns raw_id, train_id, name and color. Default (None): `root/labels.csv`. Not
            needed to predict.
        val_fraction: Fraction of the images used for validation if there are no folders train/ and val/, above 0 and
            below 1. With the default of 0.2, 20 of 100 images.
        kwargs: Arguments of SegmentationDataModule, from batch_size to eval_transform.
    """

    layouts = (Layout("a folder with a label CSV", ("labels.csv",), {}),)
    fix_for_no_images = "put at least 2 images into images/, or 1 into each of images/train/ and images/val/"

    def __init__(
        self,
        root: str | Path,
        labels: str | Path | None = None,
        val_fraction: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction is {val_fraction}; expected a number above 0 and below 1")
        self.labels = self.root / "labels.csv" if labels is None else Path(labels)
        self.val_fraction = val_fraction

    @cached_property
    def label_set(self) -> LabelSet:
        """Return the classes; the label CSV is read at the first use."""
        return LabelSet.from_csv(self.labels)

    @classmethod
    def replicas(cls) -> dict[str, Replica]:
        """Return the fake replica, which has the folders train/ and val/."""
        return {"": Replica(fake_folder)}

    def source(self, split: Split) -> Source:
        """Return the images of a split."""
        require_folder(self.root, TREE, WHERE)
        if split == "predict":
            return FileSource([Item(key, path) for key, path in visible_files(self.root).items()])
        images, masks = self.root / "images", self.root / "masks"
        require_folder(images, TREE, WHERE)
        require_folder(masks, TREE, WHERE)
        if (images / "train").is_dir() or (images / "val").is_dir():
            require_folder(images / split, TREE, WHERE)
            return FileSource(paired_items(images / split, masks / split), self.label_set)
        if split == "test":
            raise MissingFileError(f"{self.root} has no test split; expected images/test and masks/test")
        items = paired_items(images, masks)
        chosen = validation_keys([item.key for item in items], self.val_fraction)
        return FileSource([item for item in items if (item.key in chosen) == (split == "val")], self.label_set)


def visible_files(folder: Path) -> dict[str, Path]:
    """Return the files below a folder, without hidden files, sorted by key: the path below the folder, with slashes."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {key: files[key] for key in sorted(files) if not any(part.startswith(".") for part in key.split("/"))}


def paired_items(images: Path, masks: Path) -> list[Item]:
    """List the images below a folder, each with the mask of the same name with the suffix .png.

    Raises:
        UserError: An image has no mask, a mask has no image, or two images share a mask.
    """
    files = visible_files(images)
    unused = {masks / key for key in visible_files(masks) if key.endswith(".png")}
    items = [Item(key, path, (masks / key).with_suffix(".png")) for key, path in files.items()]
    for item, previous in zip(items, [None, *items], strict=False):
        if previous and item.mask == previous.mask:
            raise UserError(f"{previous.image} and {item.image} share the mask {item.mask}; rename one of them")
        if item.mask not in unused:
            raise MissingFileError(f"{item.image} has no mask; expected {item.mask}")
        unused.remove(item.mask)
    if unused:
        raise MissingFileError(f"{len(unused)} mask(s) have no image below {images}, such as {min(unused)}")
    return items


def validation_keys(keys: list[str], fraction: float) -> set[str]:
    """Choose a fraction of the keys, at least one: those with the lowest SHA-256."""
    ordered = sorted(keys, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return set(ordered[: max(1, round(len(keys) * fraction))])


def fake_folder(root: str | Path, images: int = 4, size: Size = (36, 48), splits: bool = True, seed: int = 0) -> Path:
    """Write a fake replica with three classes and an ignored label, raw id 9.

    Args:
        root: Folder to write to.
        images: Number of images in each split, or in total without splits.
        size: Height and width in pixels.
        splits: Write the folders train/ and val/.
        seed: Seed of the pixels.

    Returns:
        The root.
    """
    root, rng = Path(root), np.random.default_rng(seed)
    rows = ["1,0,ground,#804000", "2,1,plant,#00a000", "5,2,sky,#60a0ff", "9,255,void,#000000"]
    save_lines(root / "labels.csv", ["raw_id,train_id,name,color", *rows])
    raw_ids = np.array([1, 2, 5, 9], np.uint8)
    palette = np.zeros((10, 3), np.uint8)
    colors = np.array([[128, 64, 0], [0, 160, 0], [96, 160, 255], [0, 0, 0]], np.uint8)
    palette[raw_ids] = colors
    for split in ("train", "val") if splits else ("",):
        for number in range(images):
            image, labels = block_scene(rng, size, colors)
            save_pixels(root / "images" / split / f"{number:03}.jpg", image)
            write_indexed_png(root / "masks" / split / f"{number:03}.png", raw_ids[labels], palette)
    return root
