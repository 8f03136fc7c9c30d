"""Compute the time to all-reduce the gradients of a step over common links: the tables of docs/scaling.md.

python examples/benchmarks/scaling.py

Computed, not measured: in a ring all-reduce over N processes each process sends and receives 2 (N - 1) / N times the
bytes of the gradients, at the link's nominal bandwidth, without latency and without overlap with the backward pass.
"""

from early_fusion_seg import ReverseHRNetSeg

PROCESSES = 8
STEP = 0.2  # seconds of computation, assumed
LINKS = {  # nominal bytes per second in one direction
    "1 Gb/s Ethernet": 1e9 / 8,
    "10 Gb/s Ethernet": 10e9 / 8,
    "200 Gb/s InfiniBand": 200e9 / 8,
    "PCIe 4.0 x16": 16 * 16e9 * 128 / 130 / 8,
    "NVLink 4": 450e9,
}
UNET = 32_523_715  # all parameters of segmentation_models_pytorch.Unet("resnet50", classes=19), version 0.6.0


def trained_parameters(freeze_encoder: bool) -> int:
    """Return the number of trained parameters of the default network with 19 classes."""
    model = ReverseHRNetSeg(num_classes=19, encoder_weights="random", freeze_encoder=freeze_encoder)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def all_reduce_seconds(parameters: int, bandwidth: float, processes: int = PROCESSES) -> float:
    """Return the seconds to all-reduce float32 gradients."""
    return 2 * (processes - 1) / processes * 4 * parameters / bandwidth


def tables() -> str:
    """Return the bytes, the times and the speed-ups as Markdown."""
    trained = {
        "head, encoder frozen": trained_parameters(freeze_encoder=True),
        "head and encoder": trained_parameters(freeze_encoder=False),
        "Unet, all of it": UNET,
    }
    sizes = [f"| {name} | {n:,} | {4 * n / 1e6:.1f} |" for name, n in trained.items()]
    title = f"| {' | '.join(['link', *trained])} |"
    times, faster = [], []
    for link, bandwidth in LINKS.items():
        seconds = [all_reduce_seconds(n, bandwidth) for n in trained.values()]
        times.append(f"| {link} | {' | '.join(f'{1000 * t:.3g}' if t < 1 else f'{1000 * t:.0f}' for t in seconds)} |")
        faster.append(f"| {link} | {' | '.join(f'{PROCESSES * STEP / (STEP + t):.1f}' for t in seconds)} |")
    line = "|---" + len(trained) * "|---:" + "|"
    first = ["| trained | parameters | MB per step |", "|---|---:|---:|", *sizes]
    return "\n".join([*first, "", title, line, *times, "", title, line, *faster]) + "\n"


if __name__ == "__main__":
    print(tables(), end="")
