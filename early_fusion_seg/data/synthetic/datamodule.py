"""Synthetic street scenes as a data module: something to learn from where no data set is at hand."""

from functools import cached_property
from typing import Any

import albumentations as A  # the name is the library's own custom

from early_fusion_seg.data.datamodule import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import Image, Mask, Source
from early_fusion_seg.data.synthetic.street import scene
from early_fusion_seg.errors import UserError
from early_fusion_seg.labels import LabelSet, load_label_set

SCENES_PER_SPLIT = 2**20
KEPT_BYTES = 2**28
"""A split whose scenes take no more than this is kept in memory once drawn."""


class SyntheticDataModule(SegmentationDataModule):
    """Procedural street scenes with CamVid's 11 classes, drawn when they are needed.

    The same seed gives the same scenes on any machine, and no split has a scene of another. Training scenes are
    mirrored at random and otherwise left alone, since their light, colors and sizes differ anyway; where a
    `crop_size` is given, the usual augmentation is used. `predict` gives the test scenes without their masks.

    Args:
        size: Height and width of the scenes in pixels.
        train_scenes: Number of scenes to train on.
        val_scenes: Number of scenes to validate on.
        test_scenes: Number of scenes to test on.
        seed: From 0; each gives other scenes.
        kwargs: Those of SegmentationDataModule, from batch_size to eval_transform, without root.

    Raises:
        UserError: A size, number or seed out of its range.

    Example:
        >>> data = SyntheticDataModule(size=(48, 64), train_scenes=2)
        >>> data.dataset("train")[0]["image"].shape
        torch.Size([3, 48, 64])
    """

    license = "Apache-2.0"  # drawn by this library

    def __init__(
        self,
        size: tuple[int, int] = (96, 128),
        train_scenes: int = 800,
        val_scenes: int = 100,
        test_scenes: int = 100,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=".", **kwargs)  # nothing is read from it
        if kwargs.get("train_transform") is None and self.crop_size is None:
            self.train_transform = A.HorizontalFlip(p=0.5)
        self.size = (size[0], size[1])
        self.counts = {"train": train_scenes, "val": val_scenes, "test": test_scenes}
        self.seed = seed
        numbers = {"height": size[0], "width": size[1], **{f"{split}_scenes": n for split, n in self.counts.items()}}
        for name, value in numbers.items():
            if not 1 <= value <= SCENES_PER_SPLIT:
                raise UserError(f"{name} is {value}; expected a whole number from 1 to {SCENES_PER_SPLIT}")
        if seed < 0:
            raise UserError(f"seed is {seed}; expected a whole number from 0")

    @cached_property
    def label_set(self) -> LabelSet:
        """Return CamVid's 11 classes."""
        return load_label_set("synthetic")

    def source(self, split: Split) -> Source:
        """Return the scenes of a split."""
        name = "test" if split == "predict" else split
        first = (self.seed * len(self.counts) + list(self.counts).index(name)) * SCENES_PER_SPLIT
        return SceneSource(first, self.counts[name], self.size, labeled=split != "predict")


class SceneSource(Source):
    """Scenes with seeds that follow each other.

    Args:
        first: Seed of the first.
        count: How many.
        size: Height and width in pixels.
        labeled: Give the masks.
    """

    def __init__(self, first: int, count: int, size: tuple[int, int], labeled: bool = True) -> None:
        self.seeds = range(first, first + count)
        self.size = size
        self.labeled = labeled
        self._keep = count * size[0] * size[1] * 4 <= KEPT_BYTES
        self._kept: dict[int, tuple[Image, Mask]] = {}

    def __len__(self) -> int:
        return len(self.seeds)

    def key(self, index: int) -> str:
        """Return the scene's number in the split."""
        return f"scene{index:06d}"

    def read(self, index: int) -> tuple[Image, Mask | None]:
        """Draw a scene, or return a copy of the one kept."""
        drawn = self._kept.get(index) or scene(self.seeds[index], *self.size)
        if self._keep:
            self._kept[index] = drawn
        image, mask = drawn
        return image.copy(), mask.copy() if self.labeled else None
