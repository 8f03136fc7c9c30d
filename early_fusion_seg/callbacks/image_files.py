"""Helpers of the callbacks that write images: tensors as arrays, and image files in a folder of their own."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from early_fusion_seg.errors import UserError
from early_fusion_seg.io.atomic import replace_file
from early_fusion_seg.io.images import OUTPUT_MARK
from early_fusion_seg.visualize import Pixels


def to_pixels(image: Tensor) -> Pixels:
    """Convert an image (3, h, w), uint8 in 0..255 or floats in 0..1, to an array (h, w, 3) uint8."""
    if image.is_floating_point():
        image = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return cast(Pixels, image.permute(1, 2, 0).cpu().numpy())


NAME_ERRORS = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)  # the file system does not take the name


def write_image(folder: Path, key: str, write: Callable[[Path], object], suffix: str = ".png") -> str | None:
    """Write `folder/<key>.png`, and mark the folder as output, so that `predict` does not read it as photographs.

    Args:
        folder: Folder for files of this kind only; created if needed.
        key: Name of the image.
        write: Called with a temporary path.
        suffix: Suffix of the file.

    Returns:
        None; if the file system does not take the name, the reason.

    Raises:
        UserError: The path leads outside of the folder.
        OSError: The file cannot be written for another reason.
    """
    path = path_inside(folder, f"{key}{suffix}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OUTPUT_MARK).touch()
    try:
        replace_file(path, write)
    except OSError as error:
        if error.errno not in NAME_ERRORS:
            raise
        return f"{path} cannot be written ({error.strerror}); rename the image"
    return None


def path_inside(folder: Path, name: str) -> Path:
    """Return `folder / name`.

    Raises:
        UserError: The path leads outside of the folder, for example through `..` or a symbolic link.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{name} would be written outside of {folder}; rename the image")
    return path
