"""The default augmentation: random scale, random crop, horizontal flip and color jitter.

A crop has at most 75 % of one class, or is centered on a pixel of a rare class. Random scale (0.5 to 2) and the limit
of 75 % are those of mmsegmentation's `RandomResize` and `RandomCrop(cat_max_ratio=0.75)`. Flip and color jitter are
albumentations'. Only the cropped window is resized, not the whole image, so a small crop of a large photograph is
cheap. If the window is drawn before the image is read, a JPEG that will be reduced can be decoded at half its size or
less.

Shapes: images are (h, w, 3) uint8, masks (h, w) uint8 with 255 = ignored.
"""

import os
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the next line looks for a newer version online
import albumentations as A  # must follow the line above; A is the name in albumentations' documentation

from early_fusion_seg.labels import IGNORE_INDEX

Pixels = NDArray[np.uint8]
Transform = Callable[..., dict[str, Any]]

FILL_VALUES = {"image": (124, 116, 104), "mask": (IGNORE_INDEX,)}  # ImageNet's mean color: about 0 after normalization
JPEG_REDUCTIONS = (8, 4, 2)  # factors by which a JPEG can be reduced while it is decoded
MAX_CLASS_SHARE = 0.75  # of one class among the labeled pixels of a window, 0..1
MAX_FILLED = 0.5  # share of a crop that is filled at factor 1, without a warning
MAX_TRIES = 10  # windows drawn at most; the last one is used in any case


class Axis(NamedTuple):
    """One axis of a window.

    Attributes:
        source: Range of pixels in the image.
        target: Range of pixels in the result that they are resized to.
    """

    source: slice
    target: slice


class Window(NamedTuple):
    """A window of an image, and its size and place in the result.

    Attributes:
        size: Height and width of the result.
        scale: Resize factor.
        rows: Vertical axis.
        cols: Horizontal axis.
    """

    size: tuple[int, int]
    scale: float
    rows: Axis
    cols: Axis

    @property
    def reduction(self) -> int:
        """Return the largest factor by which the image can be reduced in decoding and still be as large as needed."""
        return next((factor for factor in JPEG_REDUCTIONS if self.scale * factor <= 1), 1)


class TrainAugmentation:
    """The default augmentation of training images.

    It cuts a window of random scale and place out of the image and resizes it once. If the scaled image is smaller than
    the window, it is put at a random place in it; the rest gets a fill color, and 255 (ignored) in the mask. If one
    class has more than 75 % of the labeled pixels, another window is drawn. Horizontal flip and color jitter follow.

    Args:
        crop_size: Height and width of the result in pixels; None for the size of each image at factor 1.
        random_scale: Lowest and highest resize factor, drawn uniformly.
        short_side: Length in pixels of the shorter side of the image at factor 1; None for its own length.
    """

    def __init__(
        self,
        crop_size: tuple[int, int] | None,
        random_scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
    ) -> None:
        self.crop_size = crop_size
        self.random_scale = random_scale
        self.short_side = short_side
        self.random = random.Random()
        self.flip_and_color = (
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.03, p=0.8),
        )

    def seed(self, seed: tuple[int, ...]) -> None:
        """Make the next random numbers depend only on a seed."""
        generator, self.random = _seeded_generators(seed)
        self.random.random()  # discarded: keeps the random numbers with which the published measurements were made
        for transform in self.flip_and_color:  # shared generators: equal seeds would correlate brightness with scale
            transform.set_random_state(generator, self.random)

    def draw_window(self, size: tuple[int, int], mask: Pixels | None = None, label: int | None = None) -> Window:
        """Draw a random window.

        Args:
            size: Height and width of the image.
            mask: Labels (h, w) of the image, used to limit the share of one class.
            label: Class that the window must show. The window is centered on a random pixel of it, as far as the edges
                of the image allow. None, or a class that does not occur: the window can be anywhere.
        """
        crop = self.crop_size or self.size_at_factor_1(size)
        scale = self.random.uniform(*self.random_scale)
        if self.short_side is not None:
            scale *= self.short_side / min(size)
        if mask is not None and label is not None and len(places := np.flatnonzero(mask == label)):
            pixel = divmod(int(places[self.random.randrange(len(places))]), mask.shape[1])
            rows, cols = (self._axis(side, out, scale, at) for side, out, at in zip(size, crop, pixel, strict=True))
            return Window(crop, scale, rows, cols)
        for _ in range(MAX_TRIES):
            rows, cols = (self._axis(side, out, scale) for side, out in zip(size, crop, strict=True))
            if mask is None or largest_class_share(mask[rows.source, cols.source]) <= MAX_CLASS_SHARE:
                break
        return Window(crop, scale, rows, cols)

    def apply(self, image: Pixels, mask: Pixels | None, window: Window, reduction: int = 1) -> dict[str, Any]:
        """Cut a window out of an image and its mask, then resize, flip and color it.

        Args:
            image: Pixels at full size, or reduced in decoding.
            mask: Labels at full size, or None for an image at full size.
            window: A window from `draw_window`.
            reduction: Factor by which the image was reduced.

        Returns:
            `image` and, if a mask was given, `mask`.
        """
        if mask is not None:
            window = align_to_reduced(window, reduction, (mask.shape[0], mask.shape[1]))
        rows, cols = (
            slice(a.source.start // reduction, -(-a.source.stop // reduction)) for a in (window.rows, window.cols)
        )
        data = {"image": image[rows, cols]}
        if mask is not None:
            data["mask"] = mask[window.rows.source, window.cols.source]
        if window.scale > 1:  # flip and color before enlarging, after reducing: fewer pixels
            data = self._flip_and_color(data)
        height, width = _length(window.rows.target), _length(window.cols.target)
        data["image"] = resize_image(data["image"], height, width)
        if mask is not None:
            data["mask"] = resize_mask(data["mask"], height, width)
        if window.scale <= 1:
            data = self._flip_and_color(data)
        return {name: _pad(pixels, window, FILL_VALUES[name]) for name, pixels in data.items()}

    def _flip_and_color(self, data: dict[str, Pixels]) -> dict[str, Pixels]:
        for transform in self.flip_and_color:
            data = transform(**data)
        return data

    def __call__(self, image: Pixels, mask: Pixels | None = None, label: int | None = None) -> dict[str, Any]:
        """Draw a window and apply it."""
        return self.apply(image, mask, self.draw_window((image.shape[0], image.shape[1]), mask, label))

    def size_at_factor_1(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of an image of this size without the random scale."""
        if self.short_side is None:
            return size
        factor = self.short_side / min(size)
        return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))

    def _axis(self, side: int, out: int, scale: float, center: int | None = None) -> Axis:
        """Draw one axis of a window at random, or center it on a pixel."""
        taken = min(side, max(1, round(out / scale)))
        filled = min(out, max(1, round(taken * scale)))
        if taken < side:  # a window inside the image fills the result; rounding could leave a line to pad
            filled = out
        start, place = self.random.randint(0, side - taken), self.random.randint(0, out - filled)
        if center is not None:
            start = min(max(0, center - taken // 2), side - taken)
        return Axis(slice(start, start + taken), slice(place, place + filled))


def warn_of_large_crop(transform: TrainAugmentation, scale: float, sizes: Sequence[tuple[int, int]]) -> None:
    """Warn if more than half of a crop is filled because the training images are smaller.

    Crops that are a little larger are usual: 512x512 for VOC's 500x375.

    Args:
        transform: The augmentation.
        scale: Resize factor before it.
        sizes: Height and width of some images.
    """
    if transform.crop_size is None or not sizes:
        return
    resized = [(max(1, round(height * scale)), max(1, round(width * scale))) for height, width in sizes]
    scaled, crop = np.array([transform.size_at_factor_1(size) for size in resized]), np.array(transform.crop_size)
    filled = 1 - float((np.minimum(scaled, crop).prod(1) / crop.prod()).mean())
    if filled > MAX_FILLED:
        median = np.median(scaled, 0).astype(int)
        height, width = np.minimum(median, crop).tolist()
        rank_zero_warn(
            f"{filled:.0%} of each crop is filling: crop_size is {crop[0]}x{crop[1]} (height x width), and training "
            f"images are {median[0]}x{median[1]} after scaling (median). Take crop_size [{height}, {width}] "
            f"(--data.crop_size '[{height},{width}]')"
        )


def _pad(pixels: Pixels, window: Window, fill: tuple[int, ...]) -> Pixels:
    """Put resized pixels at their place in the result, and fill the rest."""
    top, left = window.rows.target.start, window.cols.target.start
    bottom, right = window.size[0] - window.rows.target.stop, window.size[1] - window.cols.target.stop
    if not any((top, bottom, left, right)):
        return pixels
    return np.asarray(cv2.copyMakeBorder(pixels, top, bottom, left, right, cv2.BORDER_CONSTANT, value=fill), np.uint8)


def align_to_reduced(window: Window, factor: int, size: tuple[int, int]) -> Window:
    """Move the edges of a window to whole pixels of an image reduced by a factor, so that image and mask stay aligned.

    If the size is no multiple of the factor, the last reduced pixel covers fewer pixels than the others; leave it out.

    Args:
        window: A window of the image at full size.
        factor: Factor by which the image is reduced.
        size: Height and width of the image at full size.
    """
    if factor == 1:
        return window
    axes = []
    for axis, side in zip((window.rows, window.cols), size, strict=True):
        whole = side // factor * factor
        start = min(whole - factor, axis.source.start // factor * factor)
        stop = min(whole, max(start + factor, round(axis.source.stop / factor) * factor))
        axes.append(Axis(slice(start, stop), axis.target))
    return Window(window.size, window.scale, *axes)


def largest_class_share(mask: Pixels) -> float:
    """Return the share of the most frequent class among the labeled pixels, 0..1; 1 if no pixel is labeled."""
    step = max(1, min(mask.shape) // 256)  # an estimate is enough, so large windows are subsampled
    subsampled = np.ascontiguousarray(mask[::step, ::step])
    counts = cv2.calcHist([subsampled], [0], None, [IGNORE_INDEX], [0, IGNORE_INDEX])  # faster than numpy's bincount
    labeled = float(counts.sum())
    return float(counts.max()) / labeled if labeled else 1.0


def resize(image: Pixels, mask: Pixels | None, scale: float) -> tuple[Pixels, Pixels | None]:
    """Resize an image and its mask by a factor.

    Args:
        image: Pixels (h, w, 3).
        mask: Train ids (h, w), or None.
        scale: Resize factor for height and width; 1.0 returns both unchanged.

    Returns:
        Both, with height round(h * scale) and width round(w * scale), each at least 1.
    """
    if scale == 1.0:
        return image, mask
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return resize_image(image, height, width), None if mask is None else resize_mask(mask, height, width)


def resize_image(image: Pixels, height: int, width: int) -> Pixels:
    """Resize pixels (h, w, 3): bilinear, or averaging to less than half the size, where bilinear would skip pixels."""
    average = 2 * height < image.shape[0] or 2 * width < image.shape[1]
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if average else cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8)


def resize_mask(mask: Pixels, height: int, width: int) -> Pixels:
    """Resize train ids (h, w) with nearest-neighbor interpolation, which adds no new values.

    Each pixel gets the label of the nearest pixel center, and of two equally near centers that of the later one. The
    positions are computed in integers. OpenCV is not used: INTER_NEAREST_EXACT chooses the other of two equally near
    centers in version 5 than in version 4, and INTER_NEAREST uses pixel corners, which shifts labels by half a pixel.
    """
    rows = (2 * np.arange(height) + 1) * mask.shape[0] // (2 * height)
    cols = (2 * np.arange(width) + 1) * mask.shape[1] // (2 * width)
    return np.asarray(mask[rows].take(cols, axis=1), np.uint8)


def seed_transform(transform: Transform, seed: tuple[int, ...]) -> None:
    """Make the next call of TrainAugmentation or an albumentations transform depend only on a seed.

    Other callables are not changed. The transforms of a Compose share one pair of generators. albumentations'
    `set_random_seed` would give each of them the same random numbers, so that, for example, brightness and scale would
    be correlated.
    """
    if isinstance(transform, TrainAugmentation):
        transform.seed(seed)
    elif isinstance(transform, A.BaseCompose | A.BasicTransform):
        transform.set_random_state(*_seeded_generators(seed))


def _seeded_generators(seed: tuple[int, ...]) -> tuple[np.random.Generator, random.Random]:
    """Return the two random generators that albumentations uses, both determined by a seed."""
    generator = np.random.default_rng(seed)
    return generator, random.Random(int(generator.integers(2**63)))


def _length(window: slice) -> int:
    return int(window.stop - window.start)
