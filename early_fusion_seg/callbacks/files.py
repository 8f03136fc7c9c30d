"""Images as arrays, and files that are whole or absent."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from early_fusion_seg.errors import UserError
from early_fusion_seg.visualize import Pixels


def pixels(image: Tensor) -> Pixels:
    """Turn an image (3, h, w), uint8 or floats in 0..1, into (h, w, 3) uint8."""
    if image.is_floating_point():
        image = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return cast(Pixels, image.permute(1, 2, 0).cpu().numpy())


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name`.

    Raises:
        UserError: That is not inside the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{name} would be written outside of {folder}; rename the image")
    return path
