"""Segmentation scores from one confusion matrix over the whole split, as in the official evaluators of benchmarks.

IoU of class c is TP / (TP + FP + FN) of pixel counts over all images and all ranks; mIoU is the mean over
classes. Official evaluators differ in two rules only. Both are options here; see `labels.evaluator_rules`.

Shapes: K classes; a confusion matrix is (K, K + 1) int64, rows ground truth, columns prediction, the last
column void.
"""

from typing import get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from early_fusion_seg.errors import UserError
from early_fusion_seg.labels.evaluator_rules import AbsentClassRule, VoidPredictionRule

CHUNK = 2**18
"""Pixels counted at a time; the buffers for them fit into the processor's cache."""


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count pixels by ground truth and prediction; pixels with ignored ground truth are left out.

    Args:
        prediction: Integers 0..K-1 or `ignore_index` (void), any shape.
        target: Integers 0..K-1 or `ignore_index`, of the same shape.
        num_classes: K.
        ignore_index: Label of ignored and void pixels, outside of 0..K-1.

    Returns:
        (K + 1, K + 2) int64: the (K, K + 1) matrix, and a last row and column with the counts of invalid labels.
    """
    k = num_classes
    # many pixels: pairs of bytes are counted first and mapped to classes after, which is 8 times as fast
    as_bytes = prediction.dtype == target.dtype == torch.uint8 and target.is_cpu and target.numel() > 256**2
    side = 256 if as_bytes else k + 2
    counts = torch.zeros(side**2, dtype=torch.int64, device=target.device)
    # allocated once, because deterministic algorithms fill every new tensor
    buffers = torch.zeros(2, min(CHUNK, target.numel()) if as_bytes else 0, dtype=torch.int32, device=target.device)
    for truth, predicted in zip(*(torch.split(x.flatten(), CHUNK) for x in (target, prediction)), strict=True):
        if as_bytes:
            pairs, low = buffers[:, : len(truth)]
            pairs.copy_(truth).mul_(side).add_(low.copy_(predicted))
        else:
            pairs = _bins(truth, k, ignore_index).mul_(side).add_(_bins(predicted, k, ignore_index))
        counts += torch.bincount(pairs, minlength=side**2)
    counts = counts.view(side, side)
    if as_bytes:
        bins = _bins(torch.arange(side, device=target.device), k, ignore_index)
        counts = torch.zeros(k + 2, side, dtype=torch.int64).index_add_(0, bins, counts)
        counts = torch.zeros(k + 2, k + 2, dtype=torch.int64).index_add_(1, bins, counts)
    return torch.cat([counts[:k], counts[k + 1 :]])  # row k has the ignored pixels


def _bins(labels: Tensor, k: int, ignore_index: int) -> Tensor:
    """Map labels (any shape) to 0..K-1, `ignore_index` to K and anything else to K + 1."""
    labels = labels.long()
    other = torch.where(labels == ignore_index, k, k + 1)
    return torch.where((labels >= 0) & (labels < k), labels, other)


def class_iou(confusion: Tensor, pred_void: VoidPredictionRule = "fn") -> Tensor:
    """Compute the IoU of each class.

    Args:
        confusion: (K, K + 1) counts.
        pred_void: Whether void predictions are false negatives; see `VoidPredictionRule`.

    Returns:
        (K,) float64 in 0..1, nan if a class is neither in the ground truth nor predicted.
    """
    square = confusion[:, :-1].double()
    hit = square.diagonal()
    truth = (confusion if pred_void == "fn" else confusion[:, :-1]).sum(1).double()
    return hit / (truth + square.sum(0) - hit)


def mean_iou(iou: Tensor, in_truth: Tensor, absent: AbsentClassRule = "nan-skip") -> Tensor:
    """Compute the mean of the class IoUs under the rule of a benchmark.

    Args:
        iou: (K,) from `class_iou`.
        in_truth: (K,) bool, whether the class has pixels in the ground truth.
        absent: See `AbsentClassRule`.

    Returns:
        Scalar float64, nan if no class counts.
    """
    if absent == "gt-only":
        return iou[in_truth].mean()
    if absent == "zero":
        return iou.nan_to_num(0.0).mean()
    return iou.mean() if absent == "strict-nan" else iou.nanmean()


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
        UserError: An option does not exist. In `update` (on the CPU) or `compute`: labels are invalid, or pixels are
            predicted as void and `pred_void` is "error".

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

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch to the confusion matrix.

        Args:
            prediction: (n, h, w) integer labels.
            target: (n, h, w) integer labels.

        Raises:
            UserError: Shapes differ, or (on the CPU) labels are invalid.
        """
        if prediction.shape != target.shape or target.ndim != 3:
            raise UserError(
                f"prediction is {tuple(prediction.shape)} and target {tuple(target.shape)}; expected both (n, h, w)"
            )
        k = self.num_classes
        counts = confusion_matrix(prediction, target, k, self.ignore_index)
        self.confusion += counts[:k, : k + 1]
        self.images += len(target)
        self.invalid += counts[k].sum() + counts[:k, k + 1].sum()
        if target.device.type == "cpu":  # on other devices the check would synchronize, so compute() does it
            self._check_labels()

    def compute(self) -> dict[str, Tensor]:
        """Compute the scores, fractions in 0..1.

        Returns:
            float64 scalars `miou`, `pixel_accuracy`, `mean_accuracy` (over the classes in the ground truth) and
            `fw_iou` (mean IoU weighted by class frequency in the ground truth), nan if no pixel was counted;
            `per_class` (K,) IoUs, nan for absent classes.

        Raises:
            UserError: See the class.
        """
        self._check_labels()
        counted = self.confusion if self.pred_void == "fn" else self.confusion[:, :-1]
        truth = counted.sum(1).double()  # (K,)
        hit = self.confusion.diagonal().double()
        iou = class_iou(self.confusion, self.pred_void)
        in_truth = truth > 0
        return {
            "miou": mean_iou(iou, in_truth, self.absent),
            "pixel_accuracy": hit.sum() / truth.sum(),
            "mean_accuracy": (hit / truth)[in_truth].mean(),
            "fw_iou": (iou.nan_to_num(0.0) * truth).sum() / truth.sum(),
            "per_class": iou,
        }

    def _check_labels(self) -> None:
        if self.invalid:
            raise UserError(
                f"{int(self.invalid)} pixels have a label that is neither in 0..{self.num_classes - 1} nor "
                f"{self.ignore_index}; map raw ids to train ids before scoring"
            )
        if self.pred_void == "error" and self.confusion[:, -1].any():
            raise UserError(
                "some labeled pixels are predicted as void, which this benchmark does not allow; "
                "predict a class for every pixel"
            )


class MeanLoss(Metric):
    """Mean of a loss over the labeled pixels of a split.

    For cross-entropy, the mean does not depend on how the split is divided into batches and ranks. With class weights
    it is the weighted mean, equal to `torch.nn.functional.cross_entropy` of the whole split at once.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, weight: Tensor) -> None:
        """Add a batch: its mean loss and its weight from `SegmentationLoss.weight`, both scalars."""
        self.total += loss.double() * weight
        self.weight += weight

    def compute(self) -> Tensor:
        """Return the mean, a float64 scalar, nan if no pixel is labeled."""
        return self.total / self.weight
