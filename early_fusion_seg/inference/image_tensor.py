"""Images of any kind as tensors."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from early_fusion_seg.errors import UserError
from early_fusion_seg.io.images import Picture, read_image, to_rgb_array

Images = Picture | Tensor | Sequence[Picture | Tensor]
Result = TypeVar("Result")


def image_tensor(image: Picture | Tensor) -> Tensor:
    """Read an image, or convert one that is in memory.

    Args:
        image: Path of a file, PIL image, array (h, w, 3) or (h, w), or tensor (3, h, w), which is returned as it is.

    Returns:
        A tensor (3, h, w) of RGB pixels: uint8, or floats if the image has floats.

    Raises:
        UserError: The image cannot be read, or has another type or shape.
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise UserError(f"the tensor has the shape {tuple(image.shape)}; expected (3, h, w)")
        return image
    if isinstance(image, Path | str):
        if "://" in str(image):
            raise UserError(f"{image} is a web address; download the image and give the path of the file")
        if Path(image).is_dir():
            raise UserError(
                f"{image} is a folder; give a list of files, or use early-fusion-seg predict --data.root {image}"
            )
        pixels = read_image(image)
    elif isinstance(image, np.ndarray | Image.Image):
        pixels = to_rgb_array(image)
    else:
        raise UserError(f"an image is a {type(image).__name__}; expected an array, a tensor, a PIL image or a path")
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def for_each_image(function: Callable[[Tensor], Result], images: Images) -> Result | list[Result]:
    """Call a function with each image as a tensor (1, 3, h, w).

    Args:
        function: Called with one image at a time.
        images: One image as in `image_tensor`, or several: a list of them, or a tensor (n, 3, h, w).

    Returns:
        The result for one image; a list of the results for several.

    Raises:
        UserError: An image cannot be read, or has another type or shape.
    """

    def one(image: Picture | Tensor) -> Result:
        return function(image_tensor(image)[None])

    if isinstance(images, Tensor):
        if images.ndim not in (3, 4) or images.shape[-3] != 3:
            raise UserError(f"the tensor has the shape {tuple(images.shape)}; expected (3, h, w) or (n, 3, h, w)")
        return one(images) if images.ndim == 3 else [one(image) for image in images]
    if isinstance(images, np.ndarray | Image.Image | Path | str) or not isinstance(images, Iterable):
        return one(images)
    return [one(image) for image in images]
