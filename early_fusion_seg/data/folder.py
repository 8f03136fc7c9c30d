"""FolderDataModule: a user's own images, as a folder to predict, or with masks and a label CSV to train on."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from early_fusion_seg.data.datamodule import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import FileSource, Item, Source
from early_fusion_seg.data.image_paths import images_to_predict, visible_files
from early_fusion_seg.data.layout import Layout
from early_fusion_seg.data.listing import files_below, require_folder
from early_fusion_seg.data.replica import Replica, Size, block_scene, save_lines, save_pixels
from early_fusion_seg.errors import MissingFileError, UserError, first_five
from early_fusion_seg.io.image_files import IMAGE_SUFFIXES, is_image
from early_fusion_seg.io.images import write_indexed_png
from early_fusion_seg.labels import LabelSet, read_mask_or_colors

TREE = """  labels.csv              one line per class: raw_id,train_id,name,color
  images/train/a.jpg      any format; the same for images/val, and optionally images/test
  masks/train/a.png       the same name with .png; each pixel is the raw_id of its class
  or, without the folders train and val: images/a.jpg and masks/a.png, split by val_fraction"""
SPLIT_NAMES = {  # names of the folder of each split, in lower case
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
LIKE_A_SPLIT = re.compile(
    r"(^|[\W_\d])(train(ing)?|trn|val|valid(ation)?|dev|eval(uation)?|test(ing)?|tst|hold[\W_]?out)"
    r"([\W_]?(set|split|data|images?|imgs?|files))?([\W_\d]|$)",
    re.IGNORECASE,
)
WHERE = "The command predict takes any folder with images."


class FolderDataModule(SegmentationDataModule):
    """A folder of images, with masks and a label CSV for training.

    `predict` uses every file below `root` except hidden files, files that systems and tools put beside images (such as
    Thumbs.db and .json), and what earlier runs wrote there; the key of an image is its path below `root`. A file that
    is not an image is reported and skipped. Links to folders are followed. `root` may also be one image, a pattern such
    as photos/*.jpg, or a text file (.txt) with one path per line.

    Training and evaluation use images/train/a.jpg with masks/train/a.png, the same with val/ and optionally test/; the
    names training, valid, validation and testing, in upper or lower case, mean the same. If there are no folders for
    train and val, images/a.jpg and masks/a.png are split by `val_fraction`: images whose keys have the lowest SHA-256
    are used for validation. This split is the same on every machine, and changes little when images are added.

    Args:
        root: The folder; to predict, also an image, a pattern or a text file with paths.
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
        self.val_fraction = float(val_fraction)

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
        if split == "predict":
            return FileSource([Item(key, path) for key, path in images_to_predict(self.root).items()])
        require_folder(self.root, TREE, WHERE)
        for folder in (self.root / "images", self.root / "masks"):
            require_folder(folder, TREE, WHERE)
        read_raw = partial(read_mask_or_colors, self.label_set)
        return FileSource(self._labeled_items(split), self.label_set, read_raw)

    def _labeled_items(self, split: Split) -> list[Item]:
        images, masks = self.root / "images", self.root / "masks"
        image_splits, mask_splits = split_folders(images), split_folders(masks)
        by_folders = image_splits.keys() & {"train", "val"}
        if by_folders:
            check_nothing_beside(images, image_splits)
        if split in image_splits or by_folders:
            folder = image_splits.get(split, images / split)
            require_folder(folder, TREE, WHERE)
            return paired_items(visible_files(folder), folder, mask_splits.get(split, masks / split))
        if split == "test":
            raise MissingFileError(f"{self.root} has no test split; expected images/test and masks/test")
        files = visible_files(images, skipped=image_splits.values())
        check_no_split_in(images, files)
        items = paired_items(files, images, masks, skipped=mask_splits.values())
        chosen = validation_keys([item.key for item in items], self.val_fraction)
        return [item for item in items if (item.key in chosen) == (split == "val")]


def split_folders(parent: Path) -> dict[str, Path]:
    """Return the folders of splits directly below a folder, by the names train, val and test.

    Raises:
        UserError: Two folders have names of the same split.
    """
    found: dict[str, Path] = {}
    try:
        folders = sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError as error:
        raise UserError(f"the folder {parent} cannot be read ({error.strerror})") from None
    for path in folders:
        for split, names in SPLIT_NAMES.items():
            if path.name.lower() in names and (other := found.setdefault(split, path)) != path:
                raise UserError(f"{other} and {path} are both folders of the {split} split; move one into the other")
    return found


def check_nothing_beside(images: Path, splits: Mapping[str, Path]) -> None:
    """Check that there are no images outside of the folders of the splits.

    Raises:
        UserError: There are some; no split would have them.
    """
    if beside := visible_files(images, skipped=splits.values()):
        folders = ", ".join(path.name for path in splits.values())
        raise UserError(
            f"{images} has folders of splits ({folders}), and {len(beside)} file(s) outside of them: "
            f"{first_five(beside)}. Move them into a split, or out of {images}."
        )


def check_no_split_in(images: Path, files: Iterable[str]) -> None:
    """Check that no folder of images that are to be split by a fraction looks like a split.

    Raises:
        UserError: A folder does, such as train2017 or street/test; its images would come into any split.
    """
    folders = {key.rpartition("/")[0] for key in files}
    if looks_alike := sorted(folder for folder in folders if LIKE_A_SPLIT.search(folder)):
        raise UserError(
            f"{images} has folders that look like splits: {first_five(looks_alike)}. Name the folders of splits train, "
            f"val and test, directly below {images}, or rename these folders to split all images by val_fraction."
        )


def paired_items(files: Mapping[str, Path], images: Path, masks: Path, skipped: Iterable[Path] = ()) -> list[Item]:
    """Pair images with the masks of the same names with the suffix .png.

    Args:
        files: Key -> image.
        images: The folder of the images, for messages.
        masks: The folder of the masks.
        skipped: Folders directly below it that are left out.

    Raises:
        UserError: An image has no mask, a mask has no image, two images share a mask, or a file is no image.
    """
    found: dict[str, Path] = {}
    if masks.is_dir():
        below = files_below(masks, ".", ".png").items()
        outside = tuple(f"{path.name}/" for path in skipped)
        found = {key: Path(str(file)) for key, file in below if not key.startswith(outside)}
    stems = {key: _stem(key) for key in files}
    shared = Counter(stems.values())
    check_are_images([files[key] for key, stem in stems.items() if stem not in found or shared[stem] > 1], images)
    if stem := next((stem for stem, count in shared.items() if count > 1), None):
        same = " and ".join(str(files[key]) for key in files if stems[key] == stem)
        raise UserError(f"{same} share the mask {masks / stem}.png; rename one of them")
    if missing := [key for key, stem in stems.items() if stem not in found]:
        raise _missing_masks_error(missing, images, masks)
    if unused := found.keys() - set(stems.values()):
        names = first_five(found[key] for key in sorted(unused))
        raise MissingFileError(f"{len(unused)} mask(s) have no image below {images}: {names}")
    return [Item(key, path, found[stems[key]]) for key, path in files.items()]


def check_are_images(files: Iterable[Path], folder: Path) -> None:
    """Check by their content that files with unusual suffixes are images.

    Raises:
        UserError: Some are none, or one cannot be opened.
    """
    if wrong := [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES and not is_image(path)]:
        raise UserError(f"{len(wrong)} file(s) below {folder} are not images: {first_five(wrong)}; move them elsewhere")


def _missing_masks_error(keys: list[str], images: Path, masks: Path) -> MissingFileError:
    """Return the error for images without masks; it names a mask with another suffix or in another case."""
    stem = _stem(keys[0])
    others = visible_files(masks) if masks.is_dir() else {}
    similar = [path for key, path in others.items() if _stem(key).lower() == stem.lower()]
    found = f"{images / keys[0]} has" if len(keys) == 1 else f"{len(keys)} images below {images} have"
    names = "" if len(keys) == 1 else f": {first_five(keys)}"
    hint = f"; {similar[0]} is there, but a mask is a PNG with the name of its image" if similar else ""
    return MissingFileError(f"{found} no mask{names}; expected {masks / stem}.png{hint}")


def _stem(key: str) -> str:
    """Return a key without the suffix."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def validation_keys(keys: list[str], fraction: float) -> set[str]:
    """Choose a fraction of the keys, at least one: those with the lowest SHA-256."""
    ordered = sorted(keys, key=lambda key: hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest())
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
