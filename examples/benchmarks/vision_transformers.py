"""Measure what plain vision transformers (ViTs) as encoders cost, and how exactly their maps are resampled.

    OMP_NUM_THREADS=1 python examples/benchmarks/vision_transformers.py

First: the shift, in pixels, of each way to resample a map to another stride. The map has the coordinates of its cell
centers. The shift is the largest difference from those of the new cells, 32 pixels or more from the border.
Second: the time to interpolate the position embedding (DINOv3: to compute its rotary one) in each forward pass, and
the time of a forward pass in bf16-mixed, both over that of a forward pass in float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import in_turns, options
from rich.progress import Progress
from torch import Tensor

from early_fusion_seg import FrozenEncoder
from early_fusion_seg.resample import resample

SIZE = (360, 480)
ENCODERS = ("vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3")
WAYS: dict[str, Callable[[Tensor, int, int, list[int]], Tensor]] = {
    "ours": lambda x, source, target, size: resample(x, source, target, SIZE),
    "F.interpolate(size)": lambda x, source, target, size: F.interpolate(x, size, mode="bilinear"),
    "F.interpolate(size, antialias)": lambda x, s, t, size: F.interpolate(x, size, mode="bilinear", antialias=True),
    "F.adaptive_avg_pool2d": lambda x, source, target, size: F.adaptive_avg_pool2d(x, size),
}


def centers(stride: int) -> Tensor:
    """Return a map (1, 2, h, w) of the y and x of the centers of cells, in pixels."""
    axes = [(torch.arange(-(-n // stride)) + 0.5) * stride for n in SIZE]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def shift(way: str, source: int, target: int) -> float:
    """Return the largest shift inside, in pixels."""
    expected = centers(target)
    ours = WAYS[way](centers(source), source, target, list(expected.shape[-2:]))
    edge = torch.tensor(SIZE).view(2, 1, 1) - 32
    inside = ((expected[0] >= 32) & (expected[0] <= edge)).all(0)
    return float((ours - expected)[0].abs()[:, inside].max())


def ratios(name: str, n: int, size: tuple[int, int], repeats: int) -> tuple[float, float]:
    """Return two processor times over that of a forward pass of n images: of its position embedding, and in bf16."""
    encoder = FrozenEncoder(name, weights="random")
    model, images = encoder.model.model, torch.rand(n, 3, *size)
    tokens = torch.rand(n, *(-(-side // encoder.strides[0]) for side in size), encoder.channels[0])
    bf16 = torch.autocast("cpu", torch.bfloat16)(encoder)
    works = {"all": lambda: encoder(images), "position": lambda: model._pos_embed(tokens), "bf16": lambda: bf16(images)}
    with torch.no_grad(), Progress(disable=True) as progress:
        times = in_turns(works, repeats, "cpu", progress, name)
    return times["position"][1] / times["all"][1], times["bf16"][1] / times["all"][1]


if __name__ == "__main__":
    chosen = options(__doc__)
    for way in WAYS:
        print(way, *(f"{s} to {t}: {shift(way, s, t):.1f} px" for s in (14, 16) for t in (4, 8, 16, 32)), sep=", ")
    for name in ENCODERS:
        for n, size in ((4, (224, 224)), (1, SIZE)):  # a batch of crops, an image of an evaluation
            position, bf16 = ratios(name, n, size, chosen.repeats)
            print(f"{name}, {n} x {size[1]}x{size[0]}: position {100 * position:.1f} %, bf16 {bf16:.2f} of float32")
