"""ClassIoU: log the IoU of each class."""

import locale
import re
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ClassIoU(Callback):
    """Log `val/IoU/NAME` and `test/IoU/NAME`, except for classes that are neither in the ground truth nor predicted."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the IoUs of the validation split."""
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the IoUs of the test split."""
        self._log(pl_module, "test")

    def _log(self, module: Any, split: str) -> None:
        iou: list[float] = module.metrics[split].compute()["per_class"].tolist()  # the sum over ranks, so equal on all
        names = names_for_loggers(module.class_names)
        values = {f"{split}/IoU/{name}": value for name, value in zip(names, iou, strict=True) if value == value}
        module.log_dict(values, sync_dist=True, reduce_fx="max")  # the maximum of equal values is exact


def names_for_loggers(class_names: Sequence[str]) -> list[str]:
    """Replace characters that a logger treats specially: spaces in TensorBoard, dots in W&B, slashes in both.

    Args:
        class_names: K names.

    Returns:
        K different names of letters, digits, single `_` and `-`. If several would be equal, `__` and the train id are
        appended to each. Letters are replaced by their number if the system's encoding, in which Lightning writes
        metrics.csv, does not have them.

    Example:
        >>> names_for_loggers(["Road", "Traffic Sign (Back)", "a.b", "a/b"])
        ['Road', 'Traffic_Sign_Back', 'a_b__2', 'a_b__3']
    """
    encoding = locale.getpreferredencoding(False)
    encodable = [name.encode(encoding, "backslashreplace").decode(encoding) for name in class_names]
    cleaned = [re.sub(r"(?:[^\w-]|_)+", "_", name).strip("_") for name in encodable]
    return [f"{name}__{i}" if cleaned.count(name) > 1 or not name else name for i, name in enumerate(cleaned)]
