"""Heads of other libraries on our encoder's maps: those of segmentation-models-pytorch (SMP), FCN, and a linear one."""

from collections.abc import Sequence
from typing import Any

import segmentation_models_pytorch as smp
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

SMP: dict[str, str | None] = {  # name -> its option for dropout
    "Unet": None,
    "FPN": "decoder_dropout",
    "DeepLabV3Plus": "decoder_aspp_dropout",
    "UPerNet": None,
    "PSPNet": "psp_dropout",
    "Segformer": None,
    "Linknet": None,
}
PEERS = (*SMP, "FCN", "linear")


class PeerHead(nn.Module):
    """Decoder and segmentation head of an SMP model, without its encoder.

    Args:
        model: The SMP model.
        depth: Number of the encoder's maps that it takes, finest first.
    """

    def __init__(self, model: nn.Module, depth: int) -> None:
        super().__init__()
        self.decoder, self.segmentation_head, self.depth = model.decoder, model.segmentation_head, depth

    def forward(self, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        """Return logits (n, K, h, w) at the size of the images."""
        return self.segmentation_head(self.decoder([images, *maps[: self.depth]]))


class Linear(nn.Module):
    """1x1 convolutions to K classes, upsampled to the finest map and added: a linear classifier of the maps."""

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.classifiers = nn.ModuleList(nn.Conv2d(c, num_classes, 1) for c in channels)

    def forward(self, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        """Return logits (n, K, h / s, w / s) at the finest stride s."""
        votes = [classifier(x) for classifier, x in zip(self.classifiers, maps, strict=True)]
        return sum(F.interpolate(v, votes[0].shape[-2:], mode="bilinear") for v in votes)


class FCN(FCNHead):
    """torchvision's FCN head on the coarsest map."""

    def forward(self, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        """Return logits (n, K, h / 32, w / 32)."""
        return super().forward(maps[-1])


def make_peer(
    name: str, num_classes: int, encoder: str, channels: Sequence[int], dropout: float | None = None
) -> nn.Module:
    """Build one of PEERS with its defaults, for the maps of a timm encoder with the strides 2 to 32.

    SMP makes DeepLabV3+ for a dilated encoder of stride 16. Ours has stride 32, so this one gets smaller dilations and
    upsamples by 8 instead of 4.

    Args:
        name: One of PEERS.
        num_classes: K.
        encoder: timm name.
        channels: Of the encoder's maps.
        dropout: Default: that of the library.
    """
    if name == "linear":
        return Linear(channels, num_classes)
    if name == "FCN":
        head = FCN(channels[-1], num_classes)
        head[3] = nn.Dropout(0.1 if dropout is None else dropout)
        return head
    options: dict[str, Any] = {"decoder_atrous_rates": (6, 12, 18)} if name == "DeepLabV3Plus" else {}
    if dropout is not None and SMP[name] is not None:
        options[SMP[name]] = dropout
    model = getattr(smp, name)(f"tu-{encoder}", encoder_weights=None, classes=num_classes, **options)
    if name == "DeepLabV3Plus":
        model.decoder.up = nn.UpsamplingBilinear2d(scale_factor=8)
    return PeerHead(model, depth=3 if name == "PSPNet" else 5)  # SMP's PSPNet reads the map at stride 8
