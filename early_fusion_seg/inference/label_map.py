"""Label maps from logits, computed a few rows at a time.

Shapes: n images, K classes, logits (n, K, h, w), labels (n, H, W).
"""

import torch
from torch import Tensor

from early_fusion_seg.logits import LazyLogits, as_lazy_logits


@torch.no_grad()
def upsampled_argmax(logits: Tensor | LazyLogits, size: tuple[int, int]) -> Tensor:
    """Compute `F.interpolate(logits, size, mode="bilinear").argmax(1)` in chunks of rows.

    Args:
        logits: (n, K, h, w), K at most 255, or lazy logits.
        size: (H, W).

    Returns:
        (n, H, W) uint8.
    """
    lazy = as_lazy_logits(logits)
    labels = torch.empty(lazy.shape[0], *size, dtype=torch.uint8, device=lazy.features[0].device)
    for images, start, stop in lazy.chunks(size):
        labels[images, start:stop] = lazy.upsampled(size, (images, start, stop)).argmax(-1)
    return labels
