"""HeadEMA: an exponential moving average (EMA) of the head's weights, used for validation and checkpoints.

Lightning's `EMAWeightAveraging` is not used, for two reasons. It averages a copy of the whole module, the frozen
encoder included. And it cannot load checkpoints that leave out the encoder's tensors.
"""

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from early_fusion_seg.errors import UserError

PREFIX = "network.head."
KEY = "head_in_training"
"""Checkpoint entry of the training weights: the head's weights without averaging, by parameter name."""


class HeadEMA(Callback):
    """Average the weights of `network.head` over the optimizer steps; the batch norm statistics are not averaged.

    The model has the averaged weights during validation and after training. `state_dict` of a checkpoint holds them
    too, so loading a checkpoint gives the averaged model. The checkpoint stores the training weights (those without
    averaging) separately, and training resumes from them.

    Args:
        decay: Weight of the old average in each update, between 0 and 1. After t steps it is at most
            (1 + t) / (10 + t), so the initial weights are soon forgotten.

    Raises:
        UserError: The decay is out of range, or (when training starts) the encoder is trainable.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise UserError(f"the EMA decay is {decay}; expected a number between 0 and 1, such as 0.999")
        self.decay = decay
        self.average: dict[str, Tensor] = {}  # float32, by parameter name of the head
        self.trained: dict[str, Tensor] | None = None  # training weights while the model has the averaged ones
        self.step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the weights of an earlier training; those of a checkpoint to resume from are loaded after this."""
        if stage == "fit":
            self.average, self.trained = {}, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Initialize the average with the present weights, or with that of the checkpoint."""
        if not cast(Any, pl_module).network.encoder.frozen:
            raise UserError(
                "the encoder is fine-tuned, but the moving average covers the head alone; "
                "leave out ema_decay (HeadEMA) or freeze the encoder"
            )
        weights = _weights(pl_module)
        if self.average:
            self.average = {name: value.to(weights[name].device, copy=True) for name, value in self.average.items()}
            self._restore_training_weights(pl_module)
        else:
            self.average = {name: weight.detach().float().clone() for name, weight in weights.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the number of steps done, which Lightning restores only after `on_fit_start`."""
        self.step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Update the average after an optimizer step."""
        if trainer.global_step == self.step:  # no step yet: gradients accumulate
            return
        self.step = trainer.global_step
        rate = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
        weights = _weights(pl_module)
        torch._foreach_lerp_([self.average[name] for name in weights], [w.float() for w in weights.values()], rate)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model the averaged weights, within `fit`."""
        if trainer.state.fn == "fit":
            self._apply_average(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model its training weights back."""
        if trainer.state.fn == "fit":
            self._restore_training_weights(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the averaged weights in the model."""
        self._apply_average(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the averaged weights in `state_dict`, and the training weights under `KEY`."""
        current = {name: weight.detach() for name, weight in _weights(pl_module).items()}
        checkpoint[KEY] = current if self.trained is None else self.trained
        checkpoint["state_dict"] |= {PREFIX + name: value for name, value in self.average.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read both sets of weights; if the checkpoint has no average, a new one starts with its weights."""
        if KEY in checkpoint:
            self.trained = checkpoint[KEY]
            self.average = {name: checkpoint["state_dict"][PREFIX + name].float() for name in checkpoint[KEY]}

    @torch.no_grad()
    def _apply_average(self, module: LightningModule) -> None:
        weights = _weights(module)
        self.trained = {name: weight.detach().clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.copy_(self.average[name])

    @torch.no_grad()
    def _restore_training_weights(self, module: LightningModule) -> None:
        if self.trained is not None:
            for name, weight in _weights(module).items():
                weight.copy_(self.trained[name])
            self.trained = None


def _weights(module: LightningModule) -> dict[str, nn.Parameter]:
    """Return the parameters of the head by name."""
    return dict(cast(Any, module).network.head.named_parameters())
