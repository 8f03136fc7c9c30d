"""SegmentationDataModule: the base class of all data sets, a LightningDataModule.

A subclass must define its classes (`label_set`) and its images (`source`). Everything else about a data set, such as
its layouts on disk or the format of its test server, is an optional attribute or method of the same class.
"""

import abc
import hashlib
import os
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import cv2
import numpy as np
import PIL.Image
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn, suggested_max_num_workers
from torch.utils.data import DataLoader

from early_fusion_seg.data.class_pixel_counts import cache_lock, class_pixel_counts
from early_fusion_seg.data.dataset import Sample, SegmentationDataset, Source, collate
from early_fusion_seg.data.frequencies import Counts, Weighting, class_weights, draw_rare_classes
from early_fusion_seg.data.layout import Layout
from early_fusion_seg.data.listing import File
from early_fusion_seg.data.mask_check import check_masks, warn_of_large_crop
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
from early_fusion_seg.distributed import all_gather_object
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.labels import IGNORE_INDEX, LabelSet
from early_fusion_seg.labels.evaluator_rules import AbsentClassRule, EvaluatorRules, VoidPredictionRule
from early_fusion_seg.visualize import sheet

Split = Literal["train", "val", "test", "predict"]
Loader = TypeVar("Loader", bound=BatchLoader)


class SegmentationDataModule(LightningDataModule, abc.ABC):
    """Base class of all data sets.

    The order and augmentation of training images depend only on (seed, epoch, image). The seed is the one given to
    Lightning's `seed_everything` in the first process. Without it, a random one is drawn and stored in checkpoints.

    Args:
        root: Folder of the data set.
        batch_size: Training images per process and step. With 2 GPUs and the default of 8, a step has 16 images.
        eval_batch_size: Images per process and step in validation and test. The default of 1 allows images of different
            sizes; higher values need images of one size.
        num_workers: Number of worker processes that read images; 0 reads them in the main process. Default (None): one
            less than the number of CPU cores, at least 1 and at most 4.
        crop_size: Height and width of training crops in pixels, after `scale`, or one number for a square: 512, or
            [384, 768]. Default (None): the size of each image after `scale` and `short_side`, so all training images
            must have the same size.
        scale: Resize factor for training images and masks, applied before augmentation: 0.5 turns 480x360 into 240x180.
            The model resizes the images of evaluation and prediction likewise, and scores at the size of the files.
            Default: 1.0, the size of the files.
        random_scale: Lowest and highest factor of the random resize in the default augmentation. Default: [0.5, 2.0];
            [1.0, 1.0] turns it off.
        short_side: Length in pixels to which the default augmentation resizes the shorter side of each training image,
            before `random_scale`: 1080 turns 4000x3000 into 1440x1080. The model resizes the images of evaluation and
            prediction likewise. Default (None): images keep their size.
        rare_class_share: Fraction of the training samples, 0..1, that are drawn for a rare class: an image that
            contains the class, and a crop around one of its pixels. 0.5 draws half of them this way; the default of 0
            draws none. The choice of images works with any train_transform, the choice of crops only with the default
            augmentation. Needs the classes of all training images, which are counted once; see `class_pixel_counts`.
        train_transform: Transform that replaces the default augmentation, such as an `albumentations.Compose`. It is
            called with `image=` (h, w, 3) uint8 and `mask=` (h, w) uint8 and returns a dict with both. It may return
            normalized float images for a network that needs them; `ReverseHRNetSeg` normalizes by itself.
        eval_transform: Transform for validation, test and prediction, called in the same way. Default: none.
    """

    # rules of the official evaluator
    absent: ClassVar[AbsentClassRule] = "nan-skip"
    pred_void: ClassVar[VoidPredictionRule] = "fn"
    license: ClassVar[str | None] = None
    ignore_index: ClassVar[int] = IGNORE_INDEX

    # used by the command `doctor`
    layouts: ClassVar[tuple[Layout, ...]] = ()  # folders and files by which the data set is recognized on disk
    fixes: ClassVar[Mapping[str, str]] = {"": "correct or replace the files"}  # substring of "SPLIT:FILE" -> how to fix
    masks_match_images: bool = False  # whether every mask in the folders of a split should have an image of its name
    fix_for_no_images: ClassVar[str] = "the list or folder of the split is empty: unpack or download the data again"

    def __init__(
        self,
        root: str | Path,
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
            raise UserError(f"rare_class_share is {rare_class_share}; expected a number from 0 to 1")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"num_workers is {num_workers}; expected 0 or more, or omit it")
        self.root = Path(root)
        self.batch_size = int(batch_size)  # PyTorch's loader refuses numbers of numpy
        self.eval_batch_size = int(eval_batch_size)
        self.num_workers = min(4, suggested_max_num_workers(1)) if num_workers is None else int(num_workers)
        self.crop_size = _pair(crop_size)
        self.scale = float(scale)
        self.rare_class_share = float(rare_class_share)
        factors = float(random_scale[0]), float(random_scale[1])
        self.short_side = None if short_side is None or train_transform else int(short_side)
        self.train_transform = train_transform or TrainAugmentation(self.crop_size, factors, self.short_side)
        self.eval_transform = eval_transform
        self._train_loader: TrainLoader | None = None
        self._restored: dict[str, int] | None = None
        self._drawn_seed: int | None = None
        self._checked: set[str] = set()  # splits whose masks were checked

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or copy contains: all but the loaders of a run, whose workers cannot be copied."""
        ended = self.trainer is None or self.trainer.state.finished  # a run that starts is copied to its processes
        return self.__dict__ | {"_train_loader": None} | ({"trainer": None} if ended else {})

    @property
    @abc.abstractmethod
    def label_set(self) -> LabelSet:
        """Return the classes. They must be available before `setup`."""

    @abc.abstractmethod
    def source(self, split: Split) -> Source:
        """Return the images of a split.

        Raises:
            UserError: The split is missing; the message shows the expected files and where to get them.
        """

    @property
    def rules(self) -> EvaluatorRules:
        """Return how the official evaluator treats absent classes and void predictions."""
        return EvaluatorRules(self.absent, self.pred_void)

    @property
    def published_sizes(self) -> dict[str, int]:
        """Return the number of images that each split should have; empty for data without a published split."""
        return {}

    @property
    def submission(self) -> SubmissionFormat | None:
        """Return the format that the test server expects, or None if there is no server.

        Raises:
            UserError: The server does not accept the kind of labels that this data module reads.
        """
        return None

    @classmethod
    def replicas(cls) -> dict[str, Replica]:
        """Return the fake replicas that `fake-data` can write, keyed by layout; the default layout has the key ""."""
        return {}

    def diagnose_mask(self, raw_ids: Mapping[int, int], file: File) -> str | None:
        """Describe a problem of one mask that has no unknown raw ids.

        Args:
            raw_ids: Raw id -> number of pixels in the mask.
            file: The mask.

        Returns:
            The problem, or None.
        """
        return None

    def diagnose_raw_ids(self, raw_ids: Counter[int], fix: str) -> str | None:
        """Detect masks of a split that contain another kind of labels than expected.

        Args:
            raw_ids: Raw id -> number of pixels in the masks.
            fix: How to get the right masks, for the message.

        Returns:
            The kind of labels found and how to fix it, or None.
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
        """Draw the images of a batch or sample, each next to a copy with its labels as an overlay.

        Args:
            batch: A batch with `image` (n, 3, h, w) uint8 or floats in 0..1, `mask` (n, h, w) or none, and `key`; or a
                sample, without the axis n.

        Returns:
            A PIL image, which a notebook displays and `plot(batch).save("batch.png")` saves.
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
        """Return a split as a dataset of samples, augmented only for "train".

        A DataLoader of your own augments each training image differently in each pass. The loaders of this class give
        the same augmentation in each run with the same seed.
        """
        if split not in get_args(Split):
            raise UserError(f"the split is {split!r}; expected one of {', '.join(get_args(Split))}")
        source = self.source(split)
        if len(source) == 0:
            raise MissingFileError(f"the {split} split below {self.root} has no images")
        if split != "train":
            return SegmentationDataset(source, self.eval_transform, seed=_seed(), redraw=False)
        return SegmentationDataset(source, self.train_transform, self.scale, seed=_seed())

    def class_pixel_counts(self) -> Counts:
        """Return the number of pixels of each class in each training image, before `scale`.

        The pixels are counted once, with a progress bar. The counts are stored in the user's cache and used until a
        mask changes. In a run they are also written to class_pixel_counts.npz in the folder of the run (the trainer's
        default_root_dir).

        Returns:
            (N, K) counts for N images and K classes.

        Raises:
            UserError: The training images have no labels, or a mask cannot be read.
        """
        source = self.dataset("train").source
        if not source.labeled:
            raise UserError(f"{type(self).__name__}'s training images have no labels to count classes in")
        run = Path(self.trainer.default_root_dir) if self.trainer and self.trainer.global_rank == 0 else None
        return class_pixel_counts(source, self.num_classes, None if run is None else run / "class_pixel_counts.npz")

    def class_weights(self, kind: Weighting) -> list[float]:
        """Return K class weights from the training images, for `ReverseHRNetSeg(class_weights=)`.

        Args:
            kind: "median" (median-frequency balancing) or "inverse-log" (ENet's); see `frequencies`.

        Raises:
            UserError: The kind is unknown, or the pixels cannot be counted; see `class_pixel_counts`.
        """
        return class_weights(self.class_pixel_counts(), kind)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return shuffled, augmented batches.

        In each step, the batches of all processes together contain the images of one larger batch of a single process.
        An incomplete last batch is dropped: its images would weigh more than others, and batch norms would get few
        values. It is kept if it is the only batch.
        """
        dataset = self.dataset("train")
        dataset.redraw = False  # the sampler gives the epoch; without it (overfit_batches), the same batch is repeated
        self._check_once(dataset.source, "train")
        dataset.seed = seed = self._training_seed()
        world, rank = self._world()
        drop_last = len(dataset) >= world * self.batch_size
        sampler = EpochSampler(dataset, world, rank, shuffle=True, seed=seed, drop_last=drop_last)
        if self.rare_class_share:
            sampler.rare_draws = partial(_draw_for_epoch, self.class_pixel_counts(), self.rare_class_share, seed)
        self._train_loader = self._loader(TrainLoader, dataset, self.batch_size, sampler, drop_last=drop_last)
        if self._restored is not None:
            self._train_loader.load_state_dict(self._restored)
            self._restored = None
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the current epoch, for a checkpoint.

        Lightning also stores the state of the training loader. It restores that state too late if the number of
        training steps was read before, because the loader exists by then. It restores the state of the data module
        earlier.
        """
        if self._train_loader is None:
            return {}
        return {"train": self._train_loader.state_dict(), "drawn_seed": self._drawn_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store a position; the next training loader resumes from it."""
        self._restored = state_dict.get("train")
        self._drawn_seed = state_dict.get("drawn_seed")

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return batches of the validation images, each image exactly once over all processes."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return batches of the test images, each image exactly once over all processes."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Return batches of one image without a mask; the batch of an unreadable image has `error` and no `image`."""
        dataset = self.dataset("predict")
        return self._loader(PredictLoader, dataset, 1, self._eval_sampler(dataset))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to the device, except images that pass in windows, which the model moves window by window."""
        in_windows = getattr(self.trainer and self.trainer.lightning_module, "passes_in_windows", None)
        if in_windows is None or "image" not in batch or not in_windows(batch["image"]):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        others = {key: value for key, value in batch.items() if key != "image"}
        moved: dict[str, Any] = super().transfer_batch_to_device(others, device, dataloader_idx)
        return moved | {"image": batch["image"]}

    def _eval_dataloader(self, split: Split) -> DataLoader[Sample]:
        dataset = self.dataset(split)
        if not dataset.source.labeled:
            raise UserError(
                f"{type(self).__name__}'s {split} split has no labels to score with; "
                "run validate, or predict to get label maps"
            )
        self._check_once(dataset.source, split)
        return self._loader(BatchLoader, dataset, self.eval_batch_size, self._eval_sampler(dataset))

    def _eval_sampler(self, dataset: SegmentationDataset) -> UnpaddedDistributedSampler | None:
        world, rank = self._world()
        if world == 1:
            return None
        # a LightningModule of ours takes the empty batch of a process without images, others need an image
        module = self.trainer.lightning_module if self.trainer else None
        pad = len(dataset) < world and not getattr(module, "accepts_empty_batches", False)
        if pad:
            rank_zero_warn(
                f"there are {len(dataset)} images for {world} processes, so some processes get an image of another one "
                f"and scores count it several times; use at most {len(dataset)} process(es)"
            )
        return UnpaddedDistributedSampler(dataset, world, rank, pad)

    def prepare_in_turn(self) -> None:
        """Call `prepare_data` in one process of this machine at a time, before the processes can communicate.

        The first one downloads, and the others find its files.
        """
        root = str(self.root.absolute()).encode(errors="surrogateescape")
        with cache_lock(f"prepare_data_{hashlib.sha256(root).hexdigest()[:32]}"):
            self.prepare_data()

    def _check_once(self, source: Source, split: Split) -> None:
        """Check the masks of a split, and warn if crops are much larger than training images."""
        if split in self._checked or not source.labeled:
            return
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        warn = split == "train" or not fitting  # once in fit
        sizes = check_masks(source, self.label_set, split, warn)
        self._checked.add(split)
        if split == "train" and isinstance(self.train_transform, TrainAugmentation):
            warn_of_large_crop(self.train_transform, self.scale, sizes)

    def _training_seed(self) -> int:
        """Return the seed of the first process: that of `seed_everything`, or else one that is drawn once."""
        given = os.environ.get("PL_GLOBAL_SEED")
        if given is None and self._drawn_seed is None:
            self._drawn_seed = int(torch.randint(2**32, ()))
        return int(all_gather_object(self._drawn_seed if given is None else given)[0])

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


def _draw_for_epoch(counts: Counts, share: float, seed: int, epoch: int) -> dict[int, tuple[int, int]]:
    # no image has this seed: augmentation uses (seed, epoch, position) with position < len(counts)
    return draw_rare_classes(counts, share, (seed, epoch, len(counts)))


def _seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", 0))  # set by Lightning's seed_everything


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # the workers already run in parallel; OpenCV's own threads would compete with them
    for name in ("SIGINT", "SIGHUP"):  # a terminal sends them to all processes; this one ends with the main process
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name} is {value}; expected a number above 0")


def _pair(crop_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if crop_size is None:
        return None
    sides = np.ravel(crop_size).tolist()
    if len(sides) not in (1, 2):
        raise UserError(f"crop_size is {crop_size}; expected one number, or height and width")
    height, width = int(sides[0]), int(sides[-1])
    _check_positive(crop_height=height, crop_width=width)
    return height, width
