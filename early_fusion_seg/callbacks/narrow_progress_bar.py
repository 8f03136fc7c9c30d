"""NarrowProgressBar: Lightning's rich progress bar on one line of 80 columns."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar


class NarrowProgressBar(RichProgressBar):
    """Show the rich progress bar on one line of 80 columns."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Shorten the bar itself."""
        columns: list[Any] = super().configure_columns(trainer)
        columns[1].bar_width = 12
        return columns
