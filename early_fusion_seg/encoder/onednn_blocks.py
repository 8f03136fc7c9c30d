"""Fused residual blocks on the CPU: one oneDNN call computes convolution, sum and ReLU in one pass over memory."""

from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

CONVOLUTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    Bottleneck: ("conv1", "conv2", "conv3"),
    BasicBlock: ("conv1", "conv2"),
}
"""Residual blocks of timm that can be fused, with the names of their convolutions in order."""

# The operators that torch.compile emits for such convolutions. They have no public name.
CONV = ("_convolution_pointwise", "default", "X W B padding stride dilation groups attr scalars algorithm")
CONV_INTO = (
    "_convolution_pointwise_",
    "binary",
    "other X W B padding stride dilation groups binary_attr alpha unary_attr unary_scalars unary_algorithm",
)


def find_operator(name: str, overload: str, arguments: str) -> Any:
    """Return an operator of oneDNN, or None if this PyTorch has none with these arguments (names with spaces)."""
    operator = getattr(getattr(torch.ops.mkldnn, name, None), overload, None)
    if operator is None or [a.name for a in operator._schema.arguments] != arguments.split():
        return None
    return operator


_conv, _conv_into = find_operator(*CONV), find_operator(*CONV_INTO)


class FusedBlock(nn.Module):
    """A folded residual block that uses one oneDNN call per convolution where possible, else timm's own forward.

    The sum is written into the shortcut tensor. If the shortcut has no convolution, this is the input itself, which no
    other module may read then.

    Args:
        block: The residual block, its batch norms folded.
    """

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        self.block: BasicBlock | Bottleneck = block

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, C, h, w) to (n, C', h', w'), without gradients."""
        if not _can_fuse(x):
            plain: Tensor = self.block(x)
            return plain
        shortcut = x if self.block.downsample is None else self.block.downsample(x)
        *inner, last = (getattr(self.block, name) for name in CONVOLUTIONS[type(self.block)])
        for conv in inner:
            x = _conv(x, *_arguments(conv, x), "relu", [], None)
        total: Tensor = _conv_into(shortcut, x, *_arguments(last, x), "add", 1.0, "relu", [], None)
        return total


def fuse_residual_blocks(model: nn.Module) -> None:
    """Replace the residual blocks that can be fused by `FusedBlock`, in place.

    A block can be fused if it has only the convolutions in `CONVOLUTIONS`, ReLUs and a sum. The first block of a stage
    must also have a convolution in its shortcut, because its input may be one of the feature maps of the encoder.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in CONVOLUTIONS and _is_plain(child) and (name != "0" or child.downsample is not None):
                setattr(parent, name, FusedBlock(child))


def lacks_bfloat16() -> bool:
    """Return whether oneDNN is available without bfloat16 convolutions; those of PyTorch itself are very slow."""
    supported: Any = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and not supported()


def _is_plain(block: BasicBlock | Bottleneck) -> bool:
    """Return whether a block has only plain convolutions, ReLUs and identities (folded norms)."""
    children = dict(block.named_children())
    children.pop("downsample", None)
    convs = [children.pop(name) for name in CONVOLUTIONS[type(block)]]
    return all(
        type(conv) is nn.Conv2d and conv.bias is not None and conv.padding_mode == "zeros" for conv in convs
    ) and all(type(m) is (nn.ReLU if name.startswith("act") else nn.Identity) for name, m in children.items())


def _can_fuse(x: Tensor) -> bool:
    """Return whether oneDNN can be used for a tensor.

    Compilers, exporters and FLOP counters do not know the fused operators, so timm's own forward is used under them.
    """
    available = _conv is not None and _conv_into is not None and bool(torch.backends.mkldnn.enabled)
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # torch declares neither
    inspected = tracing or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if not available or x.device.type != "cpu" or inspected:
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not lacks_bfloat16())


def _arguments(conv: nn.Conv2d, x: Tensor) -> tuple[object, ...]:
    """Return the arguments of oneDNN's operators, with the weights cast here, because autocast does not do it."""
    assert conv.bias is not None
    return conv.weight.to(x.dtype), conv.bias.to(x.dtype), conv.padding, conv.stride, conv.dilation, conv.groups
