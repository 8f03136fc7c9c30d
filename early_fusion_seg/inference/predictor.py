"""Predictor: from images to label maps or class probabilities at the size of the images.

Every way from a network to labels uses it: validate, test, predict, submit and Python. An image is resized, passes the
network whole or in windows, once or several times, and comes out at its own size, a rectangle at a time, so that scores
of all classes and pixels are never stored as a whole.

Windows are blended with weights that are 1 in the middle of a window and fall linearly to 0 within the middle half of
each overlap. The outer quarter of an overlap has the weight 0, because the network sees no pixels beyond the window.
The weights of all windows that cover a pixel sum to 1.

Shapes: n images of h x w pixels, K classes, rectangles of R x C pixels.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from early_fusion_seg.inference.settings import InferenceSettings
from early_fusion_seg.logits import LazyLogits

Size = tuple[int, int]
Forward = Callable[[Tensor], LazyLogits]


class Rectangle(NamedTuple):
    """Scores of a part of the images.

    Attributes:
        place: Slices of images, rows and columns.
        scores: (n, R, C, K) float32: class probabilities, or logits where these suffice.
    """

    place: tuple[slice, slice, slice]
    scores: Tensor


class Axis(NamedTuple):
    """One axis of a window: first and last pixel (exclusive), and the pixels shared with the one before and after."""

    start: int
    stop: int
    before: int
    after: int


class Predictor:
    """Segment images.

    Args:
        forward: Computes lazy logits of images (n, 3, h, w).
        settings: Input sizes, flip, scales and windows.
        stride: Windows start at multiples of it, the coarsest stride of the network.
        temperature: Divides the logits before the softmax.
        device: Where the network is; images may be elsewhere, and are moved window by window.
    """

    def __init__(
        self,
        forward: Forward,
        settings: InferenceSettings,
        stride: int,
        temperature: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.forward, self.settings, self.stride = forward, settings, stride
        self.temperature, self.device = temperature, torch.device(device)

    def labels(self, images: Tensor) -> Tensor:
        """Return label maps (n, h, w) uint8 of images (n, 3, h, w), on the device of the network."""
        return self.labels_and_confidence(images, confidence=False)[0]

    @torch.no_grad()
    def labels_and_confidence(self, images: Tensor, confidence: bool = True) -> tuple[Tensor, Tensor | None]:
        """Return label maps and the probability of each label.

        Args:
            images: (n, 3, h, w) RGB, uint8 or floats in 0..1.
            confidence: Compute the probabilities.

        Returns:
            (n, h, w) uint8, and (n, h, w) uint8 with 255 for a probability of 1, or None.
        """
        n, _, h, w = images.shape
        labels = torch.empty(n, h, w, dtype=torch.uint8, device=self.device)
        certain = torch.empty_like(labels) if confidence else None
        for place, scores in self.rectangles(images, probabilities=confidence):
            if certain is None:
                labels[place] = scores.argmax(-1)
            else:
                highest, labels[place] = scores.max(-1)
                certain[place] = (255 * highest).round()
        return labels, certain

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return class probabilities (n, K, h, w) float16, on the CPU."""
        n, _, h, w = images.shape
        result: Tensor | None = None
        for place, scores in self.rectangles(images, probabilities=True):
            if result is None:
                result = torch.empty(n, scores.shape[-1], h, w, dtype=torch.float16)
            result[place[0], :, place[1], place[2]] = scores.movedim(-1, 1).half().cpu()
        assert result is not None
        return result

    def rectangles(self, images: Tensor, probabilities: bool = False) -> Iterator[Rectangle]:
        """Yield the scores of all pixels, each exactly once.

        Args:
            images: (n, 3, h, w).
            probabilities: Yield class probabilities also where logits give the same labels.
        """
        size = images.shape[-2], images.shape[-1]
        window = self.settings.windows(size)
        if window is None:
            yield from self._whole(images, self.settings.factor(size), probabilities)
            return
        for i in range(len(images)):
            for rows, cols, scores in self._blended(images[i : i + 1], window):
                yield Rectangle((slice(i, i + 1), rows, cols), scores)

    def lazy_logits(self, images: Tensor) -> LazyLogits:
        """Return the lazy logits of whole images at their input size, for a loss."""
        return self.forward(resized(images.to(self.device), self.settings.factor((images.shape[-2], images.shape[-1]))))

    def _whole(self, images: Tensor, factor: float, probabilities: bool) -> Iterator[Rectangle]:
        """Yield the scores of images that pass whole, averaged over the passes."""
        images = images.to(self.device)
        size, passes = (images.shape[-2], images.shape[-1]), []
        for scale, flip in self.settings.passes:
            given = resized(images, factor * scale)
            passes.append((self.forward(given.flip(-1) if flip else given), flip))
        for rows in passes[0][0].chunks(size):
            parts = (
                _unflipped(lazy.upsampled(size, rows), flip, self.temperature, probabilities or len(passes) > 1)
                for lazy, flip in passes
            )
            scores = next(parts)
            for part in parts:
                scores = scores + part
            place = rows[0], slice(*rows[1:]), slice(0, size[1])
            yield Rectangle(place, scores / len(passes) if len(passes) > 1 else scores)

    def _blended(self, image: Tensor, window: Size) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows, columns and scores of one image that passes in windows.

        Only the overlaps are kept between windows: `left`, with the window before, and `above`, with the row before.
        """
        size = image.shape[-2], image.shape[-1]
        factor = self.settings.factor(size)
        rows, cols = (
            axes(length, side, self.settings.overlap, factor, self.stride)
            for length, side in zip(size, window, strict=True)
        )
        above: Tensor | None = None
        for row in rows:
            below = None
            left: Tensor | None = None
            for col in cols:
                scores = self._weighted_window(image, row, col, factor)
                if left is not None:
                    scores[:, :, : col.before] += left
                left = scores[:, :, col.stop - col.after - col.start :].clone()
                done = slice(col.start, col.stop - col.after)
                scores = scores[:, :, : done.stop - done.start]
                if above is not None:
                    scores[:, : row.before] += above[:, :, done]
                if row.after:
                    if below is None:
                        below = scores.new_empty(1, row.after, size[1], scores.shape[-1])
                    below[:, :, done] = scores[:, row.stop - row.after - row.start :]
                yield slice(row.start, row.stop - row.after), done, scores[:, : row.stop - row.after - row.start]
            above = below

    def _weighted_window(self, image: Tensor, row: Axis, col: Axis, factor: float) -> Tensor:
        """Return the class probabilities of a window times its weights."""
        crop = image[..., row.start : row.stop, col.start : col.stop]
        result: Tensor | None = None
        for place, scores in self._whole(crop, factor, probabilities=True):
            if result is None:
                result = scores.new_empty(1, crop.shape[-2], crop.shape[-1], scores.shape[-1])
            result[place] = scores
        assert result is not None
        result *= weights(row, result.device)[:, None, None]
        result *= weights(col, result.device)[:, None]
        return result


def resized(images: Tensor, factor: float) -> Tensor:
    """Resize images (n, 3, h, w) like the training data: bilinear, or averaging to less than half the size.

    Returns:
        (n, 3, round(h * factor), round(w * factor)), at least one pixel, of the dtype of the images.
    """
    size = tuple(max(1, round(side * factor)) for side in images.shape[-2:])
    if size == images.shape[-2:]:
        return images
    pixels = images if images.is_floating_point() else images.float()
    result = F.interpolate(pixels, size, mode="bilinear", antialias=factor < 0.5)
    return result if images.is_floating_point() else result.round().to(images.dtype)


def axes(length: int, side: int, overlap: int, factor: float, stride: int) -> list[Axis]:
    """Divide one axis of an image into windows.

    Args:
        length: Of the axis in pixels.
        side: Of a window, after resizing.
        overlap: Of neighboring windows, after resizing.
        factor: Resize factor.
        stride: The resized windows start at multiples of it, as far as pixels allow.
    """
    side = -(-side // stride) * stride
    overlap = min(-(-overlap // stride) * stride, side // 2 // stride * stride)
    step = side - overlap
    count = max(1, -(-(round(length * factor) - overlap) // step))
    starts = [round(i * step / factor) for i in range(count)]
    stops = [min(length, round((i * step + side) / factor)) for i in range(count - 1)] + [length]
    shared = [stop - start for start, stop in zip(starts[1:], stops[:-1], strict=True)]
    return [Axis(*window) for window in zip(starts, stops, [0, *shared], [*shared, 0], strict=True)]


def weights(axis: Axis, device: torch.device) -> Tensor:
    """Return the weights of a window along one axis."""
    result = torch.ones(axis.stop - axis.start, device=device)
    if axis.before:
        result[: axis.before] = ramp(axis.before)
    if axis.after:
        result[len(result) - axis.after :] = 1 - ramp(axis.after)
    return result


def ramp(length: int) -> Tensor:
    """Return weights that rise linearly from 0 to 1 in the middle half of an overlap."""
    position = (torch.arange(length) + 0.5) / length
    return ((position - 0.25) * 2).clamp(0, 1)


def _unflipped(rows: Tensor, flip: bool, temperature: float, softmax: bool) -> Tensor:
    """Return the scores (n, R, W, K) of a pass in the orientation of the image, as probabilities if asked."""
    rows = rows.flip(2) if flip else rows
    return (rows / temperature).softmax(-1) if softmax else rows
