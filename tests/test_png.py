from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from early_fusion_seg.io.png import row_bands, write_png


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (300, 41), (1, 1, 3), (7, 5, 3), (300, 41, 3)])
@pytest.mark.parametrize("band", [1, 64, 2**20])
def test_pillow_reads_the_same_pixels(
    shape: tuple[int, ...], band: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("early_fusion_seg.io.png.BAND_PIXELS", band)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    bands = [pixels[rows] for rows in row_bands(*shape[:2])]
    assert max(part[..., :1].size for part in bands) <= max(
        band * pixels[..., :1].size // pixels[..., :1].size, shape[1]
    )
    write_png(tmp_path / "a.png", len(pixels), bands)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == ("RGB" if len(shape) == 3 else "L")
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_smooth_pictures_are_compressed(tmp_path: Path) -> None:
    wave = np.sin(np.arange(200) / 20)
    pixels = (127 * (1 + wave[:, None, None] * wave[:, None] * np.ones(3))).astype(np.uint8)
    write_png(tmp_path / "a.png", 200, [pixels])
    assert (tmp_path / "a.png").stat().st_size < pixels.size / 3
