"""TensorFlow's SAME padding for convolutions of timm, with map sizes that an exporter can follow.

A map of h rows becomes one of ceil(h / stride) rows. timm's own module computes the padding with a ceiling in floating
point, so that after some layers an exporter needs minutes to simplify the size of a map.
"""

from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn


class SameConv2d(nn.Conv2d):
    """A convolution with the parameters and values of timm's `Conv2dSame`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, C, h, w) to (n, C', ceil(h / stride), ceil(w / stride))."""
        pads: list[int] = []
        for side, kernel, stride, dilation in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):  # width, then height, as F.pad takes them
            reach = (kernel - 1) * dilation
            total = reach - (side - 1) % stride
            if reach < stride - 1:  # else it is never negative
                total = cast(int, torch.sym_max(total, 0))
            pads += [total // 2, total - total // 2]
        maps = F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        h, w = (1 + (side - 1) // stride for side, stride in zip(x.shape[-2:], self.stride, strict=True))
        return maps.narrow(2, 0, h).narrow(3, 0, w)


def replace_same_convolutions(model: nn.Module) -> None:
    """Make each `Conv2dSame` of a model a `SameConv2d`, in place; names and parameters stay."""
    for module in model.modules():
        if type(module) is Conv2dSame:
            module.__class__ = SameConv2d
