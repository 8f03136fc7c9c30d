"""ReverseHRNet: all scales at once, then coarse streams leave (arXiv 2402.06091).

HRNet (arXiv 1908.07919) starts with one fine stream and adds coarser ones. The reverse starts with every scale of the
encoder and an extra stream at stride 2, fuses all of them at once, and drops the coarsest stream after each stage.

    E_2   E_4   E_8   E_16   E_32      the encoder's maps, C_s channels
     |     |     |     |      |        adapt: 1x1 conv, norm, ReLU
     s2    s4    s8    s16    s32      streams, W_s = width * s / 4 channels
     |=====|=====|=====|======|        stage 1: HR modules (residual blocks, then streams receive one another)
     |=====|=====|=====|      |        stage 2 without s32, and so on
     +-----+-----+-----+------+        vote: 1x1 conv to K classes on each stream, upsampled and added

Every stream votes with its last state (`votes.py`); votes are upsampled to the next finer stream and added to its own.
This equals HRNetV2's 1x1 conv on the concatenation of all streams at the finest resolution (a 1x1 conv commutes with
bilinear upsampling), without that wide tensor.

Shapes: n images, K classes, stream s is (n, W_s, ceil(h / s), ceil(w / s)) for h x w pixels.

Our own choices where the published summary is silent: widths, blocks, votes, HR modules, and when nothing goes down.
"""

from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain, pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from early_fusion_seg.errors import UserError
from early_fusion_seg.exchange import Exchange, Streams, conv_bn
from early_fusion_seg.votes import LazyLogits

Plan = Literal["early", "progressive"]


class ReverseHRNet(nn.Module):
    """Turn feature maps of several strides into logits at the finest one.

    Args:
        channels: C_s of each feature map.
        strides: Its stride, strictly increasing, each a power-of-two multiple of the one before.
        num_classes: K.
        plan: `"early"`: all streams first, the coarsest leaves after each stage. `"progressive"`: the coarsest first, a
            finer one joins at each stage, as in usual decoders.
        width: Channels of the stride-4 stream; W_s = width * s / 4.
        blocks: Residual blocks on each stream in an HR module; a list has a number for each stream, finest first.
            Default: `default_modules`.
        hr_modules: HR modules in each stage, one number for each stream; 0 leaves a stage out. Default: likewise.
        extra_stream: Use stride 2; where the encoder has no such map, a trainable stem makes it from the image.
        activation_checkpointing: Keep no activations inside the HR modules in training, and compute them again in backward.

    Raises:
        UserError: Numbers that make no head.

    Example:
        >>> import torch
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
        width: int = 32,
        blocks: int | Sequence[int] | None = None,
        hr_modules: Sequence[int] | None = None,
        extra_stream: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        finest = 2 if extra_stream else 4
        used = {s: c for c, s in zip(channels, strides, strict=True) if s >= finest}
        self.strides = sorted(used.keys() | ({2} if extra_stream else set()))
        widths = {s: width * s // 4 for s in self.strides}
        counts, depths = default_modules(plan, self.strides)
        counts = counts if hr_modules is None else list(hr_modules)
        if blocks is not None:
            depths = [blocks] * len(self.strides) if isinstance(blocks, int) else list(blocks)
        _check(self.strides, widths, width, depths, counts, plan)
        depth = dict(zip(self.strides, depths, strict=True))
        self.adapt = nn.ModuleDict({str(s): conv_bn(c, widths[s], kernel=1) for s, c in used.items()})
        self.stem = conv_bn(3, widths[2], kernel=3, stride=2) if extra_stream and 2 not in used else None
        stages = stage_strides(plan, self.strides)
        modules = [members for members, count in zip(stages, counts, strict=True) for _ in range(count)]
        self.stages = nn.ModuleList(
            HRModule({s: widths[s] for s in members}, depth, onward=set(chain(*modules[i:])))
            for i, members in enumerate(modules, start=1)
        )
        self.vote = nn.ModuleDict({str(s): nn.Conv2d(widths[s], num_classes, kernel_size=1) for s in self.strides})

    def forward(self, features: Sequence[Tensor], images: Tensor, classify: bool = True) -> Tensor | tuple[Tensor, ...]:
        """Compute logits.

        Args:
            features: The encoder's maps (n, C_s, ceil(h / s), ceil(w / s)); finer ones than the head's are left aside.
            images: (n, 3, h, w) normalized images; only the stem reads them.
            classify: False gives the last states of the streams instead, finest first.

        Returns:
            (n, K, ceil(h / s), ceil(w / s)) float32 at the finest stride s.
        """
        if classify:
            return self.votes(features, images).logits()
        inputs = list(features)[-len(self.adapt) :]
        streams = {int(s): adapt(x) for (s, adapt), x in zip(self.adapt.items(), inputs, strict=True)}
        if self.stem is not None:
            streams[2] = self.stem(images)
        for module in self.stages:
            streams |= (
                checkpointed(module, streams) if self.activation_checkpointing and self.training else module(streams)
            )
        return tuple(streams[s] for s in self.strides)

    def votes(self, features: Sequence[Tensor], images: Tensor) -> LazyLogits:
        """Compute what makes the logits, but not the logits: losses and label maps need a few rows at a time."""
        states = self(features, images, classify=False)
        parameters = dict(self.vote.named_parameters())
        weights, biases = (tuple(parameters[f"{s}.{name}"] for s in self.strides) for name in ("weight", "bias"))
        return LazyLogits(states, weights, biases, tuple(s // self.strides[0] for s in self.strides))


def default_modules(plan: Plan, strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the HR modules of each stage and the residual blocks on each stream.

    Early fuses all streams twice, progressive once at each joining: docs/decisions/0005-default-head.md.

    >>> default_modules("early", [2, 4, 8])
    ([2, 0, 0], [0, 0, 1])
    """
    n = len(strides)
    if plan == "progressive":
        return [1] * n, [2] * n
    return [2] + [0] * (n - 1), [int(s > 4) for s in strides] if 2 in strides else [2] * n


def stage_strides(plan: Plan, strides: Sequence[int]) -> list[list[int]]:
    """List the streams of each stage.

    >>> stage_strides("early", [2, 4, 8])
    [[2, 4, 8], [2, 4], [2]]
    >>> stage_strides("progressive", [2, 4, 8])
    [[8], [4, 8], [2, 4, 8]]
    """
    if plan == "early":
        return [list(strides[: len(strides) - i]) for i in range(len(strides))]
    return [list(strides[i:]) for i in reversed(range(len(strides)))]


class HRModule(nn.Module):
    """Residual blocks on each stream, then one exchange.

    Args:
        widths: Stride -> channels of each stream that takes part.
        blocks: Stride -> residual blocks on it.
        onward: Strides that a later module takes.
    """

    def __init__(self, widths: dict[int, int], blocks: dict[int, int], onward: Set[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {str(s): nn.Sequential(*(BasicBlock(w) for _ in range(blocks[s]))) for s, w in widths.items()}
        )
        self.exchange = Exchange(widths, onward)

    def forward(self, streams: Streams) -> Streams:
        """Return the new states of this module's streams (others in `streams` are not looked at)."""
        fused: Streams = self.exchange({int(s): branch(streams[int(s)]) for s, branch in self.branches.items()})
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


def checkpointed(module: nn.Module, streams: Streams) -> Streams:
    """Apply a module whose activations are computed again in backward, when its norms must not count a second time."""
    contexts = partial(_contexts, module)
    fused: Streams = checkpoint(module, dict(streams), use_reentrant=False, context_fn=contexts)
    return fused


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_kept(module)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let batch norms normalize by the batch and leave their running statistics as they are."""
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


def _check(
    strides: list[int], widths: dict[int, int], width: int, blocks: list[int], counts: list[int], plan: str
) -> None:
    """Refuse numbers that make no head, saying which and why."""
    ratios = [b / a for a, b in pairwise(strides)]
    if not strides or any(r < 2 or r != int(r) or int(r) & (int(r) - 1) for r in ratios):
        raise UserError(f"streams have the strides {strides}; each must be 2, 4, 8, ... times the one before")
    if plan not in ("early", "progressive"):
        raise UserError(f'plan is {plan!r}; expected "early" or "progressive"')
    if min(widths.values()) < 1 or any(w * 4 != width * s for s, w in widths.items()):
        raise UserError(f"width={width} gives the streams {widths} channels; take a positive multiple of 2")
    for name, numbers in (("hr_modules", counts), ("blocks", blocks)):
        if len(numbers) != len(strides) or min(numbers) < 0:
            raise UserError(f"{name}={numbers}; expected {len(strides)} numbers from 0 up, one for each of {strides}")
