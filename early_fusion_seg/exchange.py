"""The exchange between streams: each receives every other one, at its own resolution.

Shapes: n images, stream s is (n, W_s, ceil(h / s), ceil(w / s)) for h x w pixels.
"""

from collections.abc import Iterator, Sequence, Set
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Streams = dict[int, Tensor]
"""Stride -> stream."""


class Exchange(nn.Module):
    """Give every stream the sum of itself and all others: 1x1 and up from coarser, strided 3x3 from finer.

    One convolution makes what a stream gives to all finer ones, and one the first step to all coarser ones. On the way
    up, each stream keeps what is meant for it; the rest is upsampled further, with what that stream gives added. A
    stream that no later module takes gets nothing from finer ones, which vote themselves.
    """

    def __init__(self, widths: dict[int, int], onward: Set[int]) -> None:
        super().__init__()
        self.widths, self.fed = widths, {s: width for s, width in widths.items() if s in onward}
        self.up, self.down, self.further = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for source, width in widths.items():
            if finer := sum(w for s, w in widths.items() if s < source):
                self.up[str(source)] = conv_bn(width, finer, kernel=1, relu=False)
            if first := self._first_steps(source):
                self.down[str(source)] = conv_bn(width, sum(first.values()), kernel=3, stride=2, relu=False)
            for target in (s for s in first if s > 2 * source):
                steps = (target // source).bit_length() - 1
                keep = [conv_bn(width, width, kernel=3, stride=2) for _ in range(steps - 2)]
                last = conv_bn(width, widths[target], kernel=3, stride=2, relu=False)
                self.further[f"{source}_to_{target}"] = nn.Sequential(nn.ReLU(), *keep, last)

    def forward(self, streams: Streams) -> Streams:
        """Map stride -> (n, W_s, ...) to the same strides and shapes."""
        totals = dict(streams)
        for target, moved in chain(self._rising(streams), self._falling(streams)):
            total = totals[target]
            totals[target] = total + moved if total is streams[target] else total.add_(moved)
        return {s: F.relu(total, inplace=total is not streams[s]) for s, total in totals.items()}

    def _rising(self, streams: Streams) -> Iterator[tuple[int, Tensor]]:
        """Yield each stride but the coarsest and the sum of what coarser streams give it, in its shape."""
        rising: Tensor | None = None
        for target, source in reversed(list(pairwise(self.widths))):
            given = self.up[str(source)](streams[source])
            given = given if rising is None else given.add_(rising)
            rising = upsample(given, source // target, streams[target].shape[-2:])
            rest = rising.shape[1] - self.widths[target]
            rising, arrived = torch.split(rising, [rest, self.widths[target]], 1) if rest else (rising, rising)
            yield target, arrived

    def _falling(self, streams: Streams) -> Iterator[tuple[int, Tensor]]:
        """Yield strides and what one finer stream gives each, in its shape."""
        for source, down in self.down.items():
            first = self._first_steps(int(source))
            for target, part in zip(first, down(streams[int(source)]).split(list(first.values()), 1), strict=True):
                path = f"{source}_to_{target}"
                yield target, self.further[path](part) if path in self.further else part

    def _first_steps(self, source: int) -> dict[int, int]:
        """Return the coarser streams that get something from this one, and the channels after the first step."""
        return {s: w if s == 2 * source else self.widths[source] for s, w in self.fed.items() if s > source}


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """Build convolution (same padding, no bias), batch norm and, if asked, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else []))


def upsample(x: Tensor, ratio: int, size: Sequence[int]) -> Tensor:
    """Upsample (n, c, h, w) bilinearly by a ratio of strides and cut off what lies beyond the finer map.

    A map of stride s covers s * ceil(h / s) pixels, more than the image where h is no multiple of s. Stretching it to
    the finer map's size instead would shift it, by up to s - 1 pixels at the far edges.
    """
    fine = F.interpolate(x, scale_factor=ratio, mode="bilinear", align_corners=False)
    return fine[..., : size[0], : size[1]]
