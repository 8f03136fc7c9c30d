"""Training at 512x1024, the usual size for street scenes, with batches of 2 and 16: images per second, peak memory.

    pip install -e ".[bench]"
    python examples/benchmarks/street_scenes.py --device cuda       # writes street_scenes.json, then docs/benchmarks.md

Ours and every peer, in float32 and bf16, with and without torch.compile, each in its own process. The peak is that of
PyTorch's allocator, with parameters, gradients and the optimizer's state. Goals with 2 images: 2.4 GB in float32,
1.5 GB in bf16, and faster than every peer. Made for a GPU: on a CPU the memory is that of the process, and returning
freed memory at once makes it slow.
"""

import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from measure import Peak, Row, in_fresh_process, options, publish, timed
from networks import PEERS, Ours, Peer, make_batch
from rich.progress import Progress
from train_step import K, Step

SIZE, BATCHES, WARM_UP = (512, 1024), (2, 16), 3
GOALS = {False: 2.4e9, True: 1.5e9}  # bytes of ours with 2 images, in float32 and bf16
TEXT = """\
A training step (forward, loss, backward, fused AdamW) at 512x1024 with 19 classes. Every ResNet-50 is frozen; the
HRNets are trained end to end. Images per second are of the median step; the peak is that of PyTorch's allocator. The
ratio is our images per second over the peer's: above 1 ours is faster. 0 images per second: out of memory."""


def measured(name: str, n: int, bf16: bool, compiled: bool, chosen: Any) -> tuple[float, float]:
    """Return images per second (0: out of memory) and the peak in bytes."""
    peak = Peak(chosen.device)
    try:
        network = Ours(K) if name == "ours" else Peer(name, K)
        if compiled:
            whole = network.network
            for unit in (whole.encoder, whole.head) if name == "ours" else (whole,):
                unit.compile()
        step = Step(network, make_batch(n, (64, 128) if chosen.quick else SIZE, K, chosen.device), bf16)
        seconds = [timed(step, chosen.device)[1][0] for _ in range(WARM_UP + chosen.repeats)]
    except torch.OutOfMemoryError:
        return 0.0, peak.extra() * 2**20
    return n / statistics.median(seconds[WARM_UP:]), peak.extra() * 2**20


def rows_of(chosen: Any, progress: Progress) -> list[Row]:
    """Measure all networks in all settings."""
    names = ["ours", *chosen.peers]
    batches, compilers = ((2,), (False,)) if chosen.quick else (BATCHES, (False, True))
    settings = list(product(batches, chosen.bf16, compilers))
    task = progress.add_task("networks", total=len(names) * len(settings))
    rows = []
    for n, bf16, compiled in settings:
        results = {}
        for name in names:
            results[name] = in_fresh_process(measured, name, n, bf16, compiled, chosen)
            progress.advance(task)
        what = f"{n} images, {'bf16' if bf16 else 'float32'}{', compiled' if compiled else ''}"
        ours = results["ours"][0]
        for name, (speed, held) in results.items():
            row: Row = {"network": f"{name}: {what}", "images / s": speed, "peak (GB)": held / 1e9}
            row |= {"ratio": ours / speed if speed else None}
            if name != "ours":
                row |= {"goal": "faster", "met": ours > speed}
            elif n == 2 and chosen.device != "cpu":
                row |= {"goal": f"{GOALS[bf16] / 1e9} GB", "met": ours > 0 and held <= GOALS[bf16]}
            else:
                row |= {"goal": None, "met": None}
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, PEERS, arguments)
    with Progress(transient=True) as progress:
        rows = rows_of(chosen, progress)
    publish("street_scenes", "Street scenes", TEXT, {"512x1024": rows}, [], "", chosen)


if __name__ == "__main__":
    main()
