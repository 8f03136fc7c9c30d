"""Bilinear upsampling of a range of rows, so that full-resolution logits are never stored as a whole.

Channels come last: PyTorch's bilinear CPU kernels are about three times as fast in this layout.

Shapes: n images, K classes, h x w low resolution, H x W full resolution, R rows of a chunk.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Maximum number of elements of a chunk of upsampled logits: 16 MiB in float32."""

MIN_ROWS = 32
"""Minimum rows per image in a chunk of several images; with fewer, overlapping rows would cost too much."""


def row_chunks(n: int, k: int, size: tuple[int, int], parts: int = 1) -> Iterator[tuple[slice, int, int]]:
    """Yield chunks (images, first row, row after the last) that cover (n, K, H, W), each at least one row.

    A chunk has as many images as possible with MIN_ROWS rows or more, because PyTorch's bilinear CPU kernels use one
    thread per image.

    Args:
        n: Number of images.
        k: Number of classes K.
        size: (H, W).
        parts: Divisor of the maximum chunk size.
    """
    rows = max(1, CHUNK_ELEMENTS // parts // (k * size[1]))  # of a single image
    images = max(1, min(n, rows // min(size[0], MIN_ROWS)))
    rows //= images
    for i in range(0, n, images):
        for start in range(0, size[0], rows):
            yield slice(i, min(i + images, n)), start, min(start + rows, size[0])


def source_rows(h: int, scale: float, start: int, stop: int) -> tuple[int, int]:
    """Return the range of low-resolution rows from which the output rows start..stop are interpolated.

    Args:
        h: Total number of low-resolution rows.
        scale: Low-resolution rows per output row.
        start: First output row.
        stop: Output row after the last.
    """
    return _source(h, scale, start)[0], min(_source(h, scale, stop - 1)[0] + 2, h)


def upsample_rows(slab: Tensor, h: int, size: tuple[int, int], start: int, stop: int) -> Tensor:
    """Compute rows start..stop of a bilinear upsampling (`align_corners=False`) to `size`.

    Args:
        slab: (n, r, w, K), the rows `source_rows(h, h / H, start, stop)` of the input.
        h: Height of the whole input.
        size: (H, W).
        start: First output row.
        stop: Output row after the last.

    Returns:
        (n, stop - start, W, K).
    """
    rows, first = uncropped_rows(slab, h, size, start, stop)
    return rows[:, first : first + stop - start]


def uncropped_rows(slab: Tensor, h: int, size: tuple[int, int], start: int, stop: int) -> tuple[Tensor, int]:
    """Compute a tensor that includes the result of `upsample_rows`; the arguments are the same.

    Returns:
        (n, r', W, K) and the position of row `start` in it. Rows outside of start..stop may be wrong.
    """
    height, width = size
    first = source_rows(h, h / height, start, stop)[0]
    if size == (h, slab.shape[2]):
        return slab, start - first
    ratio = height // h
    if height == h * ratio and slab.shape[1] * ratio <= 2 * (stop - start):  # else unneeded rows cost more
        return resize(slab, (slab.shape[1] * ratio, width)), start - first * ratio
    places = [_source(h, h / height, row) for row in range(start, stop)]
    upper = torch.tensor([i - first for i, _ in places], device=slab.device)  # (R,)
    lower = (upper + 1).clamp(max=slab.shape[1] - 1)
    weight = torch.tensor([t for _, t in places], dtype=slab.dtype, device=slab.device)[:, None, None]  # (R, 1, 1)
    rows = torch.lerp(slab.index_select(1, upper), slab.index_select(1, lower), weight)  # (n, R, w, K)
    return resize(rows, (stop - start, width)), 0


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (n, h, w, K) bilinearly to (n, H, W, K)."""
    return F.interpolate(x.movedim(-1, 1), size=size, mode="bilinear", align_corners=False).movedim(1, -1)


def _source(h: int, scale: float, row: int) -> tuple[int, float]:
    """Return the low-resolution row above the center of output row `row`, and the distance (0..1) between the two."""
    position = max((row + 0.5) * scale - 0.5, 0.0)
    index = min(math.floor(position), h - 1)
    return index, position - index
