"""ValidateAtEnd: validate after the last training step."""

from typing import Any

from lightning.pytorch import Callback, Trainer


class ValidateAtEnd(Callback):
    """Validate after the last training step, even if the next validation is not due yet."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Request a validation if this was the last batch."""
        epochs = trainer.max_epochs or -1  # -1: no limit
        last_batch = trainer.is_last_batch and trainer.current_epoch + 1 == epochs
        if (last_batch or trainer.global_step == trainer.max_steps) and trainer.check_val_every_n_epoch is not None:
            trainer.check_val_every_n_epoch = 1
            trainer.should_stop = True  # makes Lightning validate in the middle of an epoch
