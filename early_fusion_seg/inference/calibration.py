"""Calibration: how well probabilities agree with accuracy, and the temperature that makes them agree better.

A model is calibrated if, of all pixels whose class it predicts with a probability (confidence) of 0.8, 80 % are right.
Networks are often too sure. Dividing all logits by one number, the temperature, corrects most of it and leaves the
labels as they are (Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599).

Confidences are counted in int64, in bins so narrow that their middles stand for them. So the counts are exact sums over
images and ranks, and need no float64, which some devices do not have.

Shapes: n images, K classes, H x W the label size, P pixels of a sample.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from early_fusion_seg.errors import UserError
from early_fusion_seg.logits import LazyLogits, as_lazy_logits
from early_fusion_seg.logits.chunked_loss import label_size
from early_fusion_seg.metrics import count_values

BINS = 15
"""Bins of equal width of the expected calibration error."""
NARROW_BINS = BINS * 1024
"""Bins in which confidences are counted: half a width, the largest error of a confidence, is 3e-5."""


class PixelScores(NamedTuple):
    """Labels of images, and how sure and how right they are.

    Attributes:
        labels: (n, H, W) uint8.
        counts: (NARROW_BINS, 2) int64, pixels by confidence and by whether the label is wrong (0) or right (1).
        nll: Sum of the negative log-likelihoods of the true classes, a float32 scalar.
    """

    labels: Tensor
    counts: Tensor
    nll: Tensor


@torch.no_grad()
def score_pixels(
    logits: Tensor | LazyLogits, target: Tensor, temperature: float = 1.0, ignore_index: int = 255
) -> PixelScores:
    """Compute label maps together with their scores, in chunks of rows.

    Args:
        logits: (n, K, h, w), K at most 255, or lazy logits.
        target: (n, H, W) integers; pixels of `ignore_index` get labels, but are not scored.
        temperature: Divides the logits.
        ignore_index: Target value of pixels that are left out.
    """
    lazy, size = as_lazy_logits(logits), label_size(target)
    labels = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    counts = torch.zeros(2 * NARROW_BINS + 1, dtype=torch.int64, device=target.device)  # the last: ignored pixels
    nll = torch.zeros((), device=target.device)
    for images, start, stop in lazy.chunks(size):
        rows, truth = lazy.upsampled(size, (images, start, stop)), target[images, start:stop]
        rows = rows if temperature == 1 else rows / temperature
        valid = truth != ignore_index
        true = rows.gather(-1, truth.long().where(valid, 0)[..., None])[..., 0]
        highest, predicted = rows.max(-1)
        sums = (rows - highest[..., None]).exp_().sum(-1)  # the confidence is 1 / sums
        nll += ((sums.log() + highest - true) * valid).sum()
        bins = (NARROW_BINS / sums).int().clamp_(max=NARROW_BINS - 1)
        count_values(bins.mul_(2).add_(predicted == truth).masked_fill_(~valid, 2 * NARROW_BINS).flatten(), counts)
        labels[images, start:stop] = predicted
    return PixelScores(labels, counts[:-1].view(NARROW_BINS, 2), nll)


def expected_calibration_error(counts: Tensor) -> Tensor:
    """Compute the expected calibration error with bins [l, u) of equal width, the last one with 1.

    It is the mean over all pixels of the difference, in the bin of the pixel, between the share of right labels and the
    mean confidence.

    Args:
        counts: (NARROW_BINS, 2), see `PixelScores`.

    Returns:
        Scalar float64 in 0..1 on the CPU, nan if no pixel was counted.
    """
    wrong, right = counts.cpu().double().unbind(1)
    middles = torch.arange(NARROW_BINS) + 0.5
    gaps = (right - (wrong + right) * middles / NARROW_BINS).view(BINS, -1).sum(1)  # pixels times difference
    return gaps.abs().sum() / (wrong + right).sum()


class CalibrationMetrics(Metric):
    """Expected calibration error and mean negative log-likelihood of the pixels of a split.

    Attributes:
        counts: (NARROW_BINS, 2) int64, see `PixelScores`.

    Example:
        >>> metrics = CalibrationMetrics()
        >>> logits = torch.tensor([0.2, 0.8]).log().view(1, 2, 1, 1)  # class 1 with a confidence of 0.8
        >>> scores = score_pixels(logits, torch.ones(1, 1, 1, dtype=torch.uint8))
        >>> metrics.update(scores.counts, scores.nll)
        >>> {name: round(float(value), 3) for name, value in metrics.compute().items()}
        {'ece': 0.2, 'nll': 0.223}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    counts: Tensor
    nll: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(NARROW_BINS, 2, dtype=torch.int64), dist_reduce_fx="sum")
        # kept one by one: a sum in float32 would not be exact, and not every device has float64
        self.add_state("nll", [], dist_reduce_fx="cat")

    def update(self, counts: Tensor, nll: Tensor) -> None:
        """Add the counts and the negative log-likelihood of `PixelScores`; zeros for no pixels."""
        assert isinstance(self.nll, list)  # a tensor only within compute(), with those of all ranks
        self.counts += counts
        self.nll.append(nll.float().view(1))

    def compute(self) -> dict[str, Tensor]:
        """Return `ece` and `nll`, float64 scalars on the CPU, nan if no pixel was scored."""
        nll = dim_zero_cat(self.nll) if len(self.nll) else torch.empty(0)
        mean = nll.cpu().double().sum() / self.counts.cpu().sum()
        return {"ece": expected_calibration_error(self.counts), "nll": mean}


@torch.no_grad()
def sample_logits(
    logits: LazyLogits, target: Tensor, count: int, generator: torch.Generator, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Draw labeled pixels.

    Args:
        logits: Lazy logits.
        target: (n, H, W) integers.
        count: Number of pixels, or all labeled ones if there are fewer.
        generator: Of the random numbers, on the CPU.
        ignore_index: Target value of pixels that are not drawn.

    Returns:
        Logits (P, K) float32 and labels (P,) int64, on the CPU.
    """
    labeled = (target.cpu() != ignore_index).flatten().nonzero()[:, 0]
    chosen = torch.zeros(target.numel(), dtype=torch.bool)
    chosen[labeled[torch.randperm(len(labeled), generator=generator)[:count]]] = True
    drawn, size = chosen.view(target.shape).to(target.device), label_size(target)
    rows, labels = [], []
    for images, start, stop in logits.chunks(size):
        here = drawn[images, start:stop]
        rows.append(logits.upsampled(size, (images, start, stop))[here].cpu())
        labels.append(target[images, start:stop][here].long().cpu())
    return torch.cat(rows), torch.cat(labels)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the temperature with the smallest cross-entropy, by LBFGS on its logarithm.

    Args:
        logits: (P, K) float32.
        labels: (P,) int64.

    Raises:
        UserError: There is none between 0.01 and 100; predictions that are no better than chance have none.
    """
    log_temperature = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits * (-log_temperature).exp(), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch has no types for it
    temperature = math.exp(log_temperature.item())
    if not 0.01 <= temperature <= 100:
        raise UserError(
            f"the best temperature of {len(labels)} pixels is {temperature:.3g}; expected 0.01 to 100. The predictions "
            "may be no better than chance: check the masks, or train longer"
        )
    return temperature
