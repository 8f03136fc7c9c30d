"""Bilinear upsampling of a range of rows, so that full-resolution logits never exist as a whole.

Channels come last: PyTorch's bilinear CPU kernels are about three times as fast in this layout.

Shapes: n images, K classes, h x w low resolution, H x W full resolution, R rows of a chunk.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Elements of a chunk of upsampled logits: 16 MiB in float32."""

MIN_ROWS = 32
"""Rows per image in a chunk before the chunk spans several images: rows at the ends of a chunk are computed twice."""


def row_chunks(n: int, k: int, size: tuple[int, int], share: int = 1) -> Iterator[tuple[slice, int, int]]:
    """Yield chunks (images, first row, row after the last) that cover (n, K, H, W), at least one row each.

    A chunk prefers fewer rows of more images, down to MIN_ROWS, because PyTorch's bilinear CPU kernels use one thread
    per image.

    Args:
        n: Images.
        k: Classes K.
        size: (H, W).
        share: Divides the size of a chunk.
    """
    rows = max(1, CHUNK_ELEMENTS // share // (k * size[1]))  # of one image
    images = max(1, min(n, rows // min(size[0], MIN_ROWS)))
    rows //= images
    for i in range(0, n, images):
        for start in range(0, size[0], rows):
            yield slice(i, min(i + images, n)), start, min(start + rows, size[0])


def source_rows(h: int, scale: float, start: int, stop: int) -> tuple[int, int]:
    """Return the range of low-resolution rows that the output rows start..stop are interpolated from.

    Args:
        h: Low-resolution rows in all.
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
        start: First row, of H.
        stop: Row after the last.

    Returns:
        (n, stop - start, W, K).
    """
    rows, first = uncropped_rows(slab, h, size, start, stop)
    return rows[:, first : first + stop - start]


def uncropped_rows(slab: Tensor, h: int, size: tuple[int, int], start: int, stop: int) -> tuple[Tensor, int]:
    """Compute the tensor that `upsample_rows` crops; arguments as there.

    Returns:
        (n, r', W, K) and the position of row `start` in it. Rows before that position and after `stop` may be wrong.
    """
    height, width = size
    first = source_rows(h, h / height, start, stop)[0]
    if size == (h, slab.shape[2]):
        return slab, start - first
    ratio = height // h
    if height == h * ratio and slab.shape[1] * ratio <= 2 * (stop - start):  # else the unneeded rows cost more
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
    """Return the low-resolution row above the center of `row`, and the distance (0..1) of the center below it."""
    position = max((row + 0.5) * scale - 0.5, 0.0)
    index = min(math.floor(position), h - 1)
    return index, position - index
