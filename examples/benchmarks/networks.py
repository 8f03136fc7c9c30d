"""Networks with their loss whose training is compared: ours, and those of other libraries.

The encoder of every peer with a ResNet-50 is frozen: in eval mode, without gradients. The HRNets have no separate
encoder and are trained end to end, as HRNetV2 is (arXiv 1908.07919).
"""

from collections.abc import Sequence
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from peers import make_peer
from torch import Tensor, nn
from torchvision.models import segmentation

from early_fusion_seg import EarlyFusionNet, FrozenEncoder, ReverseHRNet
from early_fusion_seg.losses import cross_entropy

SMP = ("Unet", "FPN", "DeepLabV3Plus", "UPerNet", "PAN", "PSPNet")
TORCHVISION = ("fcn_resnet50", "deeplabv3_resnet50")
HRNETS = ("hrnet_w18", "hrnet_w48")
PEERS = (*SMP, *TORCHVISION, *HRNETS)


class Ours(nn.Module):
    """The default network and its loss.

    Args:
        num_classes: K.
        encoder: timm name; random weights.
        **options: Settings of the head.
    """

    def __init__(self, num_classes: int, encoder: str = "resnet50", **options: Any) -> None:
        super().__init__()
        frozen = FrozenEncoder(encoder, weights="random")
        self.network = EarlyFusionNet(frozen, ReverseHRNet(frozen.channels, frozen.strides, num_classes, **options))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the loss of images (n, 3, h, w) and target (n, h, w)."""
        return cross_entropy(self.network.lazy_logits(images), target)


class Peer(nn.Module):
    """A network of another library, its logits upsampled to the pixels, and PyTorch's cross-entropy.

    Args:
        name: One of PEERS.
        num_classes: K.
    """

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        if name in SMP:
            self.network = getattr(smp, name)("resnet50", encoder_weights=None, classes=num_classes)
            self.frozen: nn.Module | None = self.network.encoder
        elif name in TORCHVISION:
            make = getattr(segmentation, name)
            self.network = make(weights=None, weights_backbone=None, num_classes=num_classes)
            self.frozen = self.network.backbone
        else:
            self.network, self.frozen = HRNetV2(name, num_classes), None
        if self.frozen is not None:
            self.frozen.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "Peer":
        """Keep the frozen encoder in eval mode."""
        super().train(mode)
        if self.frozen is not None:
            self.frozen.eval()
        return self

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the loss of images (n, 3, h, w) and target (n, h, w)."""
        logits = self.network(images)
        return plain_loss(logits["out"] if isinstance(logits, dict) else logits, target)


class OnOurEncoder(nn.Module):
    """A peer's decoder and head on our encoder.

    Args:
        name: One of SMP.
        num_classes: K.
    """

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        self.encoder = FrozenEncoder("resnet50", weights="random")
        self.head = make_peer(name, num_classes, "resnet50", self.encoder.channels).to(
            memory_format=torch.channels_last
        )

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the loss of images (n, 3, h, w) and target (n, h, w)."""
        return plain_loss(self.head(self.encoder(images), images), target)


class HRNetV2(nn.Module):
    """timm's HRNet with the head of HRNetV2: all streams upsampled, concatenated and classified at stride 4."""

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        self.body = timm.create_model(
            name, features_only=True, pretrained=False, feature_location="", out_indices=(1, 2, 3, 4)
        )
        width = sum(self.body.feature_info.channels())
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, num_classes, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, K, h / 4, w / 4)."""
        streams: Sequence[Tensor] = self.body(images)
        size = streams[0].shape[-2:]
        return self.head(torch.cat([F.interpolate(x, size, mode="bilinear") for x in streams], 1))


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropy of logits upsampled to the size of the target (n, h, w)."""
    if logits.shape[-2:] != target.shape[-2:]:
        logits = F.interpolate(logits, target.shape[-2:], mode="bilinear")
    return F.cross_entropy(logits.float(), target.long(), ignore_index=255)


def make_batch(n: int, size: int | tuple[int, int], k: int, device: str) -> tuple[Tensor, Tensor]:
    """Draw images (n, 3, h, w) in 0..1 and classes (n, h, w); an int makes them square."""
    h, w = (size, size) if isinstance(size, int) else size
    target = torch.randint(0, k, (n, h, w), dtype=torch.uint8, device=device)
    return torch.rand(n, 3, h, w, device=device), target
