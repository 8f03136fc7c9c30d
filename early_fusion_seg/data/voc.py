"""PASCAL VOC 2012: 21 classes with background (Everingham et al., IJCV 2010), and SBD's masks for more training images.

trainaug, the usual training set, is VOC's train and all images of SBD (Hariharan et al., ICCV 2011) but those of VOC's
val: 10,582 of them. SBD's own train list holds images of VOC's val, which must not come into training.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from early_fusion_seg.data.base import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import FileSource, Item, Source
from early_fusion_seg.data.download import download as fetch
from early_fusion_seg.data.files import File, files_below
from early_fusion_seg.data.matlab import read_mat
from early_fusion_seg.data.unpack import unpack
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.images import read_mask
from early_fusion_seg.labels import LabelSet, load_label_set

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
  and for augmented=True either
  benchmark_RELEASE/dataset/cls/2008_000002.mat (SBD)
  VOCdevkit/VOC2012/SegmentationClassAug/2008_000002.png"""
WHERE = (
    f"download=True (--data.download true) fetches {VOC_URL} and {SBD_URL}; "
    "the test images need an account at host.robots.ox.ac.uk:8080."
)


class VOCDataModule(SegmentationDataModule):
    """PASCAL VOC 2012: 1,464 images to train (10,582 augmented), 1,449 to validate; `predict` takes the 1,456 of test.

    The official mean is nan where a class is absent from the truth and never predicted, as in a part of the split.

    Args:
        root: Folder with VOCdevkit/ (or VOC2012/, or VOC2012 itself).
        augmented: Train on the images of SBD too, with masks from SBD's .mat files or a folder SegmentationClassAug.
        train_split: "train", or "trainval" for a submission to the test server; val is then scored on images that were
            trained on.
        download: Fetch VOC (2 GB) and, where augmented, SBD (1.4 GB) into `root` where they are not there.
        kwargs: Those of SegmentationDataModule, from batch_size to eval_transform.
    """

    absent = "strict-nan"
    pred_void = "error"
    license = "PASCAL VOC: the images have the terms of Flickr; research use."

    def __init__(
        self,
        root: str | os.PathLike[str],
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
        """Return background and the 20 classes."""
        return load_label_set("voc2012")

    @property
    def published_sizes(self) -> dict[str, int]:
        """Return the number of images that each split should have."""
        train = 10582 if self.augmented else 1464
        return {"train": train + 1449 * (self.train_split == "trainval"), "val": 1449, "test": 1456}

    def prepare_data(self) -> None:
        """Fetch and unpack what is missing, where that was asked for."""
        if not self.download:
            return
        if self._voc() is None:
            unpack(fetch(VOC_URL, self.root, md5=VOC_MD5), self.root / "VOCdevkit")
        if self.augmented and not self._extra_masks():
            unpack(fetch(SBD_URL, self.root, md5=SBD_MD5), self.root / "benchmark_RELEASE")

    def source(self, split: Split) -> Source:
        """Return the images of a split; "test" and "predict" are the same, without labels."""
        voc = self._voc()
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
            masks |= self._augmentation(masks.keys() | set(read_ids(voc, "val")))
        return FileSource([Item(k, images / f"{k}.jpg", masks[k]) for k in sorted(masks)], self.label_set, _read_labels)

    def _augmentation(self, others: set[str]) -> dict[str, File]:
        """Return the masks of SBD's images that are in no other split."""
        extra = self._extra_masks()
        if not extra:
            raise MissingFileError(
                f"{self.root} holds neither SBD nor SegmentationClassAug. Expected there:\n{TREE}\n{WHERE}\n"
                "augmented=False (--data.augmented false) trains on VOC's own 1,464 images"
            )
        return {key: mask for key, mask in extra.items() if key not in others}

    def _voc(self) -> Path | None:
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
    """Read a list of images: ids, or DeepLab's lines such as `/JPEGImages/X.jpg /SegmentationClassAug/X.png`."""
    path = voc / "ImageSets" / "Segmentation" / f"{name}.txt"
    if not path.is_file():
        raise MissingFileError(f"there is no list {path}; unpack or download the tar file of VOC's {name} images again")
    return [Path(line.split()[0]).stem for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_labels(file: File) -> NDArray[Any]:
    """Read a PNG of VOC or a .mat of SBD."""
    return np.asarray(read_mat(file, "GTcls").Segmentation) if str(file).endswith(".mat") else read_mask(file)
