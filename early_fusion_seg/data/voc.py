"""PASCAL VOC 2012: 21 classes with background (Everingham et al., IJCV 2010), with more training images from SBD.

The usual training set, "trainaug", has 10,582 images: VOC's train and all images of SBD (Hariharan et al., ICCV 2011)
that are not in VOC's val. SBD's own train list is not used, because it contains images of VOC's val.
"""

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from early_fusion_seg.data.datamodule import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import FileSource, Item, Source
from early_fusion_seg.data.layout import Layout
from early_fusion_seg.data.listing import File, files_below
from early_fusion_seg.data.matlab import read_mat
from early_fusion_seg.data.replica import Replica, Size, block_scene, row_colors, save_lines, save_pixels
from early_fusion_seg.data.submission import SubmissionFormat
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.io.download import Archive, download_and_unpack
from early_fusion_seg.io.images import read_mask, write_indexed_png
from early_fusion_seg.labels import LabelSet, load_label_set, packaged_rows

TrainSplit = Literal["train", "trainval"]

VOC_FOLDERS = ("VOCdevkit/VOC2012", "VOC2012", ".")
SBD_FOLDERS = ("benchmark_RELEASE/dataset", "dataset", "sbd", "SBD")
VOC_URL = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
VOC_MD5 = "6cd6e144f989b92b3379bac3b3de84fd"
SBD_URL = "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz"
SBD_MD5 = "82b4d87ceb2ed10f6038a1cba92111cb"
TREE = """  VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg
  VOCdevkit/VOC2012/SegmentationClass/2007_000032.png
  VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val,trainval,test}.txt
  and, for augmented=True, either
  benchmark_RELEASE/dataset/cls/2008_000002.mat (SBD), or
  VOCdevkit/VOC2012/SegmentationClassAug/2008_000002.png"""
WHERE = (
    f"download=True (--data.download true) downloads {VOC_URL} and {SBD_URL}; "
    "the test images need an account at host.robots.ox.ac.uk:8080."
)


class VOCDataModule(SegmentationDataModule):
    """PASCAL VOC 2012: 1,464 training images (10,582 with SBD), 1,449 for validation. `predict` uses the 1,456 of test.

    The official mean IoU is nan if a class neither occurs in the ground truth nor is predicted, which can happen if
    only a part of a split is scored.

    Args:
        root: Folder with VOCdevkit/ (or with VOC2012/, or VOC2012 itself).
        augmented: Also train on the images of SBD, with masks from its .mat files or from SegmentationClassAug/.
            Default: true. With false, train on VOC's own 1,464 images.
        train_split: Images of VOC to train on: "train" (default), or "trainval" for a submission to the test server.
            With "trainval", the validation score is computed on training images.
        download: Download VOC (2 GB) and, if `augmented`, SBD (1.4 GB) into `root` if they are missing. Default: false.
        kwargs: Arguments of SegmentationDataModule, from batch_size to eval_transform.
    """

    absent = "strict-nan"
    pred_void = "error"
    license = "PASCAL VOC: the images have the terms of Flickr; research use."
    layouts = (
        Layout("SegmentationClassAug for VOC", tuple(f"{folder}/SegmentationClassAug" for folder in VOC_FOLDERS), {}),
        Layout("SBD (more training images for VOC)", tuple(f"{folder}/cls" for folder in SBD_FOLDERS), {}),
        Layout(
            "PASCAL VOC 2012",
            tuple(f"{folder}/ImageSets/Segmentation" for folder in VOC_FOLDERS),
            {"augmented": False},  # usable without the two layouts above
        ),
    )
    fixes: ClassVar[Mapping[str, str]] = {
        ".mat": f"unpack or download SBD's {SBD_URL.rpartition('/')[2]} again",
        "SegmentationClassAug": "get SegmentationClassAug again",
        "test:": "unpack or download VOC2012test.tar again",
        "": f"unpack or download {VOC_URL.rpartition('/')[2]} again",
    }

    def __init__(
        self,
        root: str | Path,
        augmented: bool = True,
        train_split: TrainSplit = "train",
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        if train_split not in get_args(TrainSplit):
            raise UserError(f"train_split is {train_split!r}; expected one of {', '.join(get_args(TrainSplit))}")
        self.augmented = augmented
        self.train_split = train_split
        self.download = download

    @cached_property
    def label_set(self) -> LabelSet:
        """Return the classes: background and 20 kinds of objects."""
        return load_label_set("voc2012")

    @property
    def published_sizes(self) -> dict[str, int]:
        """Return the number of images that each split should have."""
        train = 10582 if self.augmented else 1464
        return {"train": train + 1449 * (self.train_split == "trainval"), "val": 1449, "test": 1456}

    def prepare_data(self) -> None:
        """Download and unpack missing files if `download` is set."""
        if not self.download:
            return
        missing: dict[Path, Archive] = {}
        if self._voc_folder() is None:  # VOCdevkit/ may hold VOC2007
            missing[self.root / VOC_FOLDERS[0]] = Archive(VOC_URL, VOC_MD5, inside="VOC2012")
        if self.augmented and not self._extra_masks():
            missing[self.root / "benchmark_RELEASE"] = Archive(SBD_URL, SBD_MD5)
        download_and_unpack(missing, self.root)

    @property
    def submission(self) -> SubmissionFormat:
        """Return the format of the test server: indexed PNGs in the folders of competition 6."""
        server = "host.robots.ox.ac.uk:8080 (comp6)"
        return SubmissionFormat("results.tgz", server, "results/VOC2012/Segmentation/comp6_test_cls", indexed=True)

    @classmethod
    def replicas(cls) -> dict[str, Replica]:
        """Return the fake replicas: with SBD, and with SegmentationClassAug for all or only for the added images."""
        return {
            "": Replica(fake_voc),
            "aug": Replica(partial(fake_voc, extra="aug")),
            "aug-only": Replica(partial(fake_voc, extra="aug_only")),
        }

    def source(self, split: Split) -> Source:
        """Return the images of a split; "test" and "predict" are the same images, without labels."""
        voc = self._voc_folder()
        if voc is None:
            raise MissingFileError(f"{self.root} does not hold PASCAL VOC 2012. Expected there:\n{TREE}\n{WHERE}")
        images = voc / "JPEGImages"
        if split in ("test", "predict"):
            return FileSource([Item(key, images / f"{key}.jpg") for key in read_ids(voc, "test")])
        masks: dict[str, File] = {
            key: voc / "SegmentationClass" / f"{key}.png"
            for key in read_ids(voc, self.train_split if split == "train" else "val")
        }
        if split == "train" and self.augmented:
            masks |= self._added_masks(masks.keys() | set(read_ids(voc, "val")))
        return FileSource([Item(k, images / f"{k}.jpg", masks[k]) for k in sorted(masks)], self.label_set, _read_labels)

    def _added_masks(self, excluded: set[str]) -> dict[str, File]:
        """Return the masks of SBD or SegmentationClassAug, without excluded keys."""
        extra = self._extra_masks()
        if not extra:
            raise MissingFileError(
                f"{self.root} holds neither SBD nor SegmentationClassAug. Expected there:\n{TREE}\n{WHERE}\n"
                "augmented=False (--data.augmented false) trains on VOC's own 1,464 images"
            )
        return {key: mask for key, mask in extra.items() if key not in excluded}

    def _voc_folder(self) -> Path | None:
        return next((self.root / f for f in VOC_FOLDERS if (self.root / f / "ImageSets/Segmentation").is_dir()), None)

    def _extra_masks(self) -> dict[str, File]:
        for folder in VOC_FOLDERS:
            if found := files_below(self.root, f"{folder}/SegmentationClassAug", ".png"):
                return found
        for folder in SBD_FOLDERS:
            if found := files_below(self.root, f"{folder}/cls", ".mat"):
                return found
        return {}


def read_ids(voc: Path, name: str) -> list[str]:
    """Read a list of image ids.

    Args:
        voc: Folder VOC2012.
        name: Name of the list. A line is an id, or as in DeepLab's lists `/JPEGImages/X.jpg
            /SegmentationClassAug/X.png`.
    """
    path = voc / "ImageSets" / "Segmentation" / f"{name}.txt"
    if not path.is_file():
        raise MissingFileError(f"there is no list {path}; unpack or download the tar file of VOC's {name} images again")
    return [Path(line.split()[0]).stem for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_labels(file: File) -> NDArray[Any]:
    """Read a PNG mask of VOC or a .mat file of SBD."""
    return read_mat(file, "GTcls", "Segmentation") if str(file).endswith(".mat") else read_mask(file)


def fake_voc(root: str | Path, images: int = 3, size: Size = (50, 60), seed: int = 0, extra: str = "sbd") -> Path:
    """Write a fake replica with additional training images.

    Args:
        root: Folder to write to.
        images: Number of images in each of train, val, test and the additional set.
        size: Height and width in pixels.
        seed: Seed of the pixels.
        extra: Masks of the additional images. "sbd": .mat files, also for train and val as in SBD. "aug":
            SegmentationClassAug, also for train and val (DrSleep's). "aug_only": SegmentationClassAug for the
            additional images only (mmsegmentation's). "none": no masks.

    Returns:
        The root.
    """
    from scipy.io import savemat  # slow to import

    root, rng = Path(root), np.random.default_rng(seed)
    voc = root / "VOCdevkit" / "VOC2012"
    rows = packaged_rows("voc2012")
    colors, raw_ids = row_colors(rows), np.array([row.raw_id for row in rows])
    keys = {s: [f"20{7 + i:02}_{n:06}" for n in range(images)] for i, s in enumerate(("train", "val", "test", "extra"))}
    for split, names in keys.items():
        for key in names:
            image, labels = block_scene(rng, size, colors)
            raw = raw_ids[labels].astype(np.uint8)
            save_pixels(voc / "JPEGImages" / f"{key}.jpg", image)
            if split in ("train", "val"):
                write_indexed_png(voc / "SegmentationClass" / f"{key}.png", raw, colors[:21])
            if extra == "sbd" and split != "test":
                folder = root / "benchmark_RELEASE" / "dataset" / "cls"
                folder.mkdir(parents=True, exist_ok=True)
                savemat(folder / f"{key}.mat", {"GTcls": {"Segmentation": np.where(raw == 255, 0, raw)}})
            if split in {"aug": ("train", "val", "extra"), "aug_only": ("extra",)}.get(extra, ()):
                save_pixels(voc / "SegmentationClassAug" / f"{key}.png", raw)
    for name in ("train", "val", "test"):
        save_lines(voc / "ImageSets" / "Segmentation" / f"{name}.txt", keys[name])
    save_lines(voc / "ImageSets" / "Segmentation" / "trainval.txt", keys["train"] + keys["val"])
    return root
