"""The same maps in fewer steps: batch norms folded into the convolutions before them, residual blocks fused on the CPU.

Folding also leaves no statistics that could move. Fusing saves passes over memory: oneDNN adds the shortcut and applies
ReLU while a convolution's results are still in the processor's registers.
"""

import warnings
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example: Tensor) -> None:
    """Fold every batch norm that directly follows a convolution into it, then fuse residual blocks, in place.

    Pairs are found by running `example` through the model: a norm whose input is the very tensor that a convolution
    gave. What follows the norm inside timm's BatchNormAct2d (its activation) stays. Other norms stay as they are.

    Args:
        model: A network in eval mode that gives a list of maps.
        example: (n, 3, h, w) floats.

    Raises:
        RuntimeError: The folded maps differ from the original ones (a convolution with a second reader, say).
    """
    given: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # holds each output, so that its id stays its own
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_conv(conv: nn.Module, _: object, output: Tensor) -> None:
        given[id(output)] = (conv, output)  # type: ignore[assignment]  # hooked on convolutions alone

    def before_norm(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        if id(args[0]) in given:
            pairs.append((given[id(args[0])][0], norm))  # type: ignore[arg-type]  # hooked on norms alone

    hooks = [m.register_forward_hook(after_conv) for m in model.modules() if type(m) in (nn.Conv2d, Conv2dSame)]
    hooks += [
        m.register_forward_pre_hook(before_norm) for m in model.modules() if type(m) in (nn.BatchNorm2d, BatchNormAct2d)
    ]
    example = example.to(next(model.parameters()).device)
    before = model(example)
    for hook in hooks:
        hook.remove()

    replaced: dict[nn.Module, nn.Module] = {}
    for conv, norm in pairs:
        conv.weight, conv.bias = _fused(conv, norm)
        replaced[norm] = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if child in replaced:
                setattr(parent, child_name, replaced[child])
    _fuse_blocks(model)
    for a, b in zip(before, model(example), strict=True):
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max())):
            raise RuntimeError("folding the batch norms changed the maps; use freeze_encoder=False with this encoder")


def _fused(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[nn.Parameter, nn.Parameter]:
    """Compute weight and bias of `norm(conv(x))` in float64, returned in the convolution's type."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    bias = None if conv.bias is None else conv.bias.double()
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(), bias, norm.running_mean.double(), norm.running_var.double(), norm.eps,
        norm.weight.double(), norm.bias.double(),
    )  # fmt: skip
    kind = conv.weight.dtype
    return nn.Parameter(weight.to(kind), requires_grad=False), nn.Parameter(bias.to(kind), requires_grad=False)


CONVOLUTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    Bottleneck: ("conv1", "conv2", "conv3"),
    BasicBlock: ("conv1", "conv2"),
}
"""The blocks of timm's ResNets that can be fused: convolutions with ReLU between them, a sum and ReLU."""

# What torch.compile makes of such convolutions too. None of them has a public name; getattr, as builds without oneDNN
# lack them.
_conv: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
_conv_onto: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise_", None)


class FusedBlock(nn.Module):
    """A folded residual block, one call of oneDNN for each convolution where that can be, else as it was.

    The sum is written over the shortcut: the input, where no convolution leads around the block, so nobody else may
    read that one.
    """

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        self.block: BasicBlock | Bottleneck = block

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, C, h, w) to (n, C', h', w'), without gradients."""
        if not _fusible(x):
            plain: Tensor = self.block(x)
            return plain
        shortcut = x if self.block.downsample is None else self.block.downsample(x)
        *inner, last = (getattr(self.block, name) for name in CONVOLUTIONS[type(self.block)])
        for conv in inner:
            x = _conv(x, *_arguments(conv, x), "relu", [], None)
        total: Tensor = _conv_onto(shortcut, x, *_arguments(last, x), "add", 1.0, "relu", [], None)
        return total


def _fuse_blocks(model: nn.Module) -> None:
    """Wrap the residual blocks that are nothing but what `CONVOLUTIONS` says.

    What goes into the first block of a stage may be a map that is given, so it needs a convolution around it.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in CONVOLUTIONS and _is_plain(child) and (name != "0" or child.downsample is not None):
                setattr(parent, name, FusedBlock(child))


def _is_plain(block: BasicBlock | Bottleneck) -> bool:
    """Say whether a block's convolutions are plain, its activations ReLU, and the rest (its folded norms) nothing."""
    children = dict(block.named_children())
    children.pop("downsample", None)
    convs = [children.pop(name) for name in CONVOLUTIONS[type(block)]]
    return all(
        type(conv) is nn.Conv2d and conv.bias is not None and conv.padding_mode == "zeros" for conv in convs
    ) and all(type(m) is (nn.ReLU if name.startswith("act") else nn.Identity) for name, m in children.items())


def _fusible(x: Tensor) -> bool:
    """Say whether oneDNN is there for a tensor, and not switched off.

    Who looks at the operators (compilers, exporters, FLOP counters) gets those of the block as timm wrote it.
    """
    there = _conv is not None and _conv_onto is not None and bool(torch.backends.mkldnn.enabled)
    if not there or x.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not lacks_bfloat16())


def lacks_bfloat16() -> bool:
    """Say whether oneDNN is there but convolves no bfloat16 on this processor; then PyTorch does, very slowly."""
    supported: Any = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and not supported()


def warn_of_slow_bfloat16(precision: str, device: torch.device) -> None:
    """Warn where a trainer's precision asks a processor for bfloat16 that it lacks."""
    if precision.startswith(("bf16", "16")) and device.type == "cpu" and lacks_bfloat16():
        warnings.warn(
            "this processor has no instructions for bfloat16, in which convolutions take many times as long as in "
            "float32; take --trainer.precision 32-true",
            stacklevel=2,
        )


def _arguments(conv: nn.Conv2d, x: Tensor) -> tuple[object, ...]:
    """List what oneDNN needs to know of a convolution; autocast does not know its operators, so the casts are here."""
    assert conv.bias is not None
    return conv.weight.to(x.dtype), conv.bias.to(x.dtype), conv.padding, conv.stride, conv.dilation, conv.groups
