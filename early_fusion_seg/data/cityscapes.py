"""Cityscapes: street scenes of 50 cities at 2048x1024, 19 classes (Cordts et al., CVPR 2016, arXiv 1604.01685).

Layout, classes and rule are those of github.com/mcordts/cityscapesScripts.
"""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from early_fusion_seg.data.datamodule import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import FileSource, Item, Source
from early_fusion_seg.data.layout import Layout
from early_fusion_seg.data.listing import File, files_below, matched
from early_fusion_seg.data.replica import Replica, Size, block_scene, row_colors, save_pixels, zip_folders
from early_fusion_seg.data.submission import SubmissionFormat
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.labels import LabelSet, in_ranges, load_label_set, packaged_rows

Labels = Literal["labelIds", "labelTrainIds"]
HIGHEST_TRAIN_ID = 18
CITIES = {"train": "aachen", "val": "frankfurt", "test": "berlin", "train_extra": "augsburg"}  # of the fake replica
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
    layouts = (
        Layout("Cityscapes labelIds", ("gtFine/*/*/*_gtFine_labelIds.png",), {"labels": "labelIds"}),
        Layout("Cityscapes labelTrainIds", ("gtFine/*/*/*_gtFine_labelTrainIds.png",), {"labels": "labelTrainIds"}),
        Layout("Cityscapes coarse labels", ("gtCoarse/*/*/*_gtCoarse_labelIds.png",), None),
        Layout("Cityscapes in zip files", (MASK_ARCHIVES["gtFine"], *IMAGE_ARCHIVES), {"labels": "labelIds"}),
    )
    fixes: ClassVar[Mapping[str, str]] = {
        "labelTrainIds": "run csCreateTrainIdLabelImgs again",
        **{folder: f"unpack or download {archive} again" for folder, archive in MASK_ARCHIVES.items()},
        "train_extra": f"unpack or download {IMAGE_ARCHIVES[1]} again",
        "": f"unpack or download {IMAGE_ARCHIVES[0]} again",
    }
    masks_match_images = True

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

    @property
    def submission(self) -> SubmissionFormat:
        """Return the format of the test server: gray PNGs of labelIds in a zip file."""
        if self.labels != "labelIds":
            raise UserError("the server of Cityscapes takes labelIds: leave --data.labels out")
        server = "www.cityscapes-dataset.com/submit"
        return SubmissionFormat("cityscapes.zip", server, check_raw_ids=_look_like_train_ids)

    @classmethod
    def replicas(cls) -> dict[str, Replica]:
        """Return the fake replicas: folders, and the official zip files."""
        return {"": Replica(fake_cityscapes), "zip": Replica(partial(fake_cityscapes, zipped=True))}

    def diagnose_raw_ids(self, raw_ids: Counter[int], fix: str) -> str | None:
        """Tell files with labelIds and files with train ids apart."""
        labels = self.label_set
        unknown = labels.unknown_ids(raw_ids)
        if self.labels == "labelTrainIds" and unknown:
            return (
                f"the files *_labelTrainIds.png hold labelIds ({unknown[0]} is no train id): {fix}, "
                "or rename them to *_labelIds.png and leave out --data.labels"
            )
        low = max(raw_ids.keys() - {255}, default=33) <= HIGHEST_TRAIN_ID
        if self.labels == "labelIds" and low and (unknown == [255] or labels.has_class(raw_ids)):
            return (
                f"the files *_labelIds.png hold train ids ({in_ranges(raw_ids)}; labelIds are 0..33): {fix}, "
                "or rename them to *_labelTrainIds.png and give --data.labels labelTrainIds"
            )
        return None

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


def _look_like_train_ids(raw_ids: Set[int]) -> str | None:
    highest = max(raw_ids, default=0)
    if highest > HIGHEST_TRAIN_ID:
        return None
    return f"no label is above {highest}: these look like train ids, and the server takes labelIds"


def fake_cityscapes(
    root: str | Path, images: int = 3, size: Size = (64, 128), seed: int = 0, zipped: bool = False
) -> Path:
    """Write a fake replica with train_extra, and void masks for test as the real one has.

    Args:
        root: Folder to write to.
        images: Images in each split.
        size: Height and width.
        seed: Seed of the pixels.
        zipped: Write the official zip files instead of folders.

    Returns:
        The root.
    """
    root, rng = Path(root), np.random.default_rng(seed)
    colors = row_colors(packaged_rows("cityscapes"))
    ids = load_label_set("cityscapes")
    for split, city in CITIES.items():
        kind = "gtCoarse" if split == "train_extra" else "gtFine"
        for number in range(images):
            name = f"{city}/{city}_{number:06}_000019"
            image, raw = block_scene(rng, size, colors)
            raw = np.full_like(raw, 1) if split == "test" else raw  # ego vehicle
            save_pixels(root / "leftImg8bit" / split / f"{name}_leftImg8bit.png", image)
            save_pixels(root / kind / split / f"{name}_{kind}_labelIds.png", raw)
            if not zipped:
                save_pixels(root / kind / split / f"{name}_{kind}_labelTrainIds.png", ids.encode(raw, name))
    if zipped:
        zip_folders(root, IMAGE_ARCHIVES[0], [f"leftImg8bit/{split}" for split in ("train", "val", "test")])
        zip_folders(root, IMAGE_ARCHIVES[1], ["leftImg8bit/train_extra"])
        for kind, archive in MASK_ARCHIVES.items():
            zip_folders(root, archive, [kind])
        shutil.rmtree(root / "leftImg8bit")
    return root
