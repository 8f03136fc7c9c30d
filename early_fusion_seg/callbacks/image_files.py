"""Helpers of the callbacks that write images: tensors as arrays, and file paths that stay inside a folder."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from early_fusion_seg.errors import UserError
from early_fusion_seg.visualize import Pixels


def to_pixels(image: Tensor) -> Pixels:
    """Convert an image (3, h, w), uint8 in 0..255 or floats in 0..1, to an array (h, w, 3) uint8."""
    if image.is_floating_point():
        image = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return cast(Pixels, image.permute(1, 2, 0).cpu().numpy())


def path_inside(folder: Path, name: str) -> Path:
    """Return `folder / name`.

    Raises:
        UserError: The path leads outside of the folder, for example through `..` or a symbolic link.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{name} would be written outside of {folder}; rename the image")
    return path
