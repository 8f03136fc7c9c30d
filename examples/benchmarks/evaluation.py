"""Evaluation: the confusion matrix against torchmetrics, and the memory for one large image.

    python examples/benchmarks/evaluation.py      # writes evaluation.json, then docs/benchmarks.md

1. `SegmentationMetrics.update` against `MulticlassConfusionMatrix.update` of torchmetrics on the same label maps.
2. `validation_step` of one image of 4000x3000 (network, label map, scores, loss): the memory of classification above
   that of the streams' features, and the peak; and the same network with plain upsampling.

Memory is the peak resident memory of a separate process (VmHWM, reset before the call), so temporary memory of
convolutions is counted too.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import FASTER, Peak, Row, bars_of, compared, in_fresh_process, in_turns, options, publish
from rich.progress import Progress
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from early_fusion_seg import ReverseHRNetSeg, SegmentationMetrics

K, SIZE = 19, (1024, 2048)
LARGE_K, LARGE_SIZE, LARGE_GOAL = 124, (3000, 4000), 300.0
SMALL = 4  # divides each side where torchmetrics needs more than 10 GiB at full size
CASES = [(torch.uint8, False, 1), (torch.int64, False, 1), (torch.uint8, True, 1), (torch.uint8, True, SMALL)]
TEXT = """\
The confusion matrix of label maps of 1024x2048 with 19 classes by `SegmentationMetrics.update` and by
`MulticlassConfusionMatrix.update` of torchmetrics; "unchecked" is with `validate_args=False`, "deterministic" under
`torch.use_deterministic_algorithms(True)`. There torchmetrics needs more than 10 GiB at full size, so it is measured
with a quarter of each side. Then `validation_step` of one image of 4000x3000 with 124 classes (default head):
"features" is the memory of the streams' last features, which every way to a label map needs, and "above them" is what
classification adds (goal: at most 300 MiB). "Plain" is `model(images).argmax(1)`; where its labels differ, the margin
is the difference of its two highest logits. Memory is the peak resident memory of a separate process. Medians of
interleaved runs: milliseconds are wall-clock time, and goals are for the ratio of processor time, which other work on
the machine does not lengthen."""


def label_maps(size: tuple[int, int], kind: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Make a prediction and a truth (1, H, W) of connected regions, a tenth ignored, that agree in most pixels."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randint(K, (2, 1, size[0] // 32, size[1] // 32), generator=random, dtype=torch.uint8)
    first, second = F.interpolate(coarse, size=size, mode="nearest")[:, 0]
    truth = first.clone()
    truth[: size[0] // 10] = 255
    prediction = torch.where(torch.rand(size, generator=random) < 0.2, second, first)
    return prediction[None].to(device, kind), truth[None].to(device, kind)


def make_metric(name: str, device: str) -> Metric:
    """Make our metric or a peer's."""
    if name == "ours":
        return SegmentationMetrics(K).to(device)
    return MulticlassConfusionMatrix(K, ignore_index=255, validate_args="unchecked" not in name).to(device)


def update(metric: Metric, maps: tuple[Tensor, Tensor], deterministic: bool) -> None:
    """Count one pair of label maps."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        metric.update(*maps)
    finally:
        torch.use_deterministic_algorithms(False)


def update_times(chosen: Any, size: tuple[int, int], progress: Progress) -> list[Row]:
    """Time updates in turns."""
    rows = []
    for kind, deterministic, part in CASES:
        maps = label_maps((size[0] // part, size[1] // part), kind, chosen.device)
        named = peers(chosen, deterministic, part)
        counts = [once(name, maps) for name in named]
        if not all(torch.equal(counts[0], count) for count in counts):
            raise SystemExit("the confusion matrices differ")
        works = {name: partial(update, make_metric(name, chosen.device), maps, deterministic) for name in named}
        if deterministic:
            works["ours, not deterministic"] = partial(update, make_metric("ours", chosen.device), maps, False)
        what = words(kind, deterministic, maps[0].shape)
        times = in_turns(works, chosen.repeats, chosen.device, progress, what)
        goals = {peer: 3.0 if peer == "torchmetrics" else None for peer in works if peer != "ours"}
        rows += compared(what, times, goals)
    return rows


def peers(chosen: Any, deterministic: bool, part: int) -> list[str]:
    """List the names that are measured in a case."""
    asked = "torchmetrics" in chosen.peers and (not deterministic or part == SMALL)
    return ["ours", *(["torchmetrics", "torchmetrics, unchecked"] if asked else [])]


def words(kind: torch.dtype, deterministic: bool, shape: Sequence[int]) -> str:
    """Name a case."""
    return f"{str(kind).removeprefix('torch.')}, {shape[-2]}x{shape[-1]}{', deterministic' if deterministic else ''}"


def once(name: str, maps: tuple[Tensor, Tensor]) -> Tensor:
    """Return the matrix (K, K) of one update."""
    metric = make_metric(name, str(maps[0].device))
    metric.update(*maps)
    return metric.confusion[:, :-1] if isinstance(metric, SegmentationMetrics) else metric.confmat


def update_memory(name: str, kind: torch.dtype, deterministic: bool, size: tuple[int, int], device: str) -> float:
    """Return the MiB that an update needs besides the label maps; a first, tiny update is not measured."""
    metric = make_metric(name, device)
    update(metric, label_maps((64, 64), kind, device), deterministic)
    maps = label_maps(size, kind, device)
    peak = Peak(device)
    update(metric, maps, deterministic)
    return peak.extra()


def memory_row(way: Callable[..., Any], case: tuple[torch.dtype, bool, int], size: tuple[int, int], chosen: Any) -> Row:
    """Measure the memory of updates in one case."""
    kind, deterministic, part = case
    size = size[0] // part, size[1] // part
    named = peers(chosen, deterministic, part)[:2]
    used = {name: way(update_memory, name, kind, deterministic, size, chosen.device) for name in named}
    row = {"what": words(kind, deterministic, size), "ours (MiB)": used["ours"]}
    return row | {"torchmetrics (MiB)": used.get("torchmetrics")}


class AfterStages(TorchDispatchMode):
    """Reset the peak memory at the first operation after the last HR module of a head.

    Attributes:
        features: MiB of the streams' features, the output of that module.
        peak: Peak from there on.
        before: Peak before, in MiB above the start.
    """

    def __init__(self, head: torch.nn.Module, device: str) -> None:
        super().__init__()
        self.device, self.armed = device, False
        head.stages[-1].register_forward_hook(self.arm)
        self.start = Peak(device)

    def arm(self, module: torch.nn.Module, inputs: Any, features: dict[int, Tensor]) -> None:
        self.armed, self.features = True, sum(x.nbytes for x in features.values()) / 2**20

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.armed:
            self.armed, self.before = False, self.start.extra()
            self.peak = Peak(self.device)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def evaluate(way: str, encoder: str, size: tuple[int, int], device: str) -> tuple[np.ndarray, dict[str, float]]:
    """Evaluate one image; return its label map (H, W) and the memory that this needs, in MiB.

    The plain way returns two maps: the labels, and the difference of the two highest logits.
    """
    torch.manual_seed(0)
    model = ReverseHRNetSeg(num_classes=LARGE_K, encoder=encoder, encoder_weights="random").eval().to(device)
    random = torch.Generator().manual_seed(0)
    image = torch.randint(256, (1, 3, size[0] // 8, size[1] // 8), generator=random, dtype=torch.uint8)
    image = F.interpolate(image.float(), size=size, mode="bilinear").to(device, torch.uint8)
    mask = torch.zeros(1, *size, dtype=torch.uint8, device=device)
    model.predict(np.zeros((64, 64, 3), np.uint8))
    if way == "plain":
        peak = Peak(device)
        logits = model(image)
        labels, mib = logits.argmax(1), {"peak": peak.extra()}
        first, second = logits.topk(2, dim=1).values.unbind(1)
        return np.stack([x[0].cpu().numpy() for x in (labels, first - second)]), mib
    with AfterStages(model.network.head, device) as marked:
        labels = model.validation_step({"image": image, "mask": mask, "key": ["0"]}, 0)["prediction"]
    above = marked.peak.extra()
    peak = max(marked.before, marked.peak.start - marked.start.start + above)
    return labels[0].cpu().numpy(), {"peak": peak, "features": marked.features, "above": above}


def large_row(way: Callable[..., Any], encoder: str, size: tuple[int, int], chosen: Any) -> Row:
    """Evaluate an image and, if chosen, compare with plain upsampling."""
    labels, mib = way(evaluate, "ours", encoder, size, chosen.device)
    row = {"image": f"{size[1]}x{size[0]}", "peak (MiB)": mib["peak"], "features (MiB)": mib["features"]}
    row |= {"above them (MiB)": mib["above"], "goal": LARGE_GOAL, "met": mib["above"] <= LARGE_GOAL}
    if "plain" in chosen.peers:
        (plain, margin), plain_mib = way(evaluate, "plain", encoder, size, chosen.device)
        differ = labels != plain
        row |= {"plain peak (MiB)": plain_mib["peak"], "pixels that differ": int(differ.sum())}
        row |= {"margin of these": float(margin[differ].max(initial=0.0))}
    return row


def main() -> None:
    chosen = options(__doc__, ["torchmetrics", "plain"])
    way: Callable[..., Any] = (lambda work, *given: work(*given)) if chosen.quick else in_fresh_process
    size = (256, 512) if chosen.quick else SIZE
    encoder, sizes = ("resnet18", [(90, 120)]) if chosen.quick else ("resnet50", [(600, 800), LARGE_SIZE])
    with Progress(transient=True) as progress:
        times = update_times(chosen, size, progress)
        memory = [memory_row(way, c, size, chosen) for c in progress.track(CASES, description="memory of an update")]
        large = [large_row(way, encoder, s, chosen) for s in progress.track(sizes, description="large images")]
    tables = {"Time of an update": times, "Memory of an update": memory, "Memory of one large image": large}
    bars = bars_of([row for row in times if "deterministic" not in row["what"]])
    publish("evaluation", "Evaluating", TEXT, tables, bars, FASTER, chosen)


if __name__ == "__main__":
    main()
