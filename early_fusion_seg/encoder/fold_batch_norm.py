"""Folding of batch norms into the preceding convolutions: same feature maps, fewer operations, fixed statistics."""

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from early_fusion_seg.encoder.onednn_blocks import fuse_residual_blocks
from early_fusion_seg.encoder.same_padding import SameConv2d
from early_fusion_seg.errors import UserError


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example: Tensor) -> None:
    """Fold every batch norm that directly follows a convolution into it, then fuse residual blocks, in place.

    Pairs are found by running `example` through the model: a norm whose input is the output tensor of a convolution.
    The activation inside timm's BatchNormAct2d is kept. Other norms are left unchanged; so is that of a convolution
    whose output is one of the maps, as in GhostNet's stem.

    Args:
        model: A network in eval mode that returns a list of maps.
        example: (n, 3, h, w) floats.

    Raises:
        UserError: Folding changed the maps, for example because another module also reads the convolution's output.
    """
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # keeps the tensors alive, so that their ids are unique
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_conv(conv: nn.Module, _: object, output: Tensor) -> None:
        outputs[id(output)] = (conv, output)  # type: ignore[assignment]  # hooked on convolutions only

    def before_norm(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        if id(args[0]) in outputs:
            pairs.append((outputs[id(args[0])][0], norm))  # type: ignore[arg-type]  # hooked on norms only

    hooks = [m.register_forward_hook(after_conv) for m in model.modules() if type(m) in (nn.Conv2d, SameConv2d)]
    hooks += [
        m.register_forward_pre_hook(before_norm) for m in model.modules() if type(m) in (nn.BatchNorm2d, BatchNormAct2d)
    ]
    example = example.to(next(model.parameters()).device)
    before = model(example)
    for hook in hooks:
        hook.remove()

    replaced: dict[nn.Module, nn.Module] = {}
    returned = {id(feature_map) for feature_map in before}
    own = {conv for key, (conv, _) in outputs.items() if key in returned}
    for conv, norm in pairs:
        if conv in own:
            continue
        conv.weight, conv.bias = _folded(conv, norm)
        replaced[norm] = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if child in replaced:
                setattr(parent, child_name, replaced[child])
    fuse_residual_blocks(model)
    for a, b in zip(before, model(example), strict=True):
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max())):
            raise UserError(
                "folding the batch norms changed the feature maps; use freeze_encoder=False with this encoder"
            )


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[nn.Parameter, nn.Parameter]:
    """Compute weight and bias of `norm(conv(x))` in float64 and return them in the dtype of the convolution.

    They are computed on the CPU, because some devices have no float64, and returned on the convolution's device.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    bias = None if conv.bias is None else _wide(conv.bias)
    weight, bias = fuse_conv_bn_weights(
        _wide(conv.weight), bias, _wide(norm.running_mean), _wide(norm.running_var), norm.eps,
        _wide(norm.weight), _wide(norm.bias),
    )  # fmt: skip
    like = conv.weight
    return nn.Parameter(weight.to(like), requires_grad=False), nn.Parameter(bias.to(like), requires_grad=False)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()
