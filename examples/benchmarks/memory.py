"""Memory of a training step against the peers: bytes alive when the forward pass ends, and the peak of the step.

    pip install -e ".[bench]"
    python examples/benchmarks/memory.py      # writes memory.json, then docs/benchmarks.md

The script also counts the FLOPs of the forward pass with the loss (PyTorch's FlopCounterMode).

Every tensor storage that an operation allocates is tracked until it is freed. Saved bytes are those of the storages
alive after the loss and before backward. Parameters and the batch are not counted. The peak is the highest sum after
any operation of forward and backward, gradients of parameters included; temporary memory inside an operation is not
seen. Both are properties of the computation and equal on every machine.

1. One image of 512x512 (half of a batch of two), float32, 19 classes: ours and the peers.
2. Ours with activation checkpointing, with 171 classes, with four streams, in bf16.
3. Growth from 256x256 to 2048x2048 and with the batch: the exponent of pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from measure import Row, add_exponents, options, publish
from networks import HRNETS, PEERS, Ours, Peer, make_batch
from rich.progress import Progress
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

K, MIB = 19, 2**20
OTHER_HEADS: dict[str, dict[str, Any]] = {  # name -> settings that differ from the default
    "width 32": {"width": 32},
    "width 96": {"width": 96},
    "2 blocks": {"blocks": [0, 2, 2, 2, 2]},
    "2 HR modules": {"hr_modules": [2, 0, 0, 0, 0]},
    "progressive": {"plan": "progressive"},
    "four streams": {"extra_stream": False},
    "four streams, width 96": {"extra_stream": False, "width": 96},
    "four streams, width 128": {"extra_stream": False, "width": 128},
}
TEXT = """\
Training with a frozen ResNet-50 (the HRNets are trained end to end), per image of a batch of two: "saved" is the bytes
of all storages alive when the forward pass ends, "peak" the highest in forward and backward. Parameters and the batch
are not counted. "saved / ours" is the ratio of saved bytes. GFLOPs are of the forward pass and the loss for one image;
a multiplication with its addition counts as two. The exponent is the growth of saved bytes with the pixels, from the
first row on. Goals, for saved bytes: at most 0.65 of Unet's, 160 MiB, 100 MiB with activation checkpointing, 1.15 times
as many with 171 classes, exponents of at most 1.05."""


class LiveBytes(TorchDispatchMode):
    """Sum the bytes of the storages that operations allocate, while each is alive.

    Args:
        known: Tensors that exist before and are not counted.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        """Return the bytes that are alive now."""
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        return sum(nbytes for _, nbytes in self.storages.values())


def bytes_of_a_step(network: nn.Module, n: int, side: int, k: int, device: str, bf16: bool = False) -> tuple[int, int]:
    """Return the bytes alive when the forward pass ends, and the peak, of a step with n square images."""
    batch = make_batch(n, side, k, device)
    with LiveBytes([*network.to(device).parameters(), *network.buffers(), *batch]) as live:
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=bf16):
            loss = network(*batch)
        saved = live.alive()
        loss.backward()
    for parameter in network.parameters():
        parameter.grad = None
    return saved, live.peak


@torch.no_grad()
def flops_of_a_forward(network: nn.Module, n: int, side: int, k: int, device: str) -> int:
    """Return the FLOPs of the forward pass with the loss, of n square images."""
    batch = make_batch(n, side, k, device)
    with FlopCounterMode(display=False) as flops:
        network.to(device)(*batch)
    return flops.get_total_flops()


def row(name: str, network: nn.Module, ours: Row | None, side: int, device: str, k: int = K, bf16: bool = False) -> Row:
    """Measure one network on a batch of two."""
    saved, peak = (x / 2 / MIB for x in bytes_of_a_step(network, 2, side, k, device, bf16))
    ratio = saved / ours["saved (MiB)"] if ours else 1.0
    return {
        "network": name,
        "saved (MiB)": saved,
        "peak (MiB)": peak,
        "saved / ours": ratio,
        "GFLOPs": flops_of_a_forward(network, 2, side, k, device) / 2 / 1e9,
    }


def peer_rows(chosen: Any, progress: Progress) -> list[Row]:
    """Compare with the peers, sorted by saved bytes."""
    side = 160 if chosen.quick else 512
    ours = row("ours", Ours(K), None, side, chosen.device)
    rows = []
    for name in progress.track(chosen.peers, description="peers"):
        kind = "trained end to end" if name in HRNETS else "frozen"
        rows.append(row(f"{name}, {kind}", Peer(name, K), ours, side, chosen.device))
    rows = [ours, *sorted(rows, key=lambda r: r["saved (MiB)"])]
    for found in rows:
        goal = 1 / 0.65 if found["network"] == "Unet, frozen" else None
        found |= {"goal": goal, "met": None if goal is None else found["saved / ours"] >= goal}
    return rows


def own_rows(chosen: Any, progress: Progress) -> list[Row]:
    """Compare ours with itself in other settings."""
    side, encoder = (64, "resnet18") if chosen.quick else (512, "resnet50")
    ours = row("default", Ours(K, encoder), None, side, chosen.device)
    rows = [
        ours,
        row("activation checkpointing", Ours(K, encoder, activation_checkpointing=True), ours, side, chosen.device),
        row("171 classes", Ours(171, encoder), ours, side, chosen.device, 171),
        row(
            "171 classes, checkpointing",
            Ours(171, encoder, activation_checkpointing=True),
            ours,
            side,
            chosen.device,
            171,
        ),
        row("bf16", Ours(K, encoder), ours, side, chosen.device, bf16=True),
    ]
    heads = dict(list(OTHER_HEADS.items())[:1]) if chosen.quick else OTHER_HEADS
    for name, settings in progress.track(heads.items(), description="other heads"):
        rows.append(row(name, Ours(K, encoder, **settings), ours, side, chosen.device))
    goals = {"default": 160, "activation checkpointing": 100, "171 classes": 1.15 * ours["saved (MiB)"]}
    for own in rows:
        goal = goals.get(own["network"])
        own |= {"goal (MiB)": goal, "met": None if goal is None else own["saved (MiB)"] <= goal}
    return rows


def growth_rows(chosen: Any, progress: Progress) -> list[Row]:
    """Measure one image of growing size, then batches of growing length."""
    network = Ours(K, "resnet18" if chosen.quick else "resnet50")
    sides = (64, 128) if chosen.quick else (256, 512, 1024, 2048)
    batches = (2, 4) if chosen.quick else (2, 4, 8)
    sizes = [(1, s) for s in sides] + [(b, sides[0]) for b in batches]
    rows: list[Row] = []
    for n, side in progress.track(sizes, description="growth"):
        saved, peak = (x / MIB for x in bytes_of_a_step(network, n, side, K, chosen.device))
        rows.append({"batch": n, "side": side, "saved (MiB)": saved, "peak (MiB)": peak})
    add_exponents(rows, "saved (MiB)")
    return [r | {"goal": 1.05, "met": None if r["exponent"] is None else r["exponent"] <= 1.05} for r in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, PEERS, arguments)
    with Progress(transient=True) as progress:
        peers, own, growth = (make(chosen, progress) for make in (peer_rows, own_rows, growth_rows))
    tables = {"Against the peers, an image of 512x512": peers, "Ours in other settings": own, "Growth": growth}
    bars = [(row["network"], row["saved / ours"]) for row in peers]
    publish("memory", "Memory of training", TEXT, tables, bars, "Saved bytes / ours (above 1: ours is smaller)", chosen)


if __name__ == "__main__":
    main()
