"""SyntheticDataModule: procedurally drawn street scenes, to train without downloading a data set."""

from functools import cached_property
from typing import Any

import albumentations as A  # the name in albumentations' documentation

from early_fusion_seg.data.datamodule import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import Image, Mask, Source
from early_fusion_seg.data.synthetic.street import scene
from early_fusion_seg.errors import UserError
from early_fusion_seg.labels import LabelSet, load_label_set

SCENES_PER_SPLIT = 2**20
MAX_CACHED_BYTES = 2**28
"""A split of at most this size keeps its scenes in memory after they are drawn."""


class SyntheticDataModule(SegmentationDataModule):
    """Procedural street scenes with CamVid's 11 classes, drawn on demand.

    Equal seeds give equal scenes on any machine. No two splits share a scene. The augmentation of training scenes is
    only a random horizontal flip, since light, colors and sizes already vary from scene to scene; with a `crop_size`,
    it is the default augmentation. `predict` uses the test scenes without masks.

    Args:
        size: Height and width of the scenes in pixels. Default: [96, 128].
        train_scenes: Number of training scenes.
        val_scenes: Number of validation scenes.
        test_scenes: Number of test scenes.
        seed: Seed of the scenes, 0 or higher. Different seeds give different scenes.
        kwargs: Arguments of SegmentationDataModule, from batch_size to eval_transform; not root.

    Raises:
        UserError: A size, number or seed is out of range.

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
        super().__init__(root=".", **kwargs)  # no files are read
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
            raise UserError(f"seed is {seed}; expected a whole number, 0 or higher")

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
    """Scenes with consecutive seeds.

    Args:
        first: Seed of the first scene.
        count: Number of scenes.
        size: Height and width in pixels.
        labeled: Return masks too.
    """

    def __init__(self, first: int, count: int, size: tuple[int, int], labeled: bool = True) -> None:
        self.seeds = range(first, first + count)
        self.size = size
        self.labeled = labeled
        self._use_cache = count * size[0] * size[1] * 4 <= MAX_CACHED_BYTES
        self._cache: dict[int, tuple[Image, Mask]] = {}

    def __len__(self) -> int:
        return len(self.seeds)

    def key(self, index: int) -> str:
        """Return a key with the number of the scene in the split."""
        return f"scene{index:06d}"

    def read(self, index: int) -> tuple[Image, Mask | None]:
        """Draw a scene, or copy it from the cache."""
        drawn = self._cache.get(index) or scene(self.seeds[index], *self.size)
        if self._use_cache:
            self._cache[index] = drawn
        image, mask = drawn
        return image.copy(), mask.copy() if self.labeled else None
