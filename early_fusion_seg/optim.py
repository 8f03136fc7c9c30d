"""Optimizers and learning rate schedules."""

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


def parameter_groups(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into two groups: weights with weight decay, and norms and biases without.

    Args:
        parameters: Parameters; frozen ones are left out.
        lr: Learning rate.
        weight_decay: Weight decay of the weights, at least 0.
    """
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]


def make_optimizer(name: OptimizerName, groups: list[dict[str, Any]], fused: bool) -> Optimizer:
    """Build AdamW, or SGD with momentum 0.9.

    Args:
        name: `"adamw"` or `"sgd"`.
        groups: Of `parameter_groups`.
        fused: Use the fused implementation. Lightning cannot clip gradients of fused optimizers in mixed precision.
    """
    return AdamW(groups, fused=fused) if name == "adamw" else SGD(groups, lr=groups[0]["lr"], momentum=0.9, fused=fused)


def make_schedule(optimizer: Optimizer, steps: float, warmup_steps: int, schedule: Schedule) -> LambdaLR:
    """Build the learning rate schedule of a run; see `lr_factor`.

    Raises:
        UserError: The number of steps is infinite.
    """
    if not math.isfinite(steps):
        raise UserError(
            "training has no last step, but the learning rate schedule needs one; "
            "set the trainer's max_epochs or max_steps"
        )
    factor = partial(lr_factor, steps=int(steps), warmup_steps=warmup_steps, schedule=schedule)
    return LambdaLR(optimizer, factor)


def lr_factor(step: int, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """Compute the factor of the learning rate at a step.

    Args:
        step: Optimizer steps done so far.
        steps: Optimizer steps of the whole run.
        warmup_steps: Steps of linear warmup, a factor on top of the schedule; at most a tenth of the run is used.
        schedule: `"poly"` (power 0.9, as in DeepLab, arXiv 1606.00915) or `"cosine"`.

    Returns:
        The factor, in 0..1.

    Example:
        >>> [round(lr_factor(s, 20, 2, "poly"), 2) for s in (0, 1, 10, 20)]
        [0.5, 0.95, 0.54, 0.0]
    """
    remaining = max(0.0, 1 - step / max(1, steps))
    decay = remaining**0.9 if schedule == "poly" else 0.5 * (1 - math.cos(math.pi * remaining))
    return decay * min(1.0, (step + 1) / max(1, min(warmup_steps, steps // 10)))
