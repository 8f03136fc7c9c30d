"""NarrowProgressBar: Lightning's rich progress bar on one line of 80 columns."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class NarrowProgressBar(RichProgressBar):
    """Show rich's progress bar with a short bar, the loss and the mIoU, so that the line fits into 80 columns."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return loss and mIoU; not those of the sanity check, which scores a few images only."""
        shown: dict[str, Any] = {} if trainer.sanity_checking else super().get_metrics(trainer, pl_module)
        return {name: value for name, value in shown.items() if name in ("train/loss", "val/mIoU", "test/mIoU")}

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Return Lightning's columns with a bar of 12 characters."""
        columns: list[Any] = super().configure_columns(trainer)
        columns[1].bar_width = 12
        return columns
