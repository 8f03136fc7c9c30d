"""EarlyFusionNet = normalize + encoder + head: the plain module that is trained, evaluated and exported.

Shapes: n images of h x w pixels, K classes, s the head's finest stride.
"""

import torch
from torch import Tensor, nn

from early_fusion_seg.encoder import FrozenEncoder
from early_fusion_seg.errors import UserError
from early_fusion_seg.head import ReverseHRNet
from early_fusion_seg.votes import LazyLogits


class EarlyFusionNet(nn.Module):
    """Map images to logits at the head's finest stride.

    Normalization happens here, on the device, with the encoder's own mean and std, so that it cannot differ between
    training, evaluation and export.

    Args:
        encoder: Gives the feature maps.
        head: Takes them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: FrozenEncoder, head: ReverseHRNet) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.register_buffer("mean", torch.tensor(encoder.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(encoder.std).view(3, 1, 1), persistent=False)
        self._checked = False

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits.

        Args:
            images: (n, 3, h, w) RGB, uint8 in 0..255 or floats in 0..1.

        Returns:
            (n, K, ceil(h / s), ceil(w / s)) float32.

        Raises:
            UserError: Another type, shape or range. The range of floats is looked at on the CPU and, elsewhere, on the
                first batch.
        """
        return self.votes(images).logits()

    def votes(self, images: Tensor) -> LazyLogits:
        """Compute what makes the logits; losses and label maps take it, and never hold all logits. See `forward`."""
        normal = (self._unit(images) - self.mean) / self.std
        normal = normal.to(next(self.head.parameters()).dtype)
        return self.head.votes(self.encoder(normal), normal)

    def _unit(self, images: Tensor) -> Tensor:
        """Return float images in 0..1."""
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise UserError(f"images have the shape {tuple(images.shape)}; expected (n, 3, h, w)")
        if images.dtype == torch.uint8:
            return images.to(self.mean.dtype) / 255
        if not images.is_floating_point():
            raise UserError(f"images are {images.dtype}; expected uint8 in 0..255 or floats in 0..1")
        if not torch.compiler.is_compiling() and (images.device.type == "cpu" or not self._checked):
            low, high = (float(x) for x in images.aminmax())
            if not (low >= 0 and high <= 1):
                raise UserError(
                    f"float images range from {low:.3g} to {high:.3g}; expected 0..1: the network normalizes by itself"
                )
            self._checked = True
        return images
