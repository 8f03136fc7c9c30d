"""Source, which reads images and masks, and SegmentationDataset, which scales and transforms them into samples.

Shapes: h, w are the height and width of an image, n the batch size. Images are RGB; masks contain train ids, 255 is
ignored.
"""

import abc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from early_fusion_seg.data.listing import File
from early_fusion_seg.data.transforms import TrainAugmentation, Transform, resize, seed_transform
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.images import image_size, read_image, read_mask, size_text
from early_fusion_seg.labels import LabelSet

Image = NDArray[np.uint8]
Mask = NDArray[np.uint8]


class Sample(TypedDict):
    """One image with its mask. A batch has tensors with a first axis n, and lists of n strings."""

    key: str
    image: NotRequired[Tensor]  # (3, h, w) uint8, or floats if the user's transform returns floats
    mask: NotRequired[Tensor]  # (h, w) uint8
    error: NotRequired[str]  # replaces image and mask: why this image cannot be used


class Item(NamedTuple):
    """An image file, its key in the split, and its mask file, if any."""

    key: str
    image: File
    mask: File | None = None


class Source(abc.ABC):
    """The images and masks of one split as stored, read one pair at a time.

    Attributes:
        labeled: Whether every image has a mask.
    """

    labeled: bool = True

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abc.abstractmethod
    def key(self, index: int) -> str:
        """Return the key of an image: its name, unique in the split."""

    @abc.abstractmethod
    def read(self, index: int) -> tuple[Image, Mask | None]:
        """Read an image and its mask.

        Returns:
            RGB pixels (h, w, 3), and train ids (h, w) or None for an unlabeled image.

        Raises:
            UserError: A file is missing, damaged or contains unknown labels; the message names it.
        """


class FileSource(Source):
    """Images and masks stored in files.

    Args:
        items: The files.
        label_set: Maps raw ids to train ids. None if no item has a mask.
        read_raw: Function that reads a mask file as raw ids (h, w).
    """

    def __init__(
        self,
        items: Sequence[Item],
        label_set: LabelSet | None = None,
        read_raw: Callable[[File], NDArray[Any]] = read_mask,
    ) -> None:
        self.items = list(items)
        self.labeled = label_set is not None and all(item.mask is not None for item in self.items)
        self.label_set = label_set
        self.read_raw = read_raw

    def __len__(self) -> int:
        return len(self.items)

    def key(self, index: int) -> str:
        """Return the key of an item."""
        return self.items[index].key

    def missing_files(self) -> list[File]:
        """Return the images and masks that do not exist."""
        files = [file for item in self.items for file in (item.image, item.mask) if isinstance(file, str | Path)]
        return [file for file in files if not os.path.isfile(file)]  # noqa: PTH113  # ten times faster than Path

    def read(self, index: int) -> tuple[Image, Mask | None]:
        """Read the image and the mask of an item."""
        item = self.items[index]
        image = read_image(item.image)
        if item.mask is None or self.label_set is None:
            return image, None
        mask = self.read_labels(index)
        if mask.shape != image.shape[:2]:
            raise UserError(
                f"{item.image} is {size_text(image)} pixels (width x height) "
                f"and its mask {item.mask} is {size_text(mask)}; they must be equal. "
                "Give the mask in the size and orientation in which the image is shown."
            )
        return image, mask

    def read_labels(self, index: int) -> Mask:
        """Read only the train ids (h, w) of a labeled item."""
        item = self.items[index]
        assert item.mask is not None, f"{item.key} has no labels"
        assert self.label_set is not None
        return self.label_set.encode(self.read_raw(item.mask), str(item.mask))


class SegmentationDataset(Dataset[Sample]):
    """A PyTorch dataset that reads, scales and transforms one image at a time.

    It accepts three kinds of index:

    - `position` in the source. With `redraw`, each call has other random numbers, drawn from PyTorch's global
      generator; otherwise they are those of epoch 0.
    - `(epoch, position)`: random numbers of albumentations depend only on (seed, epoch, position). They are the same
      for any number of workers and after a resume. Other callables use the global generators, which PyTorch seeds in
      each worker.
    - `(epoch, position, class, place)`: the default augmentation crops around a pixel of the class. The place in the
      epoch's order gives each draw of the same image its own random numbers.

    Args:
        source: The images.
        transform: Callable with the arguments `image=` and `mask=` (arrays) that returns a dict with the same keys, as
            albumentations does. None: images are not changed.
        scale: Resize factor for images and masks, applied before the transform.
        seed: Seed of the random transforms.
        redraw: Transform an image differently each time that it is read by its position, as a DataLoader does.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform | None = None,
        scale: float = 1.0,
        seed: int = 0,
        redraw: bool = True,
    ) -> None:
        self.source = source
        self.transform = transform
        self.scale = scale
        self.seed = seed
        self.redraw = redraw

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int | tuple[int, ...]) -> Sample:
        epoch, position, *rare = index if isinstance(index, tuple) else (self._random_epoch(), index)
        label = rare[0] if rare else None
        if self.transform is not None:
            seed_transform(self.transform, (self.seed, epoch, position, *rare))
        data = self._augment_reduced_jpeg(position, label)
        if data is None:
            image, mask = self.source.read(position)
            image, mask = resize(image, mask, self.scale)
            data = {"image": image} if mask is None else {"image": image, "mask": mask}
            if isinstance(self.transform, TrainAugmentation):
                data = self.transform(**data, label=label)
            elif self.transform is not None:
                data = self.transform(**data)
        sample: Sample = {"key": self.source.key(position), "image": _image_tensor(data["image"])}
        if "mask" in data:
            sample["mask"] = _mask_tensor(data["mask"], sample["key"])
        return sample

    def _random_epoch(self) -> int:
        """Return a number in place of the epoch; PyTorch's generator differs in each worker and each pass."""
        return int(torch.empty((), dtype=torch.int64).random_()) if self.redraw else 0

    def _augment_reduced_jpeg(self, position: int, label: int | None) -> dict[str, Any] | None:
        """Decode a JPEG at the smallest size that its random window needs, and augment it.

        Returns:
            `image` and `mask`, or None for files and transforms that this does not support.
        """
        source, transform = self.source, self.transform
        if not isinstance(transform, TrainAugmentation) or not isinstance(source, FileSource) or self.scale != 1.0:
            return None
        if source.items[position].mask is None or not str(source.items[position].image).endswith(".jpg"):
            return None
        mask = source.read_labels(position)
        window = transform.draw_window((mask.shape[0], mask.shape[1]), mask, label)
        image = read_image(source.items[position].image, window.reduction)
        reduction = 1 if image.shape[:2] == mask.shape else window.reduction  # some images are not reduced
        reduced = tuple(-(-side // reduction) for side in mask.shape)
        stored = sorted(image_size(source.items[position].image) if window.reduction > 1 else mask.shape)
        if image.shape[:2] != reduced or stored != sorted(mask.shape):
            source.read(position)  # raises the error about different sizes of image and mask
        return transform.apply(image, mask, window, reduction)

    def __getitems__(self, indices: list[int | tuple[int, ...]]) -> list[Sample]:
        """Return the samples of a batch (called by DataLoader); a sample that cannot be read has an `error`."""
        return [self._sample_or_error(index) for index in indices]

    def _sample_or_error(self, index: int | tuple[int, ...]) -> Sample:
        try:
            return self[index]
        except UserError as error:
            position = index[1] if isinstance(index, tuple) else index
            return {"key": self.source.key(position), "error": str(error)}


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Stack n samples into a batch.

    Returns:
        `image` (n, 3, h, w), `mask` (n, h, w) and `key`, a list of n strings. If a sample has an `error`, or sizes
        differ, only the lists `key` and `error`.
    """
    batch: dict[str, Any] = {"key": [sample["key"] for sample in samples]}
    errors = [sample["error"] for sample in samples if "error" in sample]
    sizes = {sample["key"]: tuple(sample["image"].shape[1:]) for sample in samples if "image" in sample}
    if not errors and len(set(sizes.values())) > 1:
        listed = ", ".join(f"{key} {width}x{height}" for key, (height, width) in sizes.items())
        errors = [f"images of one batch differ in size ({listed}); set crop_size, or evaluate with eval_batch_size=1"]
    if errors:
        return batch | {"error": errors}
    for name in ("image", "mask"):
        if name in samples[0]:
            batch[name] = torch.stack([sample[name] for sample in samples])
    return batch


def _mask_tensor(mask: Any, key: str) -> Tensor:
    """Convert the mask (h, w) that a transform returned to uint8, if this changes no value."""
    tensor = torch.as_tensor(np.ascontiguousarray(mask))
    labels = tensor.to(torch.uint8)
    if not torch.equal(labels.to(tensor.dtype), tensor):
        raise UserError(
            f"the transform returned a mask of {tensor.dtype} for {key}, with values that are not whole numbers in "
            "0..255; a mask holds the numbers of classes, so do not normalize or interpolate it"
        )
    return labels


def _image_tensor(image: Any) -> Tensor:
    """Convert an array (h, w, 3) to a tensor (3, h, w). Tensors, as from ToTensorV2, already have this shape."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        planes = np.empty((3, *image.shape[:2]), np.uint8)
        cv2.split(np.ascontiguousarray(image), list(planes))  # several times faster than a transposed copy with numpy
        return torch.from_numpy(planes)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    tensor: Tensor = image
    return tensor if tensor.dtype == torch.uint8 else tensor.float()
