"""Augmentation: random scale, a crop that avoids windows of one class or is centered on a rare one, flip, color.

Random scale (0.5 to 2) and the rule that at most 75 % of a crop belong to one class are those of mmsegmentation's
`RandomResize` and `RandomCrop(cat_max_ratio=0.75)`. Only the window is resized, not the whole image, so that a small
crop of a large photograph is cheap. Where the window is drawn before the image is read, a JPEG that will be shrunk can
be decoded at half its size or less. Flip and color are albumentations'.

Shapes: images are (h, w, 3) uint8, masks (h, w) uint8 with 255 = ignored.
"""

import os
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # without it the next line asks the internet for a newer version
import albumentations as A  # after the line above; the name is the library's own custom

from early_fusion_seg.labels import IGNORE_INDEX

Pixels = NDArray[np.uint8]
Transform = Callable[..., dict[str, Any]]

FILLS = {"image": (124, 116, 104), "mask": (IGNORE_INDEX,)}  # ImageNet's mean color is about zero when normalized
REDUCTIONS = (8, 4, 2)  # what a JPEG can be shrunk by while it is decoded
MAX_SHARE = 0.75  # of one class among a window's labeled pixels, 0..1
TRIES = 10  # windows drawn at most; the last one is taken as it is


class Axis(NamedTuple):
    """One axis of a window: the pixels taken from a side, and their place among those of the result."""

    taken: slice
    placed: slice


class Window(NamedTuple):
    """What is cut out, and what becomes of it.

    Args:
        size: Height and width of the result.
        scale: Factor on what is taken.
        rows: Vertical axis.
        cols: Horizontal axis.
    """

    size: tuple[int, int]
    scale: float
    rows: Axis
    cols: Axis

    @property
    def reduction(self) -> int:
        """Return by what the image may be shrunk while it is decoded without losing what the result shows."""
        return next((factor for factor in REDUCTIONS if self.scale * factor <= 1), 1)


class TrainAugmentation:
    """The augmentation that training uses unless told otherwise.

    A window of random scale and place is cut out as a single resize. Where the scaled image is smaller than the window,
    it lies at a random place in it and the rest is filled, ignored in the mask. A window of which one class has more
    than 75 % of the labeled pixels is drawn again. Then flip and color.

    Args:
        crop_size: Height and width of the result in pixels; None for the size of each image.
        random_scale: Lowest and highest factor, uniformly drawn.
        short_side: Pixels of the shorter side to which the factor refers; None: the image's own.
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
        self.others = (
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.03, p=0.8),
        )

    def seed(self, seed: tuple[int, ...]) -> None:
        """Make what is drawn next depend on a seed alone."""
        generator, self.random = _streams(seed)
        self.random.random()  # in albumentations' order of draws, in which measurements were made, one comes before
        for transform in self.others:  # one stream for all: with streams of their own, bright images were large ones
            transform.set_random_state(generator, self.random)

    def draw(self, size: tuple[int, int], mask: Pixels | None = None, label: int | None = None) -> Window:
        """Draw a window.

        Args:
            size: Height and width of the image.
            mask: Its labels, by which windows of one class are avoided.
            label: A class to show: the window is centered on a random pixel of it as far as the image's edges allow.
                Where it does not occur, as where it is None, the window may be anywhere.
        """
        crop = self.crop_size or size
        scale = self.random.uniform(*self.random_scale)
        if self.short_side is not None:
            scale *= self.short_side / min(size)
        if mask is not None and label is not None and len(places := np.flatnonzero(mask == label)):
            pixel = divmod(int(places[self.random.randrange(len(places))]), mask.shape[1])
            rows, cols = (self._axis(side, out, scale, at) for side, out, at in zip(size, crop, pixel, strict=True))
            return Window(crop, scale, rows, cols)
        for _ in range(TRIES):
            rows, cols = (self._axis(side, out, scale) for side, out in zip(size, crop, strict=True))
            if mask is None or largest_share(mask[rows.taken, cols.taken]) <= MAX_SHARE:
                break
        return Window(crop, scale, rows, cols)

    def apply(self, image: Pixels, mask: Pixels | None, window: Window) -> dict[str, Any]:
        """Cut a window out of an image and its mask, resize, flip and color it.

        Args:
            image: Pixels, of the size for which the window was drawn or reduced while they were decoded.
            mask: Labels at full size, or None.
            window: What `draw` gave.

        Returns:
            `image` and, where there is one, `mask`.
        """
        factor = 1 if mask is None else round(mask.shape[0] / image.shape[0])
        if mask is not None:
            window = snapped(window, factor, (mask.shape[0], mask.shape[1]))
        rows, cols = (slice(a.taken.start // factor, -(-a.taken.stop // factor)) for a in (window.rows, window.cols))
        data = {"image": image[rows, cols]}
        if mask is not None:
            data["mask"] = mask[window.rows.taken, window.cols.taken]
        if window.scale > 1:  # where there are fewer pixels
            data = self._flip_and_color(data)
        height, width = _length(window.rows.placed), _length(window.cols.placed)
        data["image"] = resize_image(data["image"], height, width)
        if mask is not None:
            data["mask"] = resize_mask(data["mask"], height, width)
        if window.scale <= 1:
            data = self._flip_and_color(data)
        return {name: _placed(pixels, window, FILLS[name]) for name, pixels in data.items()}

    def _flip_and_color(self, data: dict[str, Pixels]) -> dict[str, Pixels]:
        for transform in self.others:
            data = transform(**data)
        return data

    def __call__(self, image: Pixels, mask: Pixels | None = None, label: int | None = None) -> dict[str, Any]:
        """Draw a window and apply it."""
        return self.apply(image, mask, self.draw((image.shape[0], image.shape[1]), mask, label))

    def _axis(self, side: int, out: int, scale: float, center: int | None = None) -> Axis:
        """Draw a window of one axis, or center it."""
        taken = min(side, max(1, round(out / scale)))
        filled = min(out, max(1, round(taken * scale)))
        if taken < side:  # rounding must not leave a filled line at the edge of a window that lies inside the image
            filled = out
        start, place = self.random.randint(0, side - taken), self.random.randint(0, out - filled)
        if center is not None:
            start = min(max(0, center - taken // 2), side - taken)
        return Axis(slice(start, start + taken), slice(place, place + filled))


def _placed(pixels: Pixels, window: Window, fill: tuple[int, ...]) -> Pixels:
    """Put what was cut out at its place in the result, and fill the rest."""
    top, left = window.rows.placed.start, window.cols.placed.start
    bottom, right = window.size[0] - window.rows.placed.stop, window.size[1] - window.cols.placed.stop
    if not any((top, bottom, left, right)):
        return pixels
    return np.asarray(cv2.copyMakeBorder(pixels, top, bottom, left, right, cv2.BORDER_CONSTANT, value=fill), np.uint8)


def snapped(window: Window, factor: int, size: tuple[int, int]) -> Window:
    """Move the edges of a window to pixels of the reduced image, so that image and mask stay aligned."""
    if factor == 1:
        return window
    axes = []
    for axis, side in zip((window.rows, window.cols), size, strict=True):
        start = axis.taken.start // factor * factor
        stop = min(side, max(start + factor, round(axis.taken.stop / factor) * factor))
        axes.append(Axis(slice(start, stop), axis.placed))
    return Window(window.size, window.scale, *axes)


def largest_share(mask: Pixels) -> float:
    """Return the share of the commonest class among the labeled pixels, 0..1; 1 where nothing is labeled."""
    step = max(1, min(mask.shape) // 256)  # an estimate is enough, so large windows are thinned out
    thinned = np.ascontiguousarray(mask[::step, ::step])
    counts = cv2.calcHist([thinned], [0], None, [IGNORE_INDEX], [0, IGNORE_INDEX])  # faster than numpy's bincount
    labeled = float(counts.sum())
    return float(counts.max()) / labeled if labeled else 1.0


def resize(image: Pixels, mask: Pixels | None, scale: float) -> tuple[Pixels, Pixels | None]:
    """Resize an image and its mask by a factor.

    Args:
        image: Pixels (h, w, 3).
        mask: Train ids (h, w), or None.
        scale: Factor on both sides; 1.0 returns both untouched.

    Returns:
        Both with sides round(h * scale), round(w * scale), at least 1.
    """
    if scale == 1.0:
        return image, mask
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return resize_image(image, height, width), None if mask is None else resize_mask(mask, height, width)


def resize_image(image: Pixels, height: int, width: int) -> Pixels:
    """Resize pixels (h, w, 3) bilinearly, or to less than half by averages, since nothing must be skipped."""
    skips = 2 * height < image.shape[0] or 2 * width < image.shape[1]
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if skips else cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8)


def resize_mask(mask: Pixels, height: int, width: int) -> Pixels:
    """Resize train ids (h, w) to those at the nearest pixel centers; no new values appear.

    Of two centers equally near, the later is taken, in whole numbers: OpenCV's INTER_NEAREST_EXACT has changed sides
    between versions 4 and 5, and its INTER_NEAREST takes the corner of each pixel, which shifts labels by half a pixel.
    """
    rows = (2 * np.arange(height) + 1) * mask.shape[0] // (2 * height)
    cols = (2 * np.arange(width) + 1) * mask.shape[1] // (2 * width)
    return np.asarray(mask[rows].take(cols, axis=1), np.uint8)


def seed_transform(transform: Transform, seed: tuple[int, ...]) -> None:
    """Make the next call of our own or albumentations' transforms depend on a seed alone; leave others as they are.

    `set_random_seed` would give every transform of a Compose the same numbers, so that bright images were large ones;
    here they share one stream.
    """
    if isinstance(transform, TrainAugmentation):
        transform.seed(seed)
    elif isinstance(transform, A.BaseCompose | A.BasicTransform):
        transform.set_random_state(*_streams(seed))


def _streams(seed: tuple[int, ...]) -> tuple[np.random.Generator, random.Random]:
    """Return the two generators that albumentations draws from."""
    generator = np.random.default_rng(seed)
    return generator, random.Random(int(generator.integers(2**63)))


def _length(window: slice) -> int:
    return int(window.stop - window.start)
