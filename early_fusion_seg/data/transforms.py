"""Augmentation with albumentations: random scale, a crop that avoids windows of one class, flip, colour.

Random scale (0.5 to 2) and the rule that at most 75 % of a crop belong to one class are those of mmsegmentation's
`RandomResize` and `RandomCrop(cat_max_ratio=0.75)`. Only the window is resized, not the whole image, so that a small
crop of a large photograph is cheap.

Shapes: images are (h, w, 3) uint8, masks (h, w) uint8 with 255 = ignored.
"""

import os
import random
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # without it the next line asks the internet for a newer version
import albumentations as A  # after the line above; the name is the library's own custom

from early_fusion_seg.labels import IGNORE_INDEX

Pixels = NDArray[np.uint8]
Transform = Callable[..., dict[str, Any]]

FILL = (124, 116, 104)  # ImageNet's mean colour, which normalisation turns into about zero


def default_train_transform(
    crop_size: tuple[int, int] | None,
    random_scale: tuple[float, float] = (0.5, 2.0),
    short_side: int | None = None,
) -> A.Compose:
    """Make the augmentation that training uses unless told otherwise.

    Args:
        crop_size: Height and width of the result in pixels; None for the size of each image.
        random_scale: Lowest and highest factor.
        short_side: Pixels to which the shorter side is brought before; None: it stays.

    Returns:
        A transform that takes `image` and `mask` and returns both, uint8.
    """
    return A.Compose(
        [
            RandomScaleCrop(crop_size, random_scale, short_side),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.03, p=0.8),
        ]
    )


class RandomScaleCrop(A.DualTransform):  # type: ignore[misc]  # albumentations has no complete types
    """Scale at random and cut out one window, as a single resize of that window.

    Where the scaled image is smaller than the window, it lies at a random place in it and the rest is filled, ignored
    in the mask. A window of which one class has more than `max_share` of the labelled pixels is drawn again.

    Args:
        crop_size: Height and width of the window in pixels; None for those of the image.
        scale: Lowest and highest factor, uniformly drawn.
        short_side: Pixels of the shorter side to which the factor refers; None: the image's own.
        max_share: Highest share of one class, 0..1.
        tries: Windows drawn at most; the last one is taken as it is.
    """

    def __init__(
        self,
        crop_size: tuple[int, int] | None,
        scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
        max_share: float = 0.75,
        tries: int = 10,
    ) -> None:
        super().__init__(p=1.0)
        self.crop_size = crop_size
        self.scale = scale
        self.short_side = short_side
        self.max_share = max_share
        self.tries = tries

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the scale and the window."""
        height, width = params["shape"][:2]
        crop = self.crop_size or (height, width)
        scale = self.py_random.uniform(*self.scale)
        if self.short_side is not None:
            scale *= self.short_side / min(height, width)
        rows, cols = (self._draw(side, out, scale) for side, out in zip((height, width), crop, strict=True))
        for _ in range(self.tries - 1):
            if "mask" not in data or largest_share(data["mask"][rows[0], cols[0]]) <= self.max_share:
                break
            rows, cols = (self._draw(side, out, scale) for side, out in zip((height, width), crop, strict=True))
        return {"crop": crop, "rows": rows, "cols": cols}

    def apply(self, img: Pixels, crop: tuple[int, int], rows: Any, cols: Any, **_: Any) -> Pixels:
        """Cut, resize and place the image's window."""
        canvas = np.full((*crop, 3), FILL, np.uint8)
        window = img[rows[0], cols[0]]
        canvas[rows[1], cols[1]] = resize_image(window, _length(rows[1]), _length(cols[1]))
        return canvas

    def apply_to_mask(self, mask: Pixels, crop: tuple[int, int], rows: Any, cols: Any, **_: Any) -> Pixels:
        """Cut, resize and place the mask's window."""
        canvas = np.full(crop, IGNORE_INDEX, np.uint8)
        canvas[rows[1], cols[1]] = resize_mask(mask[rows[0], cols[0]], _length(rows[1]), _length(cols[1]))
        return canvas

    def _draw(self, side: int, out: int, scale: float) -> tuple[slice, slice]:
        """Draw a window of one axis: the pixels taken from a side, and their place among `out` pixels of the result."""
        taken = min(side, max(1, round(out / scale)))
        filled = min(out, max(1, round(taken * scale)))
        if taken < side:  # rounding must not leave a filled line at the edge of a window that lies inside the image
            filled = out
        start, place = self.py_random.randint(0, side - taken), self.py_random.randint(0, out - filled)
        return slice(start, start + taken), slice(place, place + filled)


def largest_share(mask: Pixels) -> float:
    """Return the share of the commonest class among the labelled pixels, 0..1; 1 where nothing is labelled."""
    step = max(1, min(mask.shape) // 256)  # an estimate is enough, so large windows are thinned out
    counts = np.bincount(mask[::step, ::step].ravel(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    labelled = int(counts.sum())
    return float(counts.max() / labelled) if labelled else 1.0


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
    """Resize pixels (h, w, 3), averaging where it shrinks (so that nothing aliases) and bilinearly where it grows."""
    shrinks = height * width < image.shape[0] * image.shape[1]
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8)


def resize_mask(mask: Pixels, height: int, width: int) -> Pixels:
    """Resize train ids (h, w) to those at the nearest pixel centres; no new values appear."""
    # INTER_NEAREST takes the corner of each pixel, which shifts labels by half a pixel against the image
    return np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)


def seed_transform(transform: Transform, seed: tuple[int, ...]) -> None:
    """Make the next call of an albumentations transform depend on a seed alone; leave other callables as they are.

    `set_random_seed` would give every transform of a Compose the same numbers, so that bright images were large ones;
    here they share one stream.
    """
    if isinstance(transform, A.BaseCompose | A.BasicTransform):
        generator = np.random.default_rng(seed)
        transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))


def _length(window: slice) -> int:
    return int(window.stop - window.start)
