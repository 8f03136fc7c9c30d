"""ReverseHRNet: fuse all scales first, then drop the coarse streams one by one (arXiv 2402.06091).

HRNet (arXiv 1908.07919) starts with one fine stream and adds coarser ones. The reverse HRNet starts with all feature
maps of the encoder and an extra stream at stride 2, fuses them at once, and drops the coarsest stream after each stage.

    E_2   E_4   E_8   E_16   E_32      feature maps of the encoder, C_s channels
     |     |     |     |      |        adapt: 1x1 conv, batch norm, ReLU; resample the maps of a plain ViT
     s2    s4    s8    s16    s32      streams of W_s channels: 32, 64, 128, 256, 256
     |=====|=====|=====|======|        stage 1: HR modules (residual blocks on each stream, then an exchange unit)
     |=====|=====|=====|      |        stage 2 without s32, and so on; by default, there is one module in all
     +-----+-----+-----+------+        classify: 1x1 conv to K classes on each stream, upsampled and added

A plain vision transformer (ViT) has maps of one stride only, from four depths. From the shallowest to the deepest, they
become the streams s4, s8, s16 and s32, as in DPT (arXiv 2103.13413); s2 comes from a trainable stem.

Every stream is classified from its last features, even a stream that was dropped. The sum equals HRNetV2's 1x1 conv on
the concatenation of all streams at the finest resolution, because a 1x1 conv commutes with bilinear upsampling. But the
wide concatenated tensor is never computed. `logits/lazy_logits.py` computes the sum.

Shapes: n images, K classes, stream s is (n, W_s, ceil(h / s), ceil(w / s)) for h x w pixels.

Our own choices, which the published summary does not specify: widths, blocks, number of HR modules, one classifier per
stream, and no downward connection to a stream that no later module uses.
"""

from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain, pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from early_fusion_seg.errors import UserError
from early_fusion_seg.logits import LazyLogits
from early_fusion_seg.resample import resample

Plan = Literal["early", "progressive"]
Streams = dict[int, Tensor]
"""Stride -> stream."""
MAX_WIDTH = 256
"""Coarse streams have no more channels, as in most decoders: they would cost much and gain little."""


class ReverseHRNet(nn.Module):
    """Turn feature maps of several strides into logits at the finest stride.

    Args:
        channels: C_s of each feature map.
        strides: Stride of each feature map: strictly increasing, each a power-of-two multiple of the one before; or all
            equal as in a plain ViT, whose maps are resampled to the strides 4, 8, 16, ... in this order.
        num_classes: K.
        plan: Order in which streams are used. `"early"`: all streams from the start, the coarsest is dropped after each
            stage. `"progressive"`: the coarsest alone, a finer one joins at each stage, as in usual decoders.
        width: Channels of the stride-4 stream; W_s = width * s / 4, but at most 256 (or `width`, if that is more). A
            list has one number per stream, finest first.
        blocks: Residual blocks on each stream in an HR module; a list has one number per stream, finest first.
            Default: see `default_modules`.
        hr_modules: HR modules of each stage, one number per stage; 0 skips a stage. Default: see `default_modules`.
        extra_stream: Use the stream at stride 2. If the encoder has no map at this stride, a trainable stem computes it
            from the image.
        activation_checkpointing: Recompute the activations of HR modules in backward instead of storing them.

    Raises:
        UserError: Settings are out of range or do not fit the strides.

    Example:
        >>> head = ReverseHRNet((8, 16), (4, 8), num_classes=3, extra_stream=False)
        >>> maps = [torch.rand(2, 8, 16, 16), torch.rand(2, 16, 8, 8)]
        >>> head(maps, torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        plan: Plan = "early",
        width: int | Sequence[int] = 64,
        blocks: int | Sequence[int] | None = None,
        hr_modules: Sequence[int] | None = None,
        extra_stream: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        finest = 2 if extra_stream else 4
        self.map_stride = strides[0] if len(strides) > 1 and len(set(strides)) == 1 else None  # that of a plain ViT
        if self.map_stride is not None:
            strides = [4 * 2**i for i in range(len(strides))]
        used = {s: c for c, s in zip(channels, strides, strict=True) if s >= finest}
        self.strides = sorted(used.keys() | ({2} if extra_stream else set()))
        counts, depths = default_modules(plan, self.strides)
        counts = counts if hr_modules is None else list(hr_modules)
        if blocks is not None:
            depths = [blocks] * len(self.strides) if isinstance(blocks, int) else list(blocks)
        _check(self.strides, depths, counts, plan)
        widths = stream_widths(width, self.strides)
        depth = dict(zip(self.strides, depths, strict=True))
        self.adapt = nn.ModuleDict({str(s): conv_bn(c, widths[s], kernel=1) for s, c in used.items()})
        self.stem = conv_bn(3, widths[2], kernel=3, stride=2) if extra_stream and 2 not in used else None
        stages = stage_strides(plan, self.strides)
        modules = [members for members, count in zip(stages, counts, strict=True) for _ in range(count)]
        self.stages = nn.ModuleList(
            HRModule({s: widths[s] for s in members}, depth, used_later=set(chain(*modules[i:])))
            for i, members in enumerate(modules, start=1)
        )
        self.classifiers = nn.ModuleDict({str(s): nn.Conv2d(widths[s], num_classes, 1) for s in self.strides})

    def forward(self, features: Sequence[Tensor], images: Tensor, classify: bool = True) -> Tensor | tuple[Tensor, ...]:
        """Compute logits.

        Args:
            features: The encoder's maps (n, C_s, ceil(h / s), ceil(w / s)); maps finer than the head's are not used.
            images: (n, 3, h, w) normalized images; only the stem uses their pixels.
            classify: If False, return the last features of the streams instead of logits.

        Returns:
            (n, K, ceil(h / s), ceil(w / s)) float32 logits at the finest stride s; or a tuple of the last features of
            each stream, finest first.
        """
        if classify:
            return self.lazy_logits(features, images).logits()
        inputs = list(features)[-len(self.adapt) :]
        streams = {int(s): adapt(x) for (s, adapt), x in zip(self.adapt.items(), inputs, strict=True)}
        if self.map_stride is not None:
            streams = {s: resample(x, self.map_stride, s, images.shape[-2:]) for s, x in streams.items()}
        if self.stem is not None:
            streams[2] = self.stem(images)
        checkpointing = self.activation_checkpointing and self.training
        for module in self.stages:
            streams |= checkpointed(module, streams) if checkpointing else module(streams)
        return tuple(streams[s] for s in self.strides)

    def lazy_logits(self, features: Sequence[Tensor], images: Tensor) -> LazyLogits:
        """Compute lazy logits, from which losses and label maps compute a few rows at a time; see `forward`."""
        last = self(features, images, classify=False)
        parameters = dict(self.classifiers.named_parameters())
        weights, biases = (tuple(parameters[f"{s}.{name}"] for s in self.strides) for name in ("weight", "bias"))
        return LazyLogits(last, weights, biases, tuple(s // self.strides[0] for s in self.strides))


def default_modules(plan: Plan, strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the default HR modules of each stage and residual blocks on each stream.

    The early plan has one module, with all streams; the progressive plan has one in each stage. See
    docs/decisions/0005-default-head.md.

    Example:
        >>> default_modules("early", [2, 4, 8])
        ([1, 0, 0], [0, 1, 1])
    """
    n = len(strides)
    return [1] * n if plan == "progressive" else [1] + [0] * (n - 1), [int(s > 2) for s in strides]


def stream_widths(width: int | Sequence[int], strides: Sequence[int]) -> dict[int, int]:
    """Return the channels W_s of each stream.

    Example:
        >>> stream_widths(64, [2, 4, 8, 16, 32])
        {2: 32, 4: 64, 8: 128, 16: 256, 32: 256}
    """
    if isinstance(width, int):
        if width < 1 or any(width * s % 4 for s in strides):
            raise UserError(f"width={width}; expected a positive number, with a stream at stride 2 a multiple of 2")
        return {s: min(width * s // 4, max(width, MAX_WIDTH)) for s in strides}
    if len(width) != len(strides) or min(width) < 1:
        raise UserError(f"width={list(width)}; expected one positive number, or one for each stride of {list(strides)}")
    return dict(zip(strides, width, strict=True))


def stage_strides(plan: Plan, strides: Sequence[int]) -> list[list[int]]:
    """Return the strides of the streams of each stage.

    Example:
        >>> stage_strides("early", [2, 4, 8])
        [[2, 4, 8], [2, 4], [2]]
        >>> stage_strides("progressive", [2, 4, 8])
        [[8], [4, 8], [2, 4, 8]]
    """
    if plan == "early":
        return [list(strides[: len(strides) - i]) for i in range(len(strides))]
    return [list(strides[i:]) for i in reversed(range(len(strides)))]


class HRModule(nn.Module):
    """HRNet's module: residual blocks on each stream, then one exchange unit.

    Args:
        widths: Stride -> channels of each stream of the module.
        blocks: Stride -> residual blocks on this stream.
        used_later: Strides of the streams that a later module uses.
    """

    def __init__(self, widths: dict[int, int], blocks: dict[int, int], used_later: Set[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {str(s): nn.Sequential(*(BasicBlock(w) for _ in range(blocks[s]))) for s, w in widths.items()}
        )
        self.exchange_unit = ExchangeUnit(widths, used_later)

    def forward(self, streams: Streams) -> Streams:
        """Return the new features of this module's streams; other streams in the dict are ignored."""
        inputs = {int(s): branch(streams[int(s)]) for s, branch in self.branches.items()}
        fused: Streams = self.exchange_unit(inputs)
        return fused


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (arXiv 1512.03385)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = conv_bn(width, width, kernel=3)
        self.second = conv_bn(width, width, kernel=3, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, W, h, w) to the same shape."""
        return F.relu(self.second(self.first(x)).add_(x), inplace=True)


class ExchangeUnit(nn.Module):
    """HRNet's exchange unit (its fuse layers): every stream becomes the sum of itself and all other streams.

    A coarser stream is added through a 1x1 conv and bilinear upsampling, a finer one through a chain of strided 3x3
    convs. A stream that no later module uses gets nothing from finer streams, because those have their own classifiers.

    Convolutions with the same input are one convolution with all their output channels:

    - Upward, one 1x1 conv per stream computes its contributions to all finer streams. The result is upsampled to the
      next finer stream, which takes its own channels. The remaining channels are for still finer streams: the
      contribution of this stream to them is added, and the sum is upsampled further.
    - Downward, one strided conv per stream computes the first step to all coarser streams.

    Args:
        widths: Stride -> channels.
        used_later: Strides of the streams that a later module uses.
    """

    def __init__(self, widths: dict[int, int], used_later: Set[int]) -> None:
        super().__init__()
        self.widths = widths
        self.down_widths = {s: width for s, width in widths.items() if s in used_later}
        self.up, self.down, self.further_down = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for source, width in widths.items():
            if finer := sum(w for s, w in widths.items() if s < source):
                self.up[str(source)] = conv_bn(width, finer, kernel=1, relu=False)
            if first := self._first_down_widths(source):
                self.down[str(source)] = conv_bn(width, sum(first.values()), kernel=3, stride=2, relu=False)
            for target in (s for s in first if s > 2 * source):
                steps = (target // source).bit_length() - 1
                inner = [conv_bn(width, width, kernel=3, stride=2) for _ in range(steps - 2)]
                last = conv_bn(width, widths[target], kernel=3, stride=2, relu=False)
                self.further_down[f"{source}_to_{target}"] = nn.Sequential(nn.ReLU(), *inner, last)

    def forward(self, streams: Streams) -> Streams:
        """Map stride -> (n, W_s, ...) to the same strides and shapes."""
        totals = dict(streams)
        for target, x in chain(self._upward(streams), self._downward(streams)):
            total = totals[target]
            totals[target] = total + x if total is streams[target] else total.add_(x)
        return {s: F.relu(total, inplace=total is not streams[s]) for s, total in totals.items()}

    def _upward(self, streams: Streams) -> Iterator[tuple[int, Tensor]]:
        """Yield each stride except the coarsest, with the sum of what all coarser streams contribute, in its shape."""
        carried: Tensor | None = None
        for target, source in reversed(list(pairwise(self.widths))):
            x = self.up[str(source)](streams[source])
            x = x if carried is None else x.add_(carried)
            carried = upsample(x, source // target, streams[target].shape[-2:])
            rest = carried.shape[1] - self.widths[target]
            carried, own = torch.split(carried, [rest, self.widths[target]], 1) if rest else (carried, carried)
            yield target, own

    def _downward(self, streams: Streams) -> Iterator[tuple[int, Tensor]]:
        """Yield pairs of a stride and the contribution of one finer stream to it, in its shape."""
        for source, down in self.down.items():
            first = self._first_down_widths(int(source))
            for target, x in zip(first, down(streams[int(source)]).split(list(first.values()), 1), strict=True):
                path = f"{source}_to_{target}"
                yield target, self.further_down[path](x) if path in self.further_down else x

    def _first_down_widths(self, source: int) -> dict[int, int]:
        """Return the strides of the coarser streams that get a contribution, and its channels after the first step."""
        return {s: w if s == 2 * source else self.widths[source] for s, w in self.down_widths.items() if s > source}


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """Build a convolution ("same" padding, no bias), a batch norm and, if `relu`, a ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else []))


def upsample(x: Tensor, ratio: int, size: Sequence[int]) -> Tensor:
    """Upsample (n, c, h, w) bilinearly by a ratio of strides and crop to the size of the finer map.

    If h is not a multiple of s, a map of stride s covers s * ceil(h / s) rows, more than the image has. Resizing such a
    map to the size of the finer map would misalign it, by up to s - 1 pixels at the bottom and right edges.
    """
    fine = F.interpolate(x, scale_factor=ratio, mode="bilinear", align_corners=False)
    return fine.narrow(2, 0, size[0]).narrow(3, 0, size[1])


def checkpointed(module: nn.Module, streams: Streams) -> Streams:
    """Apply a module with activation checkpointing; the second forward does not update running statistics again."""
    fused: Streams = checkpoint(module, dict(streams), use_reentrant=False, context_fn=partial(_contexts, module))
    return fused


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _frozen_running_stats(module)


@contextmanager
def _frozen_running_stats(module: nn.Module) -> Iterator[None]:
    """Within the block, batch norms use batch statistics but do not update their running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked -= 1


def _check(strides: list[int], blocks: list[int], counts: list[int], plan: str) -> None:
    """Raise a UserError if settings are out of range or do not fit the strides."""
    ratios = [b / a for a, b in pairwise(strides)]
    if not strides or any(r < 2 or r != int(r) or int(r) & (int(r) - 1) for r in ratios):
        raise UserError(f"streams have the strides {strides}; expected each to be 2, 4, 8, ... times the previous one")
    if plan not in ("early", "progressive"):
        raise UserError(f'plan is {plan!r}; expected "early" or "progressive"')
    for name, numbers in (("hr_modules", counts), ("blocks", blocks)):
        if len(numbers) != len(strides) or min(numbers) < 0:
            raise UserError(
                f"{name}={numbers}; expected {len(strides)} numbers of at least 0, one for each stride of {strides}"
            )
