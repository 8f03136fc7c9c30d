"""Resample a feature map to another stride without shifting it, for encoders with a single stride.

Cell i of a map of stride s covers the pixels [i * s, (i + 1) * s), so its center is at pixel (i + 0.5) * s. For h x w
pixels the map has ceil(h / s) x ceil(w / s) cells.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def cells(pixels: int, stride: int) -> int:
    """Return ceil(pixels / stride), as an expression that exporters simplify where a convolution gives the same size.

    Example:
        >>> cells(33, 32)
        2
    """
    return 1 + (pixels - 1) // stride


def resample(x: Tensor, source: int, target: int, image_size: Sequence[int]) -> Tensor:
    """Resample a feature map: bilinearly to a finer stride, by averages to a coarser one.

    Each cell gets the value at its center, interpolated between the centers of the nearest source cells; beyond the
    outermost centers, the value of the border cell. A stride of at least twice the source's is the average of k x k
    cells of stride target / k, where k is the largest power of two with target / k >= source: 14 -> 16 -> 32.

    Args:
        x: (n, c, ceil(h / source), ceil(w / source)).
        source: Stride of the map, in pixels.
        target: Stride of the result, a power of two.
        image_size: (h, w) in pixels.

    Returns:
        (n, c, ceil(h / target), ceil(w / target)); `x` itself if the strides are equal.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[[7.0, 21.0, 35.0]]]])  # each value is the center of its cell
        >>> resample(x, 14, 8, (14, 40))[0, 0, 0].round()
        tensor([ 7., 12., 20., 28., 35.])
    """
    pooled = 1
    while 2 * pooled * source <= target:
        pooled *= 2
    stride = target // pooled
    if stride != source:
        size = [cells(pixels, stride) for pixels in image_size]
        # Interpolation by a factor returns whole cells only, so the last one may need a source cell beyond the border.
        down, right = (-(-n * stride // source) - old for n, old in zip(size, x.shape[-2:], strict=True))
        x = F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x
        x = F.interpolate(x, scale_factor=source / stride, mode="bilinear", align_corners=False)
        x = x.narrow(2, 0, size[0]).narrow(3, 0, size[1])
    return F.avg_pool2d(x, pooled, ceil_mode=True) if pooled > 1 else x
