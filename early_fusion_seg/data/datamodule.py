"""SegmentationDataModule: what all data sets share as LightningDataModules.

A data set defines its classes (`label_set`) and its images (`source`). Everything else that is known about it, such as
its layouts on disk or the format of its test server, is optional and stands in its class too.
"""

import abc
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import cv2
import PIL.Image
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import suggested_max_num_workers
from torch.utils.data import DataLoader

from early_fusion_seg.data.class_pixel_counts import class_pixel_counts
from early_fusion_seg.data.dataset import Sample, SegmentationDataset, Source, collate
from early_fusion_seg.data.frequencies import Counts, Weighting, rare_draws, weights_of
from early_fusion_seg.data.layout import Layout
from early_fusion_seg.data.listing import File
from early_fusion_seg.data.replica import Replica
from early_fusion_seg.data.samplers import (
    BatchLoader,
    EpochSampler,
    PredictLoader,
    TrainLoader,
    UnpaddedDistributedSampler,
)
from early_fusion_seg.data.submission import SubmissionFormat
from early_fusion_seg.data.transforms import TrainAugmentation, Transform
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.labels import IGNORE_INDEX, LabelSet
from early_fusion_seg.labels.evaluator_rules import AbsentClassRule, EvaluatorRules, VoidPredictionRule
from early_fusion_seg.visualize import sheet

Split = Literal["train", "val", "test", "predict"]
Loader = TypeVar("Loader", bound=BatchLoader)


class SegmentationDataModule(LightningDataModule, abc.ABC):
    """Base class of all data sets.

    The order and augmentation of training images depend only on (seed, epoch, image); the seed is that of Lightning's
    `seed_everything`, or 0.

    Args:
        root: Folder of the data set.
        batch_size: Training images per process and step.
        eval_batch_size: Images per process and step in validation and test; above 1 only if all have the same size.
        num_workers: Worker processes that read images. None: one fewer than there are cores, from 1 to 4. 0: none.
        crop_size: Height and width of training crops, or one number for both, in pixels after `scale`. None: the size
            of each image, which must then be the same for all.
        scale: Resize factor for images and masks of every split, before augmentation: 0.5 makes 240x180 of 480x360.
        random_scale: Lowest and highest factor of the random resize in the default augmentation.
        short_side: Length in pixels to which the default augmentation resizes the shorter side of each training image,
            before `random_scale`. None: images keep their size.
        rare_class_share: Share of training samples, 0..1, drawn for a rare class: an image that contains the class, and
            a crop around one of its pixels. Images are chosen with any train_transform, crops only with the default
            augmentation. The classes of the training images are counted once; see `class_pixel_counts`.
        train_transform: Replaces the default augmentation. Called with `image=` (h, w, 3) uint8 and `mask=` (h, w)
            uint8; returns a dict with both, as albumentations does. Normalized float images are passed on, for
            networks that need them (ours takes uint8).
        eval_transform: The same for the other splits; default: none.
    """

    absent: ClassVar[AbsentClassRule] = "nan-skip"  # the rules of the official evaluator
    pred_void: ClassVar[VoidPredictionRule] = "fn"
    license: ClassVar[str | None] = None
    ignore_index: ClassVar[int] = IGNORE_INDEX

    # facts that `doctor` uses
    layouts: ClassVar[tuple[Layout, ...]] = ()  # how the data set is recognized on disk
    fixes: ClassVar[Mapping[str, str]] = {"": "correct or replace the files"}  # part of "SPLIT:FILE" -> its fix
    masks_match_images: bool = False  # whether every mask in the folders of a split should have an image of its name
    fix_for_no_images: ClassVar[str] = "the list or folder of the split is empty: unpack or download the data again"

    def __init__(
        self,
        root: str | os.PathLike[str],
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int | None = None,
        crop_size: int | tuple[int, int] | None = None,
        scale: float = 1.0,
        random_scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
        rare_class_share: float = 0.0,
        train_transform: Transform | None = None,
        eval_transform: Transform | None = None,
    ) -> None:
        super().__init__()
        _check_positive(batch_size=batch_size, eval_batch_size=eval_batch_size, scale=scale, short_side=short_side or 1)
        if not 0 < random_scale[0] <= random_scale[1]:
            raise UserError(f"random_scale is {random_scale}; expected two factors above 0, the lower one first")
        if not 0 <= rare_class_share <= 1:
            raise UserError(f"rare_class_share is {rare_class_share}; it must lie from 0 to 1")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"num_workers is {num_workers}; give 0 or more, or leave it out")
        self.root = Path(root)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = min(4, suggested_max_num_workers(1)) if num_workers is None else num_workers
        self.crop_size = _pair(crop_size)
        self.scale = scale
        self.rare_class_share = rare_class_share
        self.train_transform = train_transform or TrainAugmentation(self.crop_size, random_scale, short_side)
        self.eval_transform = eval_transform
        self._train_loader: TrainLoader | None = None
        self._restored: dict[str, int] | None = None

    @property
    @abc.abstractmethod
    def label_set(self) -> LabelSet:
        """Return the classes; known before `setup`."""

    @abc.abstractmethod
    def source(self, split: Split) -> Source:
        """Return the images of a split.

        Raises:
            UserError: The split is not there; the message shows what was expected and where to get it.
        """

    @property
    def rules(self) -> EvaluatorRules:
        """Return how the official evaluator treats absent classes and void predictions."""
        return EvaluatorRules(self.absent, self.pred_void)

    @property
    def published_sizes(self) -> dict[str, int]:
        """Return the number of images that each split should have; empty if the user decides."""
        return {}

    @property
    def submission(self) -> SubmissionFormat | None:
        """Return what the test server takes, None if there is no server.

        Raises:
            UserError: The server does not take the labels that the data module is set to.
        """
        return None

    @classmethod
    def replicas(cls) -> dict[str, Replica]:
        """Return the fake replicas that `fake-data` can write, by layout; the usual layout is ""."""
        return {}

    def diagnose_mask(self, raw_ids: Mapping[int, int], file: File) -> str | None:
        """Return what is wrong with one mask although all of its raw ids are known, or None.

        Args:
            raw_ids: Raw id -> pixels in the mask.
            file: The mask.
        """
        return None

    def diagnose_raw_ids(self, raw_ids: Counter[int], fix: str) -> str | None:
        """Return which other labels the masks of a split seem to hold and how to fix that, or None.

        Args:
            raw_ids: Raw id -> pixels in the masks.
            fix: How to get the right masks.
        """
        return None

    @property
    def class_names(self) -> list[str]:
        """Return the names of the classes in the order of their train ids."""
        return list(self.label_set.class_names)

    @property
    def num_classes(self) -> int:
        """Return the number of classes, without the ignored one."""
        return self.label_set.num_classes

    @property
    def palette(self) -> list[list[int]]:
        """Return one RGB color (0..255) per class."""
        return [list(color) for color in self.label_set.palette]

    def plot(self, batch: dict[str, Any]) -> PIL.Image.Image:
        """Draw a batch or a sample: each image, and beside it its labels over it.

        Args:
            batch: `image` (n, 3, h, w) uint8 or floats in 0..1, `mask` (n, h, w), `key`; or one sample without n.

        Returns:
            A picture; `plot(batch).save("batch.png")`, or a notebook shows it.
        """
        images, masks = batch["image"], batch.get("mask")
        if images.ndim == 3:
            batch = {"key": [batch["key"]]}
            images, masks = images[None], None if masks is None else masks[None]
        if images.is_floating_point():
            images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        pictures = list(images.permute(0, 2, 3, 1).cpu().numpy())
        labels = [None] * len(pictures) if masks is None else list(masks.cpu().numpy())
        return PIL.Image.fromarray(sheet(pictures, labels, batch["key"], self.palette, self.class_names))

    def dataset(self, split: Split) -> SegmentationDataset:
        """Return a split as a dataset of samples, augmented only for "train"."""
        if split not in get_args(Split):
            raise UserError(f"the split is {split!r}; expected one of {', '.join(get_args(Split))}")
        source = self.source(split)
        if len(source) == 0:
            raise MissingFileError(f"the {split} split below {self.root} has no images")
        transform = self.train_transform if split == "train" else self.eval_transform
        return SegmentationDataset(source, transform, self.scale, seed=_seed())

    def class_pixel_counts(self) -> Counts:
        """Return the pixels of each class in each training image (images, K), before `scale`.

        They are counted once, with a bar, and kept in the user's cache until a mask changes; in a run, also in
        class_pixel_counts.npz in its folder (the trainer's default_root_dir).

        Raises:
            UserError: The training images have no labels, or a mask cannot be read.
        """
        source = self.dataset("train").source
        if not source.labeled:
            raise UserError(f"{type(self).__name__}'s training images have no labels to count classes in")
        run = Path(self.trainer.default_root_dir) if self.trainer and self.trainer.global_rank == 0 else None
        return class_pixel_counts(source, self.num_classes, None if run is None else run / "class_pixel_counts.npz")

    def class_weights(self, kind: Weighting) -> list[float]:
        """Return class weights from class frequencies in the training images, for `ReverseHRNetSeg(class_weights=)`.

        Args:
            kind: "median" (median-frequency balancing) or "inverse-log" (ENet's); see `frequencies`.

        Raises:
            UserError: There is no such kind, or nothing to count; see `class_pixel_counts`.
        """
        return weights_of(self.class_pixel_counts(), kind)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return shuffled, augmented batches.

        All processes together see, step by step, what one process with a batch as large as all of theirs would see. The
        last, smaller batch is dropped, because it would weigh each of its images more and give batch norms few values;
        it is kept where it is the only one.
        """
        dataset = self.dataset("train")
        world, rank = self._world()
        drop_last = len(dataset) >= world * self.batch_size
        sampler = EpochSampler(dataset, world, rank, shuffle=True, seed=_seed(), drop_last=drop_last)
        if self.rare_class_share:
            counts, share, seed = self.class_pixel_counts(), self.rare_class_share, _seed()
            sampler.rare = lambda epoch: rare_draws(counts, share, (seed, epoch, len(dataset)))  # no image's own seed
        self._train_loader = self._loader(TrainLoader, dataset, self.batch_size, sampler, drop_last=drop_last)
        if self._restored is not None:
            self._train_loader.load_state_dict(self._restored)
            self._restored = None
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """Return how far the training images are, for a checkpoint.

        Lightning stores the loader's state by itself, but has made the loader before it restores it where the length of
        the training was asked for. What a data module stores is restored before.
        """
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there with the next loader."""
        self._restored = state_dict.get("train")

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the validation images, each exactly once over all processes."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return the test images, each exactly once over all processes."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Return images without masks, one at a time; an unreadable one gives a batch with `error` and no `image`."""
        dataset = self.dataset("predict")
        return self._loader(PredictLoader, dataset, 1, self._eval_sampler(dataset))

    def _eval_dataloader(self, split: Split) -> DataLoader[Sample]:
        dataset = self.dataset(split)
        if not dataset.source.labeled:
            raise UserError(
                f"{type(self).__name__}'s {split} split has no labels to score with; validate, or predict its images"
            )
        return self._loader(BatchLoader, dataset, self.eval_batch_size, self._eval_sampler(dataset))

    def _eval_sampler(self, dataset: SegmentationDataset) -> UnpaddedDistributedSampler | None:
        world, rank = self._world()
        return UnpaddedDistributedSampler(dataset, world, rank) if world > 1 else None

    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(
        self,
        kind: type[Loader],
        dataset: SegmentationDataset,
        batch_size: int,
        sampler: Any,
        drop_last: bool = False,
    ) -> Loader:
        return kind(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            worker_init_fn=_start_worker,
        )


def _seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", 0))  # set by Lightning's seed_everything, and equal in every process


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism; OpenCV's own threads would only compete with them


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name} is {value}; it must be above 0")


def _pair(crop_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if crop_size is None:
        return None
    sides = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
    if len(sides) != 2:
        raise UserError(f"crop_size is {crop_size}; expected one number, or height and width")
    height, width = sides
    _check_positive(crop_height=height, crop_width=width)
    return height, width
