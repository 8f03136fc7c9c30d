"""The IoU of each class in the loggers, by name."""

import re
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ClassIoU(Callback):
    """Log `val/IoU/NAME` and `test/IoU/NAME`; a class that is neither in the truth nor predicted is left out."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores of the validation split."""
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores of the test split."""
        self._log(pl_module, "test")

    def _log(self, module: Any, split: str) -> None:
        iou: list[float] = module.metrics[split].compute()["per_class"].tolist()  # summed over ranks, so equal on all
        names = names_for_loggers(module.class_names)
        values = {f"{split}/IoU/{name}": value for name, value in zip(names, iou, strict=True) if value == value}
        module.log_dict(values, sync_dist=True, reduce_fx="max")  # of equal values the maximum is exact


def names_for_loggers(class_names: Sequence[str]) -> list[str]:
    """Replace what some logger reads otherwise than as a letter: TensorBoard spaces, W&B dots, both slashes.

    Args:
        class_names: K names.

    Returns:
        K different names of letters, digits, single `_` and `-`; those that would be equal get `__` and the train id.

    Example:
        >>> names_for_loggers(["Road", "Traffic Sign (Back)", "a.b", "a/b"])
        ['Road', 'Traffic_Sign_Back', 'a_b__2', 'a_b__3']
    """
    plain = [re.sub(r"(?:[^\w-]|_)+", "_", name).strip("_") for name in class_names]
    return [f"{name}__{i}" if plain.count(name) > 1 or not name else name for i, name in enumerate(plain)]
