"""EarlyFusionNet: normalization, encoder and head as one plain nn.Module, for training, evaluation and export.

Shapes: n images of h x w pixels, K classes, s the finest stride of the head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from early_fusion_seg.encoder import FrozenEncoder
from early_fusion_seg.errors import UserError
from early_fusion_seg.head import ReverseHRNet
from early_fusion_seg.logits import LazyLogits


class EarlyFusionNet(nn.Module):
    """Map images to logits at the finest stride of the head.

    Images are normalized here, on the device, with the mean and std of the encoder. So normalization is the same in
    training, evaluation and export.

    Args:
        encoder: Computes the feature maps.
        head: Turns them into logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: FrozenEncoder, head: ReverseHRNet) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.register_buffer("mean", torch.tensor(encoder.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(encoder.std).view(3, 1, 1), persistent=False)
        self._range_checked = False

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits.

        Args:
            images: (n, 3, h, w) RGB, uint8 in 0..255 or floats in 0..1.

        Returns:
            (n, K, ceil(h / s), ceil(w / s)) float32.

        Raises:
            UserError: The images have another dtype, shape or range. The range of floats is checked in every batch on
                the CPU and in the first batch on other devices.
        """
        return self.lazy_logits(images).logits()

    def lazy_logits(self, images: Tensor) -> LazyLogits:
        """Compute lazy logits, from which losses and label maps compute a few rows at a time; see `forward`."""
        return self.head.lazy_logits(*self.encode(images))

    def encode(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compute the feature maps (n, C_s, ceil(h / s), ceil(w / s)) and the normalized images; see `forward`."""
        normalized = (self._to_unit_range(images) - self.mean) / self.std
        normalized = normalized.to(next(self.head.parameters()).dtype)
        return self.encoder(normalized), normalized

    def _to_unit_range(self, images: Tensor) -> Tensor:
        """Return float images in 0..1."""
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise UserError(f"images have the shape {tuple(images.shape)}; expected (n, 3, h, w)")
        if images.dtype == torch.uint8:
            return images.to(self.mean.dtype) / 255
        if not images.is_floating_point():
            raise UserError(f"images are {images.dtype}; expected uint8 in 0..255 or floats in 0..1")
        if not torch.compiler.is_compiling() and (images.device.type == "cpu" or not self._range_checked):
            low, high = (float(x) for x in images.aminmax())
            if not (low >= 0 and high <= 1):
                raise UserError(
                    f"float images range from {low:.3g} to {high:.3g}; expected 0..1, because the network normalizes"
                )
            self._range_checked = True
        return images


def lazy_logits_of_heads(networks: Sequence[EarlyFusionNet], images: Tensor) -> list[LazyLogits]:
    """Compute the lazy logits of each head of several networks with the same encoder, which runs once."""
    features, normalized = networks[0].encode(images)
    return [network.head.lazy_logits(features, normalized) for network in networks]
