"""PredictionsOfHeads: write the predictions of each head of a MultiHead to a folder of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from early_fusion_seg.callbacks.predictions import PredictionWriter


class PredictionsOfHeads(Callback):
    """Call a `PredictionWriter` for each head of a `MultiHead`, with the model and the outputs of that head.

    Args:
        folder: Folder of the whole run.
        writers: One for each head.
    """

    def __init__(self, folder: Path, writers: Sequence[PredictionWriter]) -> None:
        self.folder, self.writers = folder, writers

    @property
    def unreadable(self) -> list[str]:
        """Error messages of all writers, each once."""
        return list(dict.fromkeys(message for writer in self.writers for message in writer.unreadable))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set up all writers."""
        for writer, model in self._pairs(pl_module):
            writer.setup(trainer, model, stage)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start all writers."""
        for writer, model in self._pairs(pl_module):
            writer.on_predict_start(trainer, model)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Start a batch of all writers."""
        for writer, model in self._pairs(pl_module):
            writer.on_predict_batch_start(trainer, model, *batch)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *batch: Any) -> None:
        """Write the predictions of a batch."""
        for i, (writer, model) in enumerate(self._pairs(pl_module)):
            writer.on_predict_batch_end(trainer, model, None if outputs is None else outputs[i], *batch)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End all writers."""
        for writer, model in self._pairs(pl_module):
            writer.on_predict_end(trainer, model)

    def _pairs(self, module: LightningModule) -> list[tuple[PredictionWriter, LightningModule]]:
        return list(zip(self.writers, cast(Any, module).models, strict=True))
