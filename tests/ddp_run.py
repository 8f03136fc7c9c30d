"""Script that test_distributed.py runs in 1, 2 or 3 processes: train, evaluate, and print the results as JSON."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from early_fusion_seg import ReverseHRNetSeg
from early_fusion_seg.callbacks import PanelLogger
from early_fusion_seg.callbacks.last_checkpoint import LastCheckpoint
from early_fusion_seg.data.datamodule import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import Source
from early_fusion_seg.labels import LabelSet

BATCH, STEPS, VIT_STEPS = 6, 20, 4


class UnevenSource(Source):
    """Images with different numbers of ignored pixels."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def key(self, index: int) -> str:
        return f"image-{index}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(index)
        mask = rng.integers(0, 3, (8, 8)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        image = np.clip(mask[..., None] * 90 + rng.integers(0, 40, (64, 64, 3)), 0, 255).astype(np.uint8)
        mask[: 64 * (index % 5) // 5] = 255
        return image, mask


class Uneven(SegmentationDataModule):
    sizes = {"train": 43, "val": 5, "test": 5, "predict": 2}

    @property
    def label_set(self) -> LabelSet:
        return LabelSet("toy", ("a", "b", "c"), ((0, 0, 0),) * 3, ((0, 0), (1, 1), (2, 2)))

    def source(self, split: Split) -> Source:
        return UnevenSource(self.sizes[split])


class Recorder(Callback):
    """Records loss, image keys and bytes of synchronized gradients of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.keys: list[list[str]] = []
        self.bytes: list[int] = []
        self.synchronized: list[str] = []  # encoder parameters and buffers that DDP synchronizes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            trainer.strategy.model.register_comm_hook(None, self.hook)
            ignored = trainer.strategy.model.parameters_to_ignore
            encoder = [name for name, _ in pl_module.named_parameters() if ".encoder." in name]
            self.synchronized = [name for name in encoder if name not in ignored]
            self.synchronized += [f"buffer {buffer.shape}" for buffer in trainer.strategy.model.modules_buffers]

    def hook(self, _: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.bytes[-1] += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int) -> None:
        self.bytes.append(0)
        self.keys.append(batch["key"])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step > len(self.losses):  # not between accumulated batches
            self.losses.append(trainer.callback_metrics["train/loss"].item())


class SigtermToLastRank(Callback):
    """Sends SIGTERM to the last process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def model(freeze_norms: bool, encoder: str = "resnet18") -> ReverseHRNetSeg:
    seed_everything(0, verbose=False)
    made = ReverseHRNetSeg(
        encoder=encoder, encoder_weights="random", width=8, blocks=1, num_classes=3, class_weights=[0.5, 1.0, 3.0],
        warmup_steps=1, optimizer="sgd", lr=0.05,
    )  # fmt: skip
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d) and freeze_norms:  # batch statistics differ between processes
            module.eval()
            module.train = lambda mode=True, module=module: module
    return made


def engine(devices: int, *callbacks: Callback, **options: Any) -> Trainer:
    names = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    options = dict.fromkeys(names, False) | {"strategy": "ddp" if devices > 1 else "auto"} | options
    return Trainer(accelerator="cpu", devices=devices, callbacks=list(callbacks), **options)


def fit(
    devices: int, batch: int, freeze_norms: bool = True, encoder: str = "resnet18", **options: Any
) -> dict[str, Any]:
    made, recorder = model(freeze_norms, encoder), Recorder()
    before = made.network.encoder.state_hash()
    trainer = engine(devices, recorder, **({"max_steps": STEPS} | options))
    trainer.fit(made, Uneven("", batch_size=batch, num_workers=0, crop_size=48))
    assert made.network.encoder.state_hash() == before
    scores = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    statistics = [b.tolist() for name, b in made.network.head.named_buffers() if "running_mean" in name][-1]
    gradients = sum(p.numel() * 4 for p in made.network.head.parameters())
    return {
        "losses": recorder.losses, "bytes": recorder.bytes, "gradients": gradients, "keys": recorder.keys,
        "synchronized": recorder.synchronized, "scores": scores, "statistics": statistics,
    }  # fmt: skip


def test(devices: int, images: int, folder: Path) -> dict[str, Any]:
    made, data = model(freeze_norms=False), Uneven("", num_workers=0)
    data.sizes = data.sizes | {"test": images}
    trainer = engine(devices, PanelLogger(), logger=CSVLogger(folder, name=f"test-{images}"))
    trainer.test(made, data, verbose=False)
    panels = {path.name: path.read_bytes().hex() for path in sorted(folder.glob(f"test-{images}/**/*.png"))}
    scores = {name: value.item() for name, value in trainer.callback_metrics.items()}
    metric = made.metrics["test"]
    metric._computed = None
    metric.sync() if devices > 1 else None
    return {"scores": scores, "images": metric.images.item(), "confusion": metric.confusion.tolist(), "panels": panels}


def stopped_by_sigterm(devices: int, step: int, folder: Path) -> tuple[bool, int]:
    """Train two epochs of two steps; return whether SIGTERM stopped it, and the step of the checkpoint."""
    data = Uneven("", batch_size=2, num_workers=0, crop_size=48)
    data.sizes = data.sizes | {"train": 4 * devices}
    trainer = engine(
        devices,
        SigtermToLastRank(step),
        LastCheckpoint(folder),
        max_epochs=2,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    try:
        trainer.fit(model(freeze_norms=False), data)
    except SIGTERMException:
        return True, torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
    return False, torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


if __name__ == "__main__":
    devices, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    results = {"fit": fit(devices, BATCH // devices), "five": test(devices, 5, folder), "two": test(devices, 2, folder)}
    results["vit"] = fit(devices, BATCH // devices, encoder="vit_tiny_patch16_224", max_steps=VIT_STEPS)
    if devices == 1:
        results["accumulated"] = fit(1, BATCH // 3, accumulate_grad_batches=3)
    else:
        results["train_norms"] = fit(devices, BATCH // devices, freeze_norms=False, max_epochs=1)
        results["sigterm"] = [stopped_by_sigterm(devices, step, folder / str(step)) for step in (1, 2, 4)]
    collected: list[Any] = [results]
    if devices > 1:
        collected = [None] * devices
        torch.distributed.all_gather_object(collected, results)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print("RESULT", json.dumps(collected))
