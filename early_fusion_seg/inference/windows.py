"""Windows of an image: where they are, and how the scores of neighbors are blended where they overlap.

Windows are blended with weights that are 1 in the middle of a window and fall linearly to 0 within the middle half of
each overlap. The outer quarter of an overlap has the weight 0, because the network sees no pixels beyond the window.
The weights of all windows that cover a pixel sum to 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """One axis of a window: first and last pixel (exclusive), and the pixels shared with the one before and after."""

    start: int
    stop: int
    before: int
    after: int


class Blend:
    """Adds up the windows of an image, which come row by row. Only the overlaps are kept between them.

    Args:
        width: Of the image in pixels.

    Attributes:
        left: Overlap with the window before.
        above: Overlap with the row before.
        below: Overlap with the next row, as far as it is known.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.left: Tensor | None = None
        self.above: Tensor | None = None
        self.below: Tensor | None = None

    def add(self, row: Axis, col: Axis, scores: Tensor) -> tuple[tuple[slice, slice], Tensor]:
        """Add the scores of a window; return rows and columns that no later window changes, and their scores."""
        if col.start == 0:
            self.left, self.above, self.below = None, self.below, None
        if self.left is not None:
            scores[:, :, : col.before] += self.left
        self.left = scores[:, :, col.stop - col.after - col.start :].clone()
        done = slice(col.start, col.stop - col.after)
        scores = scores[:, :, : done.stop - done.start]
        if self.above is not None:
            scores[:, : row.before] += self.above[:, :, done]
        if row.after:
            if self.below is None:
                self.below = scores.new_empty(1, row.after, self.width, scores.shape[-1])
            self.below[:, :, done] = scores[:, row.stop - row.after - row.start :]
        place = slice(row.start, row.stop - row.after), done
        return place, scores[:, : row.stop - row.after - row.start]


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
