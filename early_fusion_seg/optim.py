"""Which parameters decay, and how the learning rate goes."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from early_fusion_seg.errors import UserError

OptimizerName = Literal["adamw", "sgd"]
Schedule = Literal["poly", "cosine"]


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into two groups: weights, which decay, and norms and biases, which do not."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(
    name: OptimizerName, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, fused: bool
) -> Optimizer:
    """Build AdamW, or SGD with momentum 0.9, of the parameters that are trained; norms and biases do not decay.

    Args:
        name: Which.
        parameters: All, or those that are trained.
        lr: Learning rate.
        weight_decay: Of the weights.
        fused: Update each tensor in one pass. Lightning clips no gradients of fused optimizers in mixed precision.
    """
    groups = parameter_groups(parameters, weight_decay)
    return AdamW(groups, lr=lr, fused=fused) if name == "adamw" else SGD(groups, lr=lr, momentum=0.9, fused=fused)


def make_schedule(optimizer: Optimizer, steps: float, warmup_steps: int, schedule: Schedule) -> LambdaLR:
    """Build the schedule of a run; see `lr_factor`.

    Raises:
        UserError: The run has no end.
    """
    if not math.isfinite(steps):
        raise UserError("the learning-rate schedule needs an end: set the trainer's max_epochs or max_steps")
    factor = partial(lr_factor, steps=int(steps), warmup_steps=warmup_steps, schedule=schedule)
    return LambdaLR(optimizer, factor)


def lr_factor(step: int, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """Compute the factor of the learning rate at a step.

    Args:
        step: From 0.
        steps: Of the whole run.
        warmup_steps: Linear rise over these, multiplied with the schedule.
        schedule: `"poly"` (power 0.9, as in DeepLab, arXiv 1606.00915) or `"cosine"`.

    Returns:
        In 0..1.

    >>> [round(lr_factor(s, 10, 2, "poly"), 2) for s in (0, 1, 5, 10)]
    [0.5, 0.91, 0.54, 0.0]
    """
    rest = max(0.0, 1 - step / max(1, steps))
    down = rest**0.9 if schedule == "poly" else 0.5 * (1 - math.cos(math.pi * rest))
    return down * min(1.0, (step + 1) / max(1, warmup_steps))
