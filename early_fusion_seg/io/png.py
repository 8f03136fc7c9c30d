"""Write a PNG a few rows at a time, so that an image of any size takes little memory."""

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB, INDEXED = 0, 2, 3
"""Color types of the PNG specification."""
FAST = (1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)  # level to strategy, for pictures: several times as fast, a tenth larger
BAND_PIXELS = 2**20


def row_bands(height: int, width: int) -> Iterator[slice]:
    """Yield the rows of an image in bands of about a megapixel."""
    step = max(1, BAND_PIXELS // width)
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def write_png(path: str | Path, height: int, bands: Iterable[NDArray[np.uint8]], palette: Any = None) -> None:
    """Write a PNG.

    Args:
        path: The file.
        height: Number of rows.
        bands: The rows from top to bottom, in arrays (rows, w, 3) RGB or (rows, w) gray or indexed.
        palette: RGB colors (0..255) of an indexed image; numbers without a color are black.
    """
    with Path(path).open("wb") as file:
        file.write(SIGNATURE)
        pack = zlib.compressobj() if palette is not None else zlib.compressobj(*FAST)
        for i, band in enumerate(bands):
            if i == 0:
                _write_header(file, height, band, palette)
            _write_chunk(file, b"IDAT", pack.compress(_scanlines(band, palette is None)))
        _write_chunk(file, b"IDAT", pack.flush())
        _write_chunk(file, b"IEND", b"")


def _write_header(file: BinaryIO, height: int, band: NDArray[np.uint8], palette: Any) -> None:
    kind = INDEXED if palette is not None else RGB if band.ndim == 3 else GRAY
    _write_chunk(file, b"IHDR", struct.pack(">IIBBBBB", band.shape[1], height, 8, kind, 0, 0, 0))
    if palette is not None:
        colors = np.zeros((256, 3), np.uint8)
        colors[: len(palette)] = palette
        _write_chunk(file, b"PLTE", colors.tobytes())


def _scanlines(band: NDArray[np.uint8], subtract: bool) -> bytes:
    """Return rows as PNG stores them: a filter type, then the bytes, with `subtract` their differences (type 1)."""
    rows = band.reshape(len(band), -1)
    lines = np.empty((len(band), rows.shape[1] + 1), np.uint8)
    lines[:, 0] = subtract
    lines[:, 1:] = rows
    if subtract:
        step = rows.shape[1] // band.shape[1]  # bytes per pixel
        lines[:, 1 + step :] -= rows[:, :-step]
    return lines.tobytes()


def _write_chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind)
    file.write(data)
    file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))
