"""Predictor: from images to label maps or class probabilities at the size of the images.

Every way from a network to labels uses it: validate, test, predict, submit and Python. An image is resized, passes the
network whole or in windows, once or several times, and comes out at its own size, a rectangle at a time, so that scores
of all classes and pixels are never stored as a whole.

A network may have several heads on one encoder. Each of them has its own scores, or their mean is taken.

Shapes: n images of h x w pixels, K classes of a head, rectangles of R x C pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from early_fusion_seg.inference.settings import InferenceSettings
from early_fusion_seg.inference.windows import Axis, Blend, axes, weights
from early_fusion_seg.logits import Chunk, LazyLogits

Size = tuple[int, int]
Forward = Callable[[Tensor], Sequence[LazyLogits]]


class Rectangle(NamedTuple):
    """Scores of a part of the images.

    Attributes:
        place: Slices of images, rows and columns.
        scores: (n, R, C, K) float32: class probabilities, or logits where these suffice.
        head: Index of the head; 0 for the mean of all.
    """

    place: tuple[slice, slice, slice]
    scores: Tensor
    head: int


class Prediction(NamedTuple):
    """What a head predicts for n images; None is what was not asked for.

    Attributes:
        labels: (n, h, w) uint8, on the device of the network.
        confidence: (n, h, w) uint8, the probability of each label, 255 for a probability of 1.
        probabilities: (n, K, h, w) float16, on the CPU.
    """

    labels: Tensor
    confidence: Tensor | None = None
    probabilities: Tensor | None = None

    def outputs(self) -> dict[str, Tensor]:
        """Return what `predict_step` returns: a dict, without what was not asked for."""
        values = {"prediction": self.labels, "confidence": self.confidence, "probabilities": self.probabilities}
        return {name: value for name, value in values.items() if value is not None}


class Pass(NamedTuple):
    """One pass of images through the network: lazy logits of a head, whether the images were mirrored, temperature."""

    lazy_logits: LazyLogits
    flip: bool
    temperature: float


class Predictor:
    """Segment images.

    Args:
        forward: Computes the lazy logits of each head from images (n, 3, h, w).
        settings: Input sizes, flip, scales and windows.
        stride: Windows start at multiples of it, the coarsest stride of the network.
        temperatures: One for each head; it divides the logits before the softmax.
        device: Where the network is; images may be elsewhere, and are moved window by window.
        average: Average the class probabilities of the heads, which have the same classes, like those of further
            passes.
    """

    def __init__(
        self,
        forward: Forward,
        settings: InferenceSettings,
        stride: int,
        temperatures: Sequence[float] = (1.0,),
        device: torch.device | str = "cpu",
        average: bool = False,
    ) -> None:
        self.forward, self.settings, self.stride = forward, settings, stride
        self.temperatures, self.device, self.average = tuple(temperatures), torch.device(device), average

    def labels(self, images: Tensor) -> Tensor:
        """Return label maps (n, h, w) uint8 of images (n, 3, h, w), on the device of the network; of a single head."""
        (only,) = self.predictions(images)
        return only.labels

    def probabilities(self, images: Tensor) -> Tensor:
        """Return class probabilities (n, K, h, w) float16 of a single head, on the CPU."""
        (only,) = self.predictions(images, probabilities=True)
        assert only.probabilities is not None
        return only.probabilities

    @torch.no_grad()
    def predictions(self, images: Tensor, confidence: bool = False, probabilities: bool = False) -> list[Prediction]:
        """Return what each head predicts; with `average`, one prediction for all.

        Args:
            images: (n, 3, h, w) RGB, uint8 or floats in 0..1.
            confidence: Compute the probability of each label.
            probabilities: Compute the probabilities of all classes.
        """
        n, _, h, w = images.shape
        results: list[Prediction] = []
        averages = self._averages((h, w))
        for place, scores, head in self.rectangles(images):  # labels of logits: rounded probabilities can be equal
            if head == len(results):
                labels = torch.empty(n, h, w, dtype=torch.uint8, device=self.device)
                half = torch.empty(n, scores.shape[-1], h, w, dtype=torch.float16) if probabilities else None
                results.append(Prediction(labels, torch.empty_like(labels) if confidence else None, half))
            result = results[head]
            highest, result.labels[place] = scores.max(-1)
            temperature = self.temperatures[head]
            if result.confidence is not None:
                certain = highest if averages else (highest / temperature - (scores / temperature).logsumexp(-1)).exp()
                result.confidence[place] = (255 * certain).round()
            if result.probabilities is not None:
                shares = scores if averages else (scores / temperature).softmax(-1)
                result.probabilities[place[0], :, place[1], place[2]] = shares.movedim(-1, 1).half().cpu()
        return results

    def rectangles(self, images: Tensor, probabilities: bool = False) -> Iterator[Rectangle]:
        """Yield the scores of all pixels, each exactly once for each head.

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
            yield from self._in_windows(images, i, window)

    def lazy_logits(self, images: Tensor) -> LazyLogits:
        """Return the lazy logits of whole images at their input size, for a loss; of a single head."""
        factor = self.settings.factor((images.shape[-2], images.shape[-1]))
        (only,) = self.forward(resized(images.to(self.device), factor))
        return only

    def _averages(self, size: Size) -> bool:
        """Return whether the scores of images of a size are means of probabilities: of windows, passes or heads."""
        several = len(self.settings.passes) > 1 or (self.average and len(self.temperatures) > 1)
        return several or self.settings.windows(size) is not None

    def _whole(self, images: Tensor, factor: float, probabilities: bool) -> Iterator[Rectangle]:
        """Yield the scores of images that pass whole, averaged over the passes."""
        images = images.to(self.device)
        size = (images.shape[-2], images.shape[-1])
        for head, passes in enumerate(self._passes(images, factor)):
            for rows in passes[0].lazy_logits.chunks(size):
                parts = (_scores(one, size, rows, probabilities or len(passes) > 1) for one in passes)
                scores = next(parts)
                for part in parts:
                    scores = scores + part
                place = rows[0], slice(*rows[1:]), slice(0, size[1])
                yield Rectangle(place, scores / len(passes) if len(passes) > 1 else scores, head)

    def _passes(self, images: Tensor, factor: float) -> list[list[Pass]]:
        """Pass images through the network; return the passes of each head, or of all heads in one list."""
        heads: list[list[Pass]] = [[] for _ in self.temperatures]
        for scale, flip in self.settings.passes:
            given = resized(images, factor * scale)
            outputs = self.forward(given.flip(-1) if flip else given)
            for passes, lazy_logits, temperature in zip(heads, outputs, self.temperatures, strict=True):
                passes.append(Pass(lazy_logits, flip, temperature))
        return [list(chain(*heads))] if self.average else heads

    def _in_windows(self, images: Tensor, i: int, window: Size) -> Iterator[Rectangle]:
        """Yield the scores of image i, which passes in windows."""
        image = images[i : i + 1]
        size = image.shape[-2], image.shape[-1]
        factor = self.settings.factor(size)
        rows, cols = (
            axes(length, side, self.settings.overlap, factor, self.stride)
            for length, side in zip(size, window, strict=True)
        )
        blends = [Blend(size[1]) for _ in range(1 if self.average else len(self.temperatures))]
        for row in rows:
            for col in cols:
                for head, scores in self._weighted_window(image, row, col, factor):
                    done, scores = blends[head].add(row, col, scores)
                    yield Rectangle((slice(i, i + 1), *done), scores, head)

    def _weighted_window(self, image: Tensor, row: Axis, col: Axis, factor: float) -> Iterator[tuple[int, Tensor]]:
        """Yield each head and its class probabilities of a window times the weights of the window."""
        crop = image[..., row.start : row.stop, col.start : col.stop]
        for head, parts in groupby(self._whole(crop, factor, probabilities=True), lambda part: part.head):
            result: Tensor | None = None
            for place, scores, _ in parts:
                if result is None:
                    result = scores.new_empty(1, crop.shape[-2], crop.shape[-1], scores.shape[-1])
                result[place] = scores
            assert result is not None
            result *= weights(row, result.device)[:, None, None]
            result *= weights(col, result.device)[:, None]
            yield head, result


def resized(images: Tensor, factor: float) -> Tensor:
    """Resize images (n, 3, h, w) like the training data: bilinear, or averaging to less than half the size.

    Pixels are not rounded: where two programs differ in the last digit, one would get another gray level.

    Returns:
        (n, 3, round(h * factor), round(w * factor)), at least one pixel, as floats in 0..1; images that keep their size
        are returned as they are.
    """
    size = tuple(max(1, round(side * factor)) for side in images.shape[-2:])
    if size == images.shape[-2:]:
        return images
    return interpolated(images if images.is_floating_point() else images / 255, size, factor)


def interpolated(pixels: Tensor, size: Sequence[int], factor: float) -> Tensor:
    """Resize floats in 0..1 (n, 3, h, w) to `size`, about `factor` times theirs; the exported graph resizes so too."""
    return F.interpolate(pixels, size, mode="bilinear", antialias=factor < 0.5).clamp(0, 1)


def _scores(one: Pass, size: Size, rows: Chunk, softmax: bool) -> Tensor:
    """Return the scores (n, R, W, K) of a pass in the orientation of the image, as probabilities if asked."""
    scores = one.lazy_logits.upsampled(size, rows)
    scores = scores.flip(2) if one.flip else scores
    return (scores / one.temperature).softmax(-1) if softmax else scores
