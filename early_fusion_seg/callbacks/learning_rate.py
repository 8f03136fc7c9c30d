"""LearningRate: log the learning rate."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class LearningRate(Callback):
    """Log `train/lr`, the learning rate of each step. Lightning's monitor logs one for each parameter group."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the learning rate, which is the same in all parameter groups."""
        pl_module.log("train/lr", float(trainer.optimizers[0].param_groups[0]["lr"]))
