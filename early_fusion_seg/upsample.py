"""Bilinear upsampling a few rows at a time, so that logits at full resolution never exist as a whole.

Shapes: n images, K classes, h x w low resolution, H x W full resolution, R rows of a chunk.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Numbers in one chunk of upsampled logits: 16 MiB in float32."""


def row_chunks(logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the row chunks of an (n, K, H, W) upsampling of `logits`, at least one row each."""
    n, k = logits.shape[:2]
    rows = max(1, CHUNK_ELEMENTS // (n * k * size[1]))
    for start in range(0, size[0], rows):
        yield start, min(start + rows, size[0])


def source_rows(h: int, height: int, start: int, stop: int) -> tuple[int, int]:
    """Return the range of the `h` low-resolution rows that rows start..stop of `height` are made from."""
    return _source(h, height, start)[0], min(_source(h, height, stop - 1)[0] + 2, h)


def upsample_rows(slab: Tensor, h: int, size: tuple[int, int], start: int, stop: int) -> Tensor:
    """Compute rows start..stop of `F.interpolate(logits, size, mode="bilinear", align_corners=False)` in float32.

    Args:
        slab: (n, K, r, w) rows `source_rows(h, size[0], start, stop)` of the logits.
        h: Height of the whole logits.
        size: (H, W).
        start: First row, of H.
        stop: Row after the last.

    Returns:
        (n, K, stop - start, W) float32.
    """
    slab = slab.float()
    first = source_rows(h, size[0], start, stop)[0]
    places = [_source(h, size[0], row) for row in range(start, stop)]
    upper = torch.tensor([i - first for i, _ in places], device=slab.device)  # (R,)
    lower = (upper + 1).clamp(max=slab.shape[2] - 1)
    weight = torch.tensor([t for _, t in places], dtype=torch.float32, device=slab.device)[:, None]  # (R, 1)
    rows = torch.lerp(slab.index_select(2, upper), slab.index_select(2, lower), weight)  # (n, K, R, w)
    return F.interpolate(rows, size=(stop - start, size[1]), mode="bilinear", align_corners=False)


def _source(h: int, height: int, row: int) -> tuple[int, float]:
    """Return the low-resolution row above the centre of `row`, and how far below it that centre lies (0..1)."""
    position = max((row + 0.5) * h / height - 0.5, 0.0)
    index = min(math.floor(position), h - 1)
    return index, position - index
