"""Training on CamVid: the shared parts of heads.py and from_scratch.py."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from early_fusion_seg import FrozenEncoder, ReverseHRNet, SegmentationMetrics
from early_fusion_seg.inference import upsampled_argmax
from early_fusion_seg.logits.lazy_logits import LazyLogits
from early_fusion_seg.losses import cross_entropy
from early_fusion_seg.optim import lr_factor

K, BATCH, WARMUP, WEIGHT_DECAY = 11, 8, 50, 1e-2
CROP = (256, 320)
"""Height and width of the crops of images of 360x480, scaled with the images."""


def logits_of(head: nn.Module, maps: list[Tensor], images: Tensor) -> Tensor | LazyLogits:
    """Return the input of the loss: logits, or the lazy logits of our head."""
    return head.lazy_logits(maps, images) if isinstance(head, ReverseHRNet) else head(maps, images)


class WithEncoder(nn.Module):
    """A head on an encoder; maps normalized images (n, 3, h, w) to the input of the loss."""

    def __init__(self, encoder: FrozenEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor | LazyLogits:
        return logits_of(self.head, self.encoder(images), images)


def normalized(images: Tensor, encoder: FrozenEncoder) -> Tensor:
    """Normalize uint8 images (n, 3, h, w) for the encoder."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    return (images / 255 - mean) / std


def shuffled(positions: Sequence[int], epoch: int, seed: int) -> list[tuple[int, int]]:
    """Return the samples (epoch, position) of an epoch in random order, without those that fill no batch."""
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(1000 * seed + epoch)).tolist()
    return [(epoch, positions[i]) for i in order[: len(order) // BATCH * BATCH]]


def batch_of(samples: Sequence[Any], device: str) -> tuple[Tensor, Tensor]:
    """Stack samples to images (n, 3, h, w) and masks (n, h, w)."""
    images, masks = (torch.stack([sample[name] for sample in samples]).to(device) for name in ("image", "mask"))
    return images, masks


def train_heads(
    heads: list[nn.Module], rates: list[float], encoder: FrozenEncoder, data: Any, order: list[Any], device: str,
    bf16: bool, tick: Callable[[], None],
) -> None:  # fmt: skip
    """Train heads side by side on the samples of `order`; `tick` is called after each step of each head."""
    optimizers = [torch.optim.AdamW(h.parameters(), r, weight_decay=WEIGHT_DECAY)
                  for h, r in zip(heads, rates, strict=True)]  # fmt: skip
    autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=bf16)
    for step, first in enumerate(range(0, len(order), BATCH)):
        images, masks = batch_of([data[index] for index in order[first : first + BATCH]], device)
        with autocast():
            images = normalized(images, encoder)
            maps = encoder(images)
        for head, optimizer, rate in zip(heads, optimizers, rates, strict=True):
            torch.manual_seed(step)  # dropout does not depend on the other heads
            optimizer.param_groups[0]["lr"] = rate * lr_factor(step, len(order) // BATCH, WARMUP, "poly")
            with autocast():
                loss = cross_entropy(logits_of(head, maps, images), masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tick()


@torch.no_grad()
def score(
    network: nn.Module, encoder: FrozenEncoder, data: Any, positions: Sequence[int], device: str, bf16: bool
) -> float:
    """Return the mIoU of a network at the size of the masks; images are padded to multiples of 32 for all networks."""
    network.eval()
    metrics = SegmentationMetrics(K, absent="zero").to(device)
    for first in range(0, len(positions), BATCH):
        images, masks = batch_of([data[i] for i in positions[first : first + BATCH]], device)
        h, w = masks.shape[-2:]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            padded = F.pad(normalized(images, encoder), (0, -w % 32, 0, -h % 32), mode="replicate")
            logits = network(padded)
        metrics.update(upsampled_argmax(logits, padded.shape[-2:])[:, :h, :w], masks)
    return float(metrics.compute()["miou"])
