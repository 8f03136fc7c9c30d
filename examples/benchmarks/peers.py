"""Heads of segmentation-models-pytorch (SMP) on our encoder's maps: its own decoders and segmentation heads."""

from collections.abc import Sequence

import segmentation_models_pytorch as smp
from torch import Tensor, nn

PEERS = ("Unet", "FPN", "DeepLabV3Plus", "UPerNet", "PSPNet")


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


def make_peer(name: str, num_classes: int, encoder: str = "resnet50") -> PeerHead:
    """Build one of PEERS with SMP's defaults, for the maps of a timm encoder with the strides 2 to 32.

    SMP makes DeepLabV3+ for a dilated encoder of stride 16. Ours has stride 32, so this one gets smaller dilations and
    upsamples by 8 instead of 4.
    """
    options = {"decoder_atrous_rates": (6, 12, 18)} if name == "DeepLabV3Plus" else {}
    model = getattr(smp, name)(f"tu-{encoder}", encoder_weights=None, classes=num_classes, **options)
    if name == "DeepLabV3Plus":
        model.decoder.up = nn.UpsamplingBilinear2d(scale_factor=8)
    return PeerHead(model, depth=3 if name == "PSPNet" else 5)  # SMP's PSPNet reads the map at stride 8
