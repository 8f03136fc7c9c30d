"""From logits to label maps, in bounded memory.

Shapes: n images, K classes, logits (n, K, h, w), labels (n, H, W).
"""

import torch
from torch import Tensor

from early_fusion_seg.votes import LazyLogits, as_lazy_logits


@torch.no_grad()
def upsampled_argmax(logits: Tensor | LazyLogits, size: tuple[int, int]) -> Tensor:
    """Compute `F.interpolate(logits, size, mode="bilinear").argmax(1)` in row chunks.

    Args:
        logits: (n, K, h, w), K at most 255, or the votes that make them.
        size: (H, W).

    Returns:
        (n, H, W) uint8.
    """
    votes = as_lazy_logits(logits)
    labels = torch.empty(votes.shape[0], *size, dtype=torch.uint8, device=votes.states[0].device)
    for images, start, stop in votes.chunks(size):
        labels[images, start:stop] = votes.upsampled(size, (images, start, stop)).argmax(-1)
    return labels
