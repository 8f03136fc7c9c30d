"""The exported graph: an image of any size in, its label map out; resizing and normalization are inside.

Shapes: n images of h x w pixels, K classes.
"""

import re
from fractions import Fraction
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from early_fusion_seg.errors import UserError
from early_fusion_seg.head import upsample
from early_fusion_seg.inference.eval_copy import eval_copy
from early_fusion_seg.inference.predictor import interpolated
from early_fusion_seg.logits import LazyLogits
from early_fusion_seg.network import EarlyFusionNet

LOWEST_TORCH = (2, 14)
"""The lowest version of PyTorch that the graphs have been compared on; older ones fix more sizes when they trace."""
EXAMPLE = 97, 131
"""Height and width of the example at the network: no multiples of a stride, not equal, and no map has one pixel."""

FIXED_SIZE = re.compile(r"(Eq\(.+, [1-9]\d*\)) on node")
"""In a check of the traced program: a size has a fixed value, as that of timm's rotary position embedding."""


class ImageToLabels(nn.Module):
    """Segment images like `Predictor` with whole images and one pass, but in operators that any size can run.

    All logits of an image are in memory at once. A loop over rows would be unrolled for the size of the example.

    Args:
        network: The network; used in eval mode.
        scale: Resize factor for images before the network.
        temperature: Divides the logits before the softmax.
        scores: Also return class probabilities.
    """

    def __init__(
        self, network: EarlyFusionNet, scale: float = 1.0, temperature: float = 1.0, scores: bool = False
    ) -> None:
        super().__init__()
        self.network = eval_copy(network)
        self.scale, self.temperature, self.scores = scale, temperature, scores
        self.eval()

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Segment images.

        Args:
            image: (n, 3, h, w) RGB, uint8.

        Returns:
            Labels (n, h, w) uint8, and if `scores`, class probabilities (n, K, h, w) float32.
        """
        logits = whole_logits(self.network.lazy_logits(resized(image, self.scale)))
        logits = F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)
        labels = logits.argmax(1).to(torch.uint8)
        return (labels, (logits / self.temperature).softmax(1)) if self.scores else labels


def whole_logits(lazy: LazyLogits) -> Tensor:
    """Compute `lazy.logits()`, (n, K, h, w), in convolutions and whole maps."""
    total: Tensor | None = None
    for i in reversed(range(len(lazy.features))):
        x = F.conv2d(lazy.features[i], lazy.weights[i], lazy.biases[i])
        if total is not None:
            x = x + upsample(total, lazy.ratios[i + 1] // lazy.ratios[i], x.shape[-2:])
        total = x
    assert total is not None
    return total.float()


def resized(image: Tensor, factor: float) -> Tensor:
    """Resize images (n, 3, h, w) uint8 like the predictor, without a branch on their size."""
    if factor == 1:
        return image
    size = [rounded_product(side, factor) for side in image.shape[-2:]]
    return interpolated(image / 255, size, factor)


def rounded_product(side: int, factor: float) -> int:
    """Compute `max(1, round(side * factor))` in integers, because the file formats cannot round sizes.

    Where the product is a half, `round` sees the rounding errors of floats and this function does not. The two are
    equal for all sides if the factor is a multiple of a power of two, such as 0.5 or 0.75.

    Example:
        >>> [rounded_product(side, 0.5) for side in (1, 3, 5, 7)], rounded_product(90, 0.7)
        ([1, 2, 2, 4], 63)
    """
    above, below = Fraction(factor).limit_denominator(10_000).as_integer_ratio()
    doubled = 2 * side * above + below
    nearest, rest = doubled // (2 * below), doubled % (2 * below)
    half = 1 - (rest + 2 * below - 1) // (2 * below)  # 1 if the product ends with .5, else 0
    return cast(int, torch.sym_max(1, nearest - half * (nearest % 2)))  # a half becomes the even neighbor


@torch.no_grad()
def trace(graph: ImageToLabels) -> ExportedProgram:
    """Trace the graph for any number, height and width of images.

    PyTorch takes for granted that no size is 1 where a size is not known, for example when a convolution chooses its
    memory format. It checks this when the program runs, and so refuses a single image and maps of one pixel. The graph
    does not depend on it, so the checks are removed; `parity.py` runs the graph on such sizes.

    Raises:
        UserError: PyTorch is too old, or the encoder works out a number from the size of the example.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < LOWEST_TORCH:
        lowest = ".".join(map(str, LOWEST_TORCH))
        raise UserError(f"export needs PyTorch {lowest} or newer, found {torch.__version__}; pip install -U torch")
    device = graph.network.mean.device
    sides = (round(side / graph.scale) for side in EXAMPLE)
    example = torch.zeros(2, 3, *sides, dtype=torch.uint8, device=device)
    any_size = {"image": dict.fromkeys((0, 2, 3), Dim.DYNAMIC)}
    with symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # made at run time
        program = torch.export.export(
            graph,
            (example,),
            dynamic_shapes=any_size,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,  # checks are nodes, which can be removed
        )
    for symbol in program.range_constraints:
        program.range_constraints[symbol] = ValueRanges(1, int_oo)
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        if found := FIXED_SIZE.search(str(node.args[1])):
            raise UserError(
                f"{graph.network.encoder.name} cannot be exported: its code makes a number of the size of an image, "
                f"which the file would keep for all images ({found[1]}); use another encoder"
            )
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program
