"""NarrowProgressBar: Lightning's rich progress bar within 80 columns."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar


class NarrowProgressBar(RichProgressBar):
    """Show rich's progress bar with a short bar, so that the line fits into 80 columns."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Return Lightning's columns with a bar of 12 characters."""
        columns: list[Any] = super().configure_columns(trainer)
        columns[1].bar_width = 12
        return columns
