"""From logits to label maps, in bounded memory.

Shapes: n images, K classes, logits (n, K, h, w), labels (n, H, W).
"""

import torch
from torch import Tensor

from early_fusion_seg.upsample import row_chunks, source_rows, upsample_rows


@torch.no_grad()
def upsampled_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute `F.interpolate(logits, size, mode="bilinear").argmax(1)` in row chunks.

    Args:
        logits: (n, K, h, w), K at most 255.
        size: (H, W).

    Returns:
        (n, H, W) uint8.
    """
    h = logits.shape[2]
    labels = torch.empty(len(logits), *size, dtype=torch.uint8, device=logits.device)
    for start, stop in row_chunks(logits, size):
        first, last = source_rows(h, size[0], start, stop)
        labels[:, start:stop] = upsample_rows(logits[:, :, first:last], h, size, start, stop).argmax(1)
    return labels
