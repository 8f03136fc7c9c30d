"""Segmentation scores from one confusion matrix over the whole split, as in the official evaluators of benchmarks.

IoU of class c is TP / (TP + FP + FN) of pixel counts over all images and all ranks; mIoU is the mean over
classes. Official evaluators differ in two rules only. Both are options here; see `labels.evaluator_rules`.

Pixels are counted on the device of the labels, in int64. Scores are computed on the CPU, in float64, which some devices
(Apple's MPS) do not have.

Shapes: K classes; a confusion matrix is (K, K + 1) int64, rows ground truth, columns prediction, the last
column void.
"""

import functools
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.data import dim_zero_cat

from early_fusion_seg.errors import UserError
from early_fusion_seg.labels.evaluator_rules import AbsentClassRule, VoidPredictionRule

CHUNK = 2**18
"""Pixels that a CPU counts at a time; the buffers for them fit into its cache."""


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count pixels by ground truth and prediction; pixels with ignored ground truth are left out.

    Args:
        prediction: Integers 0..K-1 or `ignore_index` (void), any shape. With two classes also bool: True is class 1.
        target: Integers 0..K-1 or `ignore_index`, of the same shape; or bool.
        num_classes: K.
        ignore_index: Label of ignored and void pixels, outside of 0..K-1.

    Returns:
        (K + 2, K + 2) int64: the (K, K + 1) matrix, then a row of the ignored pixels, and a last row and column of the
        invalid labels.

    Raises:
        UserError: The labels are fractions or complex numbers, or bool with another number of classes than two.
    """
    k = num_classes
    for name, labels in (("prediction", prediction), ("target", target)):
        _check_integers(name, labels, k)
    # many pixels: pairs of bytes are counted first and mapped to classes after, which is 8 times as fast
    as_bytes = prediction.dtype == target.dtype == torch.uint8 and target.is_cpu and target.numel() > 256**2
    side = 256 if as_bytes else k + 2
    counts = torch.zeros(side**2, dtype=torch.int64, device=target.device)
    chunk = CHUNK if target.is_cpu else max(1, target.numel())
    # allocated once, because deterministic algorithms fill every new tensor
    buffers = torch.zeros(2, min(chunk, target.numel()) if as_bytes else 0, dtype=torch.int32, device=target.device)
    for truth, predicted in zip(*(torch.split(x.flatten(), chunk) for x in (target, prediction)), strict=True):
        if as_bytes:
            pairs, low = buffers[:, : len(truth)]
            pairs.copy_(truth).mul_(side).add_(low.copy_(predicted))
        else:
            pairs = _bins(truth, k, ignore_index).mul_(side).add_(_bins(predicted, k, ignore_index))
        count_values(pairs, counts)
    counts = counts.view(side, side)
    if as_bytes:
        bins = _bins(torch.arange(side, device=target.device), k, ignore_index)
        counts = torch.zeros(k + 2, side, dtype=torch.int64).index_add_(0, bins, counts)
        counts = torch.zeros(k + 2, k + 2, dtype=torch.int64).index_add_(1, bins, counts)
    return counts


def _check_integers(name: str, labels: Tensor, k: int) -> None:
    """Raise a UserError if labels are fractions, complex numbers, or bool with another number of classes than two."""
    if labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"the {name} holds {labels.dtype}; expected integers, the numbers of classes: take the argmax of logits or "
            "probabilities over the classes, or compare the probability of a single class with a threshold"
        )
    if labels.dtype == torch.bool and k != 2:
        raise UserError(
            f"the {name} holds torch.bool, which is read as class 0 or 1 if there are two classes; there are {k}, so "
            "give integers"
        )


def count_values(values: Tensor, counts: Tensor) -> None:
    """Add the number of occurrences of each value of `values` (n,) to `counts`, in place."""
    if values.is_cpu:
        counts += torch.bincount(values, minlength=len(counts))
    else:  # bincount reads the largest value back, and so waits for the device
        ones = torch.ones((), dtype=torch.int64, device=values.device).expand_as(values)
        counts.scatter_add_(0, values.long(), ones)


def _bins(labels: Tensor, k: int, ignore_index: int) -> Tensor:
    """Map labels (any shape) to 0..K-1, `ignore_index` to K and anything else to K + 1."""
    labels = labels.long()
    other = torch.where(labels == ignore_index, k, k + 1)
    return torch.where((labels >= 0) & (labels < k), labels, other)


def class_iou(confusion: Tensor, absent: AbsentClassRule = "nan-skip", pred_void: VoidPredictionRule = "fn") -> Tensor:
    """Compute the IoU of each class under the rules of a benchmark.

    Args:
        confusion: (K, K + 1) counts.
        absent: How classes count that are absent from the ground truth; see `AbsentClassRule`.
        pred_void: Whether void predictions are false negatives; see `VoidPredictionRule`.

    Returns:
        (K,) float64 in 0..1 on the CPU, nan for a class that does not count in the mean.
    """
    truth, predicted, hit = _class_counts(confusion, pred_void)
    iou = hit / (truth + predicted - hit)  # nan if the class is neither in the ground truth nor predicted
    if absent == "gt-only":
        return iou.where(truth > 0, torch.nan)
    return iou.nan_to_num(0.0) if absent == "zero" and confusion.any() else iou


def mean_iou(iou: Tensor, absent: AbsentClassRule = "nan-skip") -> Tensor:
    """Compute the mean of the class IoUs: of those that are not nan, but under "strict-nan" of all.

    Args:
        iou: (K,) from `class_iou`.
        absent: See `AbsentClassRule`.

    Returns:
        Scalar float64, nan if no class counts.
    """
    return iou.mean() if absent == "strict-nan" else iou.nanmean()


def mean_accuracy(
    confusion: Tensor, absent: AbsentClassRule = "nan-skip", pred_void: VoidPredictionRule = "fn"
) -> Tensor:
    """Compute the mean over the classes in the ground truth of the share of their pixels that are predicted correctly.

    Under the rule "zero" the mean is over all classes, and absent ones count as 0.

    Args:
        confusion: (K, K + 1) counts.
        absent: See `AbsentClassRule`.
        pred_void: See `VoidPredictionRule`.

    Returns:
        Scalar float64, nan if no class is in the ground truth.
    """
    truth, _, hit = _class_counts(confusion, pred_void)
    accuracy = hit / truth
    return accuracy.nan_to_num(0.0).mean() if absent == "zero" and confusion.any() else accuracy.nanmean()


def pixel_accuracy(
    confusion: Tensor, absent: AbsentClassRule = "nan-skip", pred_void: VoidPredictionRule = "fn"
) -> Tensor:
    """Compute the share of the labeled pixels that are predicted correctly.

    Under the rule "drop" void predictions are left out, but not together with "zero": SegNet's script counts them as
    wrong here, although it leaves them out of the IoU.

    Args:
        confusion: (K, K + 1) counts.
        absent: See `AbsentClassRule`.
        pred_void: See `VoidPredictionRule`.

    Returns:
        Scalar float64, nan if no pixel counts.
    """
    truth, _, hit = _class_counts(confusion, "fn" if absent == "zero" else pred_void)
    return hit.sum() / truth.sum()


def _class_counts(confusion: Tensor, pred_void: VoidPredictionRule) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pixels of each class in the ground truth, in the prediction and in both: (K,) float64 on the CPU."""
    confusion = confusion.cpu().double()
    square = confusion[:, :-1]
    truth = square if pred_void == "drop" else confusion
    return truth.sum(1), square.sum(0), square.diagonal()


class SegmentationMetrics(Metric):
    """Confusion matrix of a split, and the scores computed from it.

    Args:
        num_classes: K.
        ignore_index: Label of pixels without ground truth, outside of 0..K-1; they are not scored.
        absent: Rule for absent classes; see `AbsentClassRule`.
        pred_void: Rule for void predictions; see `VoidPredictionRule`. Only predictions of other software have any.

    Attributes:
        confusion: (K, K + 1) int64.
        images: Number of images seen, int64.

    Raises:
        UserError: An option does not exist. In `update`: the labels are not integers. In `update` (on the CPU) or
            `compute`: labels are invalid, or pixels are predicted as void and `pred_void` is "error".

    Example:
        >>> metrics = SegmentationMetrics(num_classes=2)
        >>> metrics.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]))
        >>> {name: float(value) for name, value in metrics.compute().items() if name != "per_class"}
        {'miou': 0.25, 'pixel_accuracy': 0.5, 'mean_accuracy': 0.5, 'fw_iou': 0.5}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    confusion: Tensor
    images: Tensor
    invalid: Tensor
    refused: Tensor

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        absent: AbsentClassRule = "nan-skip",
        pred_void: VoidPredictionRule = "fn",
    ) -> None:
        super().__init__()
        if absent not in get_args(AbsentClassRule) or pred_void not in get_args(VoidPredictionRule):
            raise UserError(
                f"absent={absent!r}, pred_void={pred_void!r}; "
                f"expected one of {get_args(AbsentClassRule)} and one of {get_args(VoidPredictionRule)}"
            )
        if 0 <= ignore_index < num_classes:
            raise UserError(
                f"ignore_index={ignore_index} is one of the {num_classes} classes; use another value, such as 255"
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.absent: AbsentClassRule = absent
        self.pred_void: VoidPredictionRule = pred_void
        k = num_classes
        self.add_state("confusion", torch.zeros(k, k + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("invalid", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("refused", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch to the confusion matrix.

        Args:
            prediction: (n, h, w) integer labels; with two classes also bool.
            target: (n, h, w) integer labels; with two classes also bool.

        Raises:
            UserError: Shapes differ, labels are not integers, or (on the CPU) labels are invalid.
        """
        if prediction.shape != target.shape or target.ndim != 3:
            raise UserError(
                f"prediction is {tuple(prediction.shape)} and target {tuple(target.shape)}; expected both (n, h, w)"
            )
        k = self.num_classes
        counts = confusion_matrix(prediction, target, k, self.ignore_index)
        self.confusion += counts[:k, : k + 1]
        self.images += len(target)
        self.invalid += counts[k + 1].sum() + counts[:k, k + 1].sum()
        if self.pred_void == "error":
            self.refused += counts[:, k:].sum()
        if target.device.type == "cpu":  # on other devices the check would synchronize, so compute() does it
            self._check_labels()

    def compute(self) -> dict[str, Tensor]:
        """Compute the scores, fractions in 0..1.

        Returns:
            float64 scalars `miou`, `pixel_accuracy`, `mean_accuracy` and `fw_iou` (mean IoU weighted by class frequency
            in the ground truth), nan if no pixel was counted; `per_class` (K,) IoUs, nan for classes that do not count
            in `miou`. All are on the CPU.

        Raises:
            UserError: See the class.
        """
        self._check_labels()
        if not self.confusion.any():
            rank_zero_warn(
                f"the {int(self.images)} images scored have no labeled pixel, so all scores are nan; check the masks: "
                f"a pixel with the label {self.ignore_index} is ignored"
            )
        rules = self.absent, self.pred_void
        iou = class_iou(self.confusion, *rules)
        truth = _class_counts(self.confusion, self.pred_void)[0]
        return {
            "miou": mean_iou(iou, self.absent),
            "pixel_accuracy": pixel_accuracy(self.confusion, *rules),
            "mean_accuracy": mean_accuracy(self.confusion, *rules),
            "fw_iou": (iou.nan_to_num(0.0) * truth).sum() / truth.sum(),
            "per_class": iou,
        }

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Undo for `per_class` what torchmetrics does with the results of `compute`: (1,) becomes a scalar."""
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def with_class_axis() -> dict[str, Tensor]:
            scores: dict[str, Tensor] = wrapped()
            return scores | {"per_class": scores["per_class"].reshape(self.num_classes)}

        return with_class_axis

    def _check_labels(self) -> None:
        if self.invalid:
            raise UserError(
                f"{int(self.invalid)} pixels have a label that is neither in 0..{self.num_classes - 1} nor "
                f"{self.ignore_index}; map raw ids to train ids before scoring"
            )
        if self.refused:
            raise UserError(
                f"{int(self.refused)} pixels are predicted as void or as no class; this benchmark allows neither, also "
                "where the ground truth is ignored; predict a class for every pixel"
            )


class MeanLoss(Metric):
    """Mean of a loss over the labeled pixels of a split.

    For cross-entropy, the mean does not depend on how the split is divided into batches and ranks. With class weights
    it is the weighted mean, equal to `torch.nn.functional.cross_entropy` of the whole split at once.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    batches: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        # kept one by one: sums in float32 would not be exact, and not every device has float64
        self.add_state("batches", [], dist_reduce_fx="cat")

    def update(self, loss: Tensor, weight: Tensor) -> None:
        """Add a batch: its mean loss and its weight from `SegmentationLoss.weight`, both scalars."""
        assert isinstance(self.batches, list)  # a tensor only within compute(), with the batches of all ranks
        self.batches.append(torch.stack([loss.detach().float(), weight.float()]))

    def compute(self) -> Tensor:
        """Return the mean, a float64 scalar on the CPU, nan if no pixel is labeled."""
        batches = dim_zero_cat(self.batches) if len(self.batches) else torch.empty(0)
        loss, weight = batches.cpu().double().view(-1, 2).unbind(1)
        return (loss * weight).sum() / weight.sum()
