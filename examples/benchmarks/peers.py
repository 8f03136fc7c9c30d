"""Heads of segmentation-models-pytorch on our encoder's maps: its own decoders and segmentation heads."""

from collections.abc import Sequence

import segmentation_models_pytorch as smp
import torch.nn.functional as F
from torch import Tensor, nn

PEERS = ("Unet", "FPN", "DeepLabV3Plus", "UPerNet", "PSPNet")


class Peer(nn.Module):
    """Decoder and segmentation head of an SMP model for ResNet-50, without its encoder.

    Args:
        model: The SMP model.
        depth: How many of the encoder's maps it takes, finest first.
    """

    def __init__(self, model: nn.Module, depth: int) -> None:
        super().__init__()
        self.decoder, self.segmentation_head, self.depth = model.decoder, model.segmentation_head, depth

    def forward(self, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        """Return logits (n, K, h, w) at the size of the images."""
        return self.segmentation_head(self.decoder([images, *maps[: self.depth]]))


def make_peer(name: str, num_classes: int) -> Peer:
    """Build one of PEERS with SMP's defaults, but for what the undilated encoder asks for."""
    model = getattr(smp, name)("resnet50", encoder_weights=None, classes=num_classes)
    if name == "DeepLabV3Plus":  # made for a dilated encoder of stride 16; here stride 32
        model = smp.DeepLabV3Plus(
            "resnet50", encoder_weights=None, classes=num_classes, decoder_atrous_rates=(6, 12, 18)
        )
        model.decoder.up = nn.UpsamplingBilinear2d(scale_factor=8)
    return Peer(model, depth=3 if name == "PSPNet" else 5)  # SMP's PSPNet reads the map at stride 8


class FCN(nn.Module):
    """Plain FCN head (arXiv 1411.4038): a 1x1 conv on each map, upsampled and added."""

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.scores = nn.ModuleList(nn.Conv2d(c, num_classes, 1) for c in channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits at the size of the finest map."""
        scores = [score(m) for score, m in zip(self.scores, maps, strict=True)]
        size = scores[0].shape[-2:]
        return sum((F.interpolate(s, size=size, mode="bilinear") for s in scores[1:]), start=scores[0])
