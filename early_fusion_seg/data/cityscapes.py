"""Cityscapes: street scenes of 50 cities at 2048x1024, 19 classes (Cordts et al., CVPR 2016, arXiv 1604.01685).

Layout, classes and rule are those of github.com/mcordts/cityscapesScripts.
"""

import os
from typing import Any, Literal, get_args

from early_fusion_seg.data.base import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import FileSource, Item, Source
from early_fusion_seg.data.files import File, files_below, matched
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.labels import LabelSet, load_label_set

Labels = Literal["labelIds", "labelTrainIds"]
TrainSplit = Literal["train", "train_extra", "train+train_extra", "train+val"]

IMAGE = "_leftImg8bit.png"
IMAGE_ARCHIVES = ("leftImg8bit_trainvaltest.zip", "leftImg8bit_trainextra.zip")
MASK_ARCHIVES = {"gtFine": "gtFine_trainvaltest.zip", "gtCoarse": "gtCoarse.zip"}
TREE = """  leftImg8bit/{train,val,test}/CITY/CITY_000000_000000_leftImg8bit.png
  gtFine/{train,val}/CITY/CITY_000000_000000_gtFine_labelIds.png
  or the zip files leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip as they were downloaded"""
WHERE = """Cityscapes needs an account, so it cannot be fetched from here. Register at www.cityscapes-dataset.com, then
  pip install cityscapesscripts
  csDownload leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip       (11 GB and 241 MB)
  csDownload leftImg8bit_trainextra.zip gtCoarse.zip                    (44 GB and 1.3 GB, for train_extra only)"""


class CityscapesDataModule(SegmentationDataModule):
    """Cityscapes: 2975 finely labeled images to train, 500 to validate; `predict` takes the 1525 of test.

    The folders are read, or the official zip files where they are not unpacked. The PNGs that gtFine/test holds are
    void throughout and never used: test has no public labels.

    Args:
        root: Folder with leftImg8bit/ and gtFine/, or with the zip files.
        labels: Which PNGs to read; "labelTrainIds" are not in the zip files, csCreateTrainIdLabelImgs writes them.
        train_split: "train", the 19,998 coarsely labeled images of "train_extra", both, or "train+val" for a
            submission to the test server; val is then scored on images that were trained on.
        kwargs: Those of SegmentationDataModule, from batch_size to eval_transform.
    """

    license = "Cityscapes has terms of its own: non-commercial use, no redistribution."

    def __init__(
        self,
        root: str | os.PathLike[str],
        labels: Labels = "labelIds",
        train_split: TrainSplit = "train",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        if labels not in get_args(Labels):
            raise UserError(f"labels is {labels!r}; expected one of {', '.join(get_args(Labels))}")
        if train_split not in get_args(TrainSplit):
            raise UserError(f"train_split is {train_split!r}; expected one of {', '.join(get_args(TrainSplit))}")
        self.labels = labels
        self.train_split = train_split

    @property
    def label_set(self) -> LabelSet:
        """Return the 19 evaluated classes; raw ids are those of the files read."""
        ids = load_label_set("cityscapes")
        return ids if self.labels == "labelIds" else ids.of_train_ids()

    @property
    def published_sizes(self) -> dict[str, int]:
        """Return the number of images that each split should have."""
        sizes = {"train": 2975, "val": 500, "test": 1525, "train_extra": 19998}
        return sizes | {"train": sum(sizes[part] for part in self.train_split.split("+"))}

    def source(self, split: Split) -> Source:
        """Return the images of a split; "test" and "predict" are the same, without labels."""
        if split in ("test", "predict"):
            return FileSource([Item(key, image) for key, image in self._images("test").items()])
        parts = self.train_split.split("+") if split == "train" else [split]
        return FileSource([item for part in parts for item in self._labeled(part)], self.label_set)

    def _images(self, part: str) -> dict[str, File]:
        """Return the images of a folder of leftImg8bit by their names: "aachen_000000_000019"."""
        found = self._files("leftImg8bit", part, IMAGE, IMAGE_ARCHIVES)
        if not found:
            raise MissingFileError(
                f"{self.root} holds no images of Cityscapes' {part}. Expected there:\n{TREE}\n{WHERE}"
            )
        return found

    def _labeled(self, part: str) -> list[Item]:
        kind = "gtCoarse" if part == "train_extra" else "gtFine"
        suffix = f"_{kind}_{self.labels}.png"
        masks = self._files(kind, part, suffix, (MASK_ARCHIVES[kind],))
        own = self.labels == "labelTrainIds"
        step = "csCreateTrainIdLabelImgs writes them" if own else f"unpack or download {MASK_ARCHIVES[kind]} again"
        expected = f"{self.root / kind / part}/CITY/*{suffix}; {step}"
        return [Item(*item) for item in matched(self._images(part), masks, expected)]

    def _files(self, kind: str, part: str, suffix: str, archives: tuple[str, ...]) -> dict[str, File]:
        files = files_below(self.root, f"{kind}/{part}", suffix, archives)
        return {key.rpartition("/")[2]: file for key, file in files.items()}
