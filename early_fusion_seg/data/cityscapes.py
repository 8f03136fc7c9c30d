"""Cityscapes: street scenes of 50 cities at 2048x1024, 19 classes (Cordts et al., CVPR 2016, arXiv 1604.01685).

Layout, classes and evaluation rules are those of github.com/mcordts/cityscapesScripts.
"""

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
  or the downloaded zip files leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip"""
WHERE = """Cityscapes needs an account, so there is no automatic download. Register at www.cityscapes-dataset.com, then
  pip install cityscapesscripts
  csDownload leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip       (11 GB and 241 MB)
  csDownload leftImg8bit_trainextra.zip gtCoarse.zip                    (44 GB and 1.3 GB, for train_extra only)"""


class CityscapesDataModule(SegmentationDataModule):
    """Cityscapes: 2975 training and 500 validation images with fine labels. `predict` uses the 1525 test images.

    The images are read from folders, or from the official zip files if these are not unpacked. The test images have no
    public labels: the masks in gtFine/test contain only void and are not used.

    Args:
        root: Folder with leftImg8bit/ and gtFine/, or with the zip files.
        labels: Which PNGs to read: "labelIds" (default) or "labelTrainIds". The latter are not in the zip files;
            csCreateTrainIdLabelImgs of cityscapesScripts writes them.
        train_split: Images to train on: "train" (default); "train_extra", the 19,998 images with coarse labels;
            "train+train_extra"; or "train+val" for a submission to the test server. With "train+val", the validation
            score is computed on training images.
        kwargs: Arguments of SegmentationDataModule, from batch_size to eval_transform.
    """

    license = "Cityscapes has its own terms: non-commercial use, no redistribution."
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
        root: str | Path,
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
        """Return the 19 evaluated classes; the raw ids are those of the files set by `labels`."""
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
            raise UserError(f"labels is {self.labels!r}; the Cityscapes server expects labelIds: omit --data.labels")
        server = "www.cityscapes-dataset.com/submit"
        return SubmissionFormat("cityscapes.zip", server, check_raw_ids=_check_not_train_ids)

    @classmethod
    def replicas(cls) -> dict[str, Replica]:
        """Return the fake replicas: one in folders, one in the official zip files."""
        return {"": Replica(fake_cityscapes), "zip": Replica(partial(fake_cityscapes, zipped=True))}

    def diagnose_raw_ids(self, raw_ids: Counter[int], fix: str) -> str | None:
        """Detect train ids in files for labelIds, and labelIds in files for train ids."""
        labels = self.label_set
        unknown = labels.unknown_ids(raw_ids)
        if self.labels == "labelTrainIds" and unknown:
            return (
                f"the files *_labelTrainIds.png contain labelIds ({unknown[0]} is not a train id): {fix}, "
                "or rename them to *_labelIds.png and omit --data.labels"
            )
        only_low_ids = max(raw_ids.keys() - {255}, default=33) <= HIGHEST_TRAIN_ID
        if self.labels == "labelIds" and only_low_ids and (unknown == [255] or labels.has_class(raw_ids)):
            return (
                f"the files *_labelIds.png contain train ids ({in_ranges(raw_ids)}; labelIds are 0..33): {fix}, "
                "or rename them to *_labelTrainIds.png and give --data.labels labelTrainIds"
            )
        return None

    def source(self, split: Split) -> Source:
        """Return the images of a split; "test" and "predict" are the same images, without labels."""
        if split in ("test", "predict"):
            return FileSource([Item(key, image) for key, image in self._images("test").items()])
        parts = self.train_split.split("+") if split == "train" else [split]
        return FileSource([item for part in parts for item in self._labeled_items(part)], self.label_set)

    def _images(self, part: str) -> dict[str, File]:
        """List the images of a folder of leftImg8bit by key, such as "aachen_000000_000019"."""
        found = self._files("leftImg8bit", part, IMAGE, IMAGE_ARCHIVES)
        if not found:
            raise MissingFileError(
                f"{self.root} holds no images of Cityscapes' {part}. Expected there:\n{TREE}\n{WHERE}"
            )
        return found

    def _labeled_items(self, part: str) -> list[Item]:
        """List the images of a folder of leftImg8bit with their masks."""
        kind = "gtCoarse" if part == "train_extra" else "gtFine"
        suffix = f"_{kind}_{self.labels}.png"
        masks = self._files(kind, part, suffix, (MASK_ARCHIVES[kind],))
        train_ids = self.labels == "labelTrainIds"
        fix = "run csCreateTrainIdLabelImgs" if train_ids else f"unpack or download {MASK_ARCHIVES[kind]} again"
        expected = f"{self.root / kind / part}/CITY/*{suffix}; {fix}"
        return [Item(*item) for item in matched(self._images(part), masks, expected)]

    def _files(self, kind: str, part: str, suffix: str, archives: tuple[str, ...]) -> dict[str, File]:
        files = files_below(self.root, f"{kind}/{part}", suffix, archives)
        return {key.rpartition("/")[2]: file for key, file in files.items()}


def _check_not_train_ids(raw_ids: Set[int]) -> str | None:
    highest = max(raw_ids, default=0)
    if highest > HIGHEST_TRAIN_ID:
        return None
    return f"the highest label is {highest}: these look like train ids, but the server expects labelIds"


def fake_cityscapes(
    root: str | Path, images: int = 3, size: Size = (64, 128), seed: int = 0, zipped: bool = False
) -> Path:
    """Write a fake replica with train_extra, and with void masks for test as in the real data set.

    Args:
        root: Folder to write to.
        images: Number of images in each split.
        size: Height and width in pixels.
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
