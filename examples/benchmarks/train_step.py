"""Time of a training step against the peers: forward, loss, backward and optimizer; 2 images of 512x512, 19 classes.

    pip install -e ".[bench]"
    python examples/benchmarks/train_step.py      # writes train_step.json, then docs/benchmarks.md

1. Ours with and without activation checkpointing, every peer with its own encoder, and the forward pass of our encoder
   alone, which is the lower bound; in float32 and, where the device supports it, in bf16.
2. The peers' heads on our encoder: the difference when the encoder is the same.
3. The share of each part in a step, beside the time that memory bandwidth needs at least and a worker's time for data.
4. Growth from 256x256 to 2048x2048 and with the batch: the exponent of pixels.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data import KINDS, sample_row, write_files
from measure import FASTER, Row, add_exponents, bars_of, compared, in_turns, in_turns_apart, options, publish, timed
from memory import bytes_of_a_step
from networks import PEERS, SMP, OnOurEncoder, Ours, Peer, make_batch
from rich.progress import Progress
from torch import Tensor, nn

from early_fusion_seg.losses import cross_entropy

K = 19
MOVED = "not in the sum: the saved activations and their gradients written and read once, at a copy's bandwidth"
DATA = "not in the sum: two samples of Cityscapes with the recipe's augmentation, in workers"
ENCODER, CHECKPOINTING, ON_OURS = "the encoder alone", "ours, activation checkpointing", " on our encoder"
GOALS = {ENCODER: 0.5, CHECKPOINTING: None}  # a step takes at most twice the time of the encoder alone
TEXT = """\
A training step (forward, loss, backward, fused AdamW) with 2 images of 512x512 and 19 classes. Every ResNet-50 is
frozen; the HRNets are trained end to end. Each network runs in its own process. Ratios are the peer's time over ours,
medians of interleaved runs: above 1 ours is faster. Goals: faster than each peer; at most twice the time of the
encoder's forward pass alone, which is the lower bound (a ratio of at least 0.5); with activation checkpointing at most
1.35 times the time without. If the memory allocator is set to keep freed memory, PSPNet, which runs half of the
encoder, is faster than ours: docs/decisions/0007-small-and-fast.md ("The allocator")."""


class Step:
    """A training step that can be called repeatedly.

    Args:
        network: Returns the loss.
        batch: Images (n, 3, h, w) and target (n, h, w).
        bf16: Run under autocast.
    """

    def __init__(self, network: nn.Module, batch: tuple[Tensor, Tensor], bf16: bool) -> None:
        self.network, self.batch, self.bf16 = network.to(batch[0].device), batch, bf16
        trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.batch[0].device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.network(*self.batch)
        loss.backward()
        self.optimizer.step()


def step_rows(chosen: Any, progress: Progress) -> list[Row]:
    """Time the steps of all networks in turns, in both precisions."""
    side, rows = 160 if chosen.quick else 512, []
    shared = [name for name in SMP if name in chosen.peers and name != "PAN"]  # PAN needs a dilated encoder
    names = ["ours", CHECKPOINTING, *chosen.peers, *(f"{name}{ON_OURS}" for name in shared), ENCODER]
    for bf16 in chosen.bf16:
        makers = {name: partial(make_work, name, side, chosen.device, bf16) for name in names}
        kind = "bf16" if bf16 else "float32"
        times = in_turns_apart(makers, chosen.repeats, chosen.device, progress, f"steps, {kind}")
        found = compared(kind, times, {name: GOALS.get(name, 1.0) for name in names if name != "ours"})
        for row in found:
            if row["peer"] == CHECKPOINTING:
                row |= {"goal": 1.35, "met": row["cpu ratio"] <= 1.35}
            elif row["peer"].endswith(ON_OURS):
                row |= {"goal": None, "met": None}
        rows += found
    return rows


def make_work(name: str, side: int, device: str, bf16: bool) -> Callable[[], Any]:
    """Build the function that is timed under a name."""
    batch = make_batch(2, side, K, device)
    if name == ENCODER:
        return partial(encode, Ours(K).to(device), batch, bf16)
    if name in ("ours", CHECKPOINTING):
        return Step(Ours(K, activation_checkpointing=name == CHECKPOINTING), batch, bf16)
    network = OnOurEncoder(name.removesuffix(ON_OURS), K) if name.endswith(ON_OURS) else Peer(name, K)
    return Step(network, batch, bf16)


@torch.no_grad()
def encode(ours: Ours, batch: tuple[Tensor, Tensor], bf16: bool) -> None:
    """Compute the encoder's maps only."""
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=bf16):
        ours.network.encoder(batch[0])


def part_rows(chosen: Any) -> list[Row]:
    """Time each part of a step."""
    batch = make_batch(2, 64 if chosen.quick else 512, K, chosen.device)
    ours = Ours(K).to(chosen.device)
    network = ours.network
    optimizer = torch.optim.AdamW(network.head.parameters(), lr=1e-4, fused=True)
    rows = []
    for bf16 in chosen.bf16:
        seconds: dict[str, list[float]] = {}

        def part(name: str, work: Callable[[], Any], seconds: dict[str, list[float]] = seconds) -> Any:
            result, (_, processor) = timed(work, chosen.device)
            seconds.setdefault(name, []).append(processor)
            return result

        for _ in range(chosen.repeats + 1):
            with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=bf16):
                maps = part("encoder, forward", lambda: network.encoder(batch[0]))
                logits = part("head, forward", lambda maps=maps: network.head.lazy_logits(maps, batch[0]))
                loss = part("loss and its gradient", lambda logits=logits: cross_entropy(logits, batch[1]))
            del maps, logits  # a real step frees this memory too
            part("head, backward", loss.backward)
            part("optimizer", optimizer.step)
            optimizer.zero_grad()
        medians = {name: 1000 * statistics.median(s[1:]) for name, s in seconds.items()}
        total = sum(medians.values())
        kind = "bf16" if bf16 else "float32"
        rows += [
            {"what": kind, "part": p, "processor (ms)": ms, "share (%)": 100 * ms / total} for p, ms in medians.items()
        ]
        saved, _ = bytes_of_a_step(ours, *batch[0].shape[::3], K, chosen.device, bf16)
        ms = 4 * saved * seconds_per_byte(chosen.device) * 1000
        rows.append({"what": kind, "part": MOVED, "processor (ms)": ms, "share (%)": 100 * ms / total})
    if not chosen.quick:
        rows.append({"what": "both", "part": DATA, "processor (ms)": data_time(), "share (%)": None})
    return rows


def seconds_per_byte(device: str) -> float:
    """Return the processor seconds for each byte that is read or written, from a copy of 256 MiB."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    times = [timed(partial(target.copy_, source), device)[1][1] for _ in range(9)]
    return statistics.median(times[1:]) / (2 * source.nbytes)


def data_time() -> float:
    """Return a worker's processor time for two training samples of Cityscapes, in milliseconds."""
    size, suffix, kilobytes, recipe = KINDS["Cityscapes"]
    with tempfile.TemporaryDirectory() as folder:
        return 2 * sample_row(write_files(Path(folder) / recipe, size, suffix, kilobytes), recipe)["sample (ms)"]


def growth_rows(chosen: Any, progress: Progress) -> list[Row]:
    """Time one image of growing size, then batches of growing length."""
    network = Ours(K, "resnet18" if chosen.quick else "resnet50")
    sides = (64, 128) if chosen.quick else (256, 512, 1024, 2048)
    batches = (2,) if chosen.quick else (2, 4, 8)
    sizes = [(1, side) for side in sides] + [(n, sides[0]) for n in batches]
    works = {f"{n} {side}": Step(network, make_batch(n, side, K, chosen.device), bf16=False) for n, side in sizes}
    times = in_turns(works, min(3, chosen.repeats), chosen.device, progress, "growth")
    rows = [{"batch": n, "side": side, "processor (ms)": 1000 * times[f"{n} {side}"][1]} for n, side in sizes]
    add_exponents(rows, "processor (ms)")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, PEERS, arguments)
    with Progress(transient=True) as progress:
        steps, parts, growth = step_rows(chosen, progress), part_rows(chosen), growth_rows(chosen, progress)
    tables = {"Training steps": steps, "Where the time of a step goes": parts, "Growth, float32": growth}
    publish("train_step", "Training steps", TEXT, tables, bars_of(steps), FASTER, chosen)


if __name__ == "__main__":
    main()
