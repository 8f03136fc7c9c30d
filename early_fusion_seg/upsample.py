"""Bilinear upsampling a few rows at a time, so that logits at full resolution never exist as a whole.

Channels come last here: PyTorch's bilinear kernels for the CPU are about three times as fast then.

Shapes: n images, K classes, h x w low resolution, H x W full resolution, R rows of a chunk.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Numbers in one chunk of upsampled logits: 16 MiB in float32."""

MIN_ROWS = 32
"""Rows of an image in one chunk, before it has several images: rows at a chunk's ends are made twice."""


def row_chunks(n: int, k: int, size: tuple[int, int], share: int = 1) -> Iterator[tuple[slice, int, int]]:
    """Yield the (images, first row, row after the last) of chunks of (n, K, H, W) numbers, at least one row each.

    `share` makes them that many times smaller.
    Fewer rows of more images, down to MIN_ROWS: PyTorch's bilinear kernels for the CPU have a thread for each image.
    """
    rows = max(1, CHUNK_ELEMENTS // share // (k * size[1]))  # of one image
    images = max(1, min(n, rows // min(size[0], MIN_ROWS)))
    rows //= images
    for i in range(0, n, images):
        for start in range(0, size[0], rows):
            yield slice(i, min(i + images, n)), start, min(start + rows, size[0])


def source_rows(h: int, scale: float, start: int, stop: int) -> tuple[int, int]:
    """Return the range of `h` low-resolution rows that rows start..stop are made from, `scale` of them for each row."""
    return _source(h, scale, start)[0], min(_source(h, scale, stop - 1)[0] + 2, h)


def upsample_rows(slab: Tensor, h: int, size: tuple[int, int], start: int, stop: int) -> Tensor:
    """Compute rows start..stop of a bilinear upsampling (`align_corners=False`) to `size`.

    Args:
        slab: (n, r, w, K) rows `source_rows(h, h / H, start, stop)` of what is upsampled.
        h: Its height as a whole.
        size: (H, W).
        start: First row, of H.
        stop: Row after the last.

    Returns:
        (n, stop - start, W, K).
    """
    fine, first = uncut_rows(slab, h, size, start, stop)
    return fine[:, first : first + stop - start]


def uncut_rows(slab: Tensor, h: int, size: tuple[int, int], start: int, stop: int) -> tuple[Tensor, int]:
    """Compute what `upsample_rows` cuts its rows out of.

    Returns:
        (n, r', W, K), and where in it row `start` is. The rows before that one and after `stop` are wrong at the ends.
    """
    height, width = size
    first = source_rows(h, h / height, start, stop)[0]
    if size == (h, slab.shape[2]):
        return slab, start - first
    ratio = height // h
    if height == h * ratio and slab.shape[1] * ratio <= 2 * (stop - start):  # else rows that nobody needs cost more
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
    """Return the low-resolution row above the center of `row`, and how far below it that center lies (0..1)."""
    position = max((row + 0.5) * scale - 0.5, 0.0)
    index = min(math.floor(position), h - 1)
    return index, position - index
