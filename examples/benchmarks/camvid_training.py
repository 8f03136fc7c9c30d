"""Training on CamVid: the shared parts of heads.py, freezing.py and from_scratch.py."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from early_fusion_seg import CamVidDataModule, FrozenEncoder, ReverseHRNet, SegmentationMetrics
from early_fusion_seg.inference import upsampled_argmax
from early_fusion_seg.io.atomic import replace_file
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


def batches(positions: Sequence[int], seed: int, steps: int) -> list[list[tuple[int, int]]]:
    """Return the samples of each step, as many epochs as the steps need."""
    samples = chain.from_iterable(shuffled(positions, epoch, seed) for epoch in count())
    return [list(islice(samples, BATCH)) for _ in range(steps)]


def batch_of(samples: Sequence[Any], device: str) -> tuple[Tensor, Tensor]:
    """Stack samples to images (n, 3, h, w) and masks (n, h, w)."""
    images, masks = (torch.stack([sample[name] for sample in samples]).to(device) for name in ("image", "mask"))
    return images, masks


class Training:
    """Heads that are trained side by side, so that each batch passes the encoder once.

    Args:
        heads: In training mode.
        rates: Learning rate of each head.
        encoder: Computes the maps; one that is not frozen is trained with the head, of which there must be one.
        steps: Length of the schedule.
        encoder_rate: Learning rate of an encoder that is trained.
    """

    def __init__(
        self,
        heads: Sequence[nn.Module],
        rates: Sequence[float],
        encoder: FrozenEncoder,
        steps: int,
        encoder_rate: float = 0.0,
    ) -> None:
        self.heads, self.encoder, self.steps, self.done = list(heads), encoder, steps, 0
        trained = [] if encoder.frozen else [encoder]
        self.rates = [(rate, encoder_rate)[: 1 + len(trained)] for rate in rates]
        self.optimizers = [
            torch.optim.AdamW([{"params": part.parameters()} for part in (head, *trained)], weight_decay=WEIGHT_DECAY)
            for head in heads
        ]
        self.parts: list[Any] = [*heads, *trained, *self.optimizers]

    def run(
        self,
        data: Any,
        positions: Sequence[int],
        seed: int,
        device: str,
        saved: Path | None,
        tick: Callable[[int], Any],
    ) -> None:
        """Train to the end.

        Args:
            data: Training images.
            positions: Those that are used.
            seed: Decides their order.
            device: Such as cpu or cuda.
            saved: File of the state after each epoch, from which the training resumes if it exists; or None.
            tick: Called after each step with the number of steps done.
        """
        if saved and saved.exists():
            self.load_state_dict(torch.load(saved))
        for samples in batches(positions, seed, self.steps)[self.done :]:
            self.step(*batch_of([data[index] for index in samples], device))
            tick(self.done)
            if saved and self.done % (len(positions) // BATCH) == 0:
                replace_file(saved, partial(torch.save, self.state_dict()))

    def step(self, images: Tensor, masks: Tensor) -> None:
        """Train all heads on one batch."""
        images = normalized(images, self.encoder)
        maps = self.encoder(images)
        for head, optimizer, rates in zip(self.heads, self.optimizers, self.rates, strict=True):
            torch.manual_seed(self.done)  # dropout does not depend on the other heads
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * lr_factor(self.done, self.steps, WARMUP, "poly")
            loss = cross_entropy(logits_of(head, maps, images), masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to resume."""
        return {"done": self.done, "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after the step at which the state was saved."""
        self.done = state["done"]
        for part, values in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(values)


@torch.no_grad()
def score(
    network: nn.Module, encoder: FrozenEncoder, data: Any, positions: Sequence[int], device: str, bf16: bool = False
) -> list[float]:
    """Return the IoU of each class at the size of the masks, 0..1; images are padded to multiples of 32."""
    network.eval()
    metrics = SegmentationMetrics(K, absent="zero").to(device)
    for first in range(0, len(positions), BATCH):
        images, masks = batch_of([data[i] for i in positions[first : first + BATCH]], device)
        h, w = masks.shape[-2:]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            padded = F.pad(normalized(images, encoder), (0, -w % 32, 0, -h % 32), mode="replicate")
            logits = network(padded)
        metrics.update(upsampled_argmax(logits, padded.shape[-2:])[:, :h, :w], masks)
    return metrics.compute()["per_class"].tolist()


class CamVidImages:
    """CamVid's images for trainings that are scored on val, or on a third of train that is held out.

    Args:
        root: Folder of CamVid.
        scale: Resize factor; scores are those of the resized masks.
    """

    def __init__(self, root: str, scale: float) -> None:
        self.crop = tuple(32 * round(scale * side / 32) for side in CROP)  # multiples of 32 for SMP
        module = CamVidDataModule(root, crop_size=self.crop, scale=scale, num_workers=0)
        self.class_names = module.class_names
        self.train, self.plain, self.val = (module.dataset(split) for split in ("train", "val", "val"))
        self.plain.source = self.train.source  # train, not augmented
        self.plain.scale = self.val.scale = scale
        self.parts = thirds([self.train.source.key(i) for i in range(len(self.train))])

    def train_and_score(
        self,
        training: Training,
        part: int | None,
        seed: int,
        device: str,
        saved: Path | None,
        tick: Callable[[int], Any],
    ) -> list[list[float]]:
        """Train to the end; return each head's IoU of each class.

        Args:
            training: The training.
            part: Third of train that is held out and scored; None: train on all of train, and score val.
            seed: As the other arguments, that of `Training.run`.
            device: Such as cpu or cuda.
            saved: File of the state, or None.
            tick: Called after each step.
        """
        positions = [i for p, members in enumerate(self.parts) if p != part for i in members]
        training.run(self.train, positions, seed, device, saved, tick)
        data, scored = (self.val, range(len(self.val))) if part is None else (self.plain, self.parts[part])
        encoder = training.encoder
        return [score(WithEncoder(encoder, head), encoder, data, scored, device) for head in training.heads]


def thirds(keys: Sequence[str]) -> list[list[int]]:
    """Split images into three parts: of each video, named by the key up to "_", the first, second and last third."""
    videos: dict[str, list[int]] = {}
    for i in sorted(range(len(keys)), key=lambda i: keys[i]):
        videos.setdefault(keys[i].split("_")[0], []).append(i)
    return [
        [i for video in videos.values() for i in video[len(video) * k // 3 : len(video) * (k + 1) // 3]]
        for k in range(3)
    ]
