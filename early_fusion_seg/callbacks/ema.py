"""An exponential moving average of the head's weights, which is what is validated and stored.

Lightning's `EMAWeightAveraging` averages every parameter and buffer of a copy of the whole module: the frozen encoder
too, and checkpoints without the encoder's tensors break it.
"""

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from early_fusion_seg.errors import UserError

PREFIX = "network.head."
KEY = "head_in_training"
"""Entry of checkpoints: the head's weights as they were trained, by parameter name."""


class HeadEMA(Callback):
    """Average the weights of `network.head` over the steps; batch norms' statistics stay those of the training.

    The average is in place while validating, after the training, and in `state_dict` of checkpoints, so that whoever
    loads one gets it. The weights in training are beside it, and a run goes on from those.

    Args:
        decay: Share of the average that each step keeps, in 0..1; after t steps at most (1 + t) / (10 + t), so that the
            start is forgotten.

    Raises:
        UserError: Another decay, or (when training starts) an encoder that is trained along.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise UserError(f"the decay of the average is {decay}; expected a number between 0 and 1, such as 0.999")
        self.decay = decay
        self.average: dict[str, Tensor] = {}  # float32, by the head's parameter names
        self.trained: dict[str, Tensor] | None = None  # the weights in training while the average is in their place
        self.step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with the weights as they are, or go on from a checkpoint."""
        if not cast(Any, pl_module).network.encoder.frozen:
            raise UserError("the average is of the head's weights; leave it out with freeze_encoder=False")
        weights = _weights(pl_module)
        if self.average:
            self.average = {name: value.to(weights[name].device, copy=True) for name, value in self.average.items()}
            self._take_back(pl_module)
        else:
            self.average = {name: weight.detach().float().clone() for name, weight in weights.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See how many steps are done, which Lightning restores after `on_fit_start`."""
        self.step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add the weights after a step."""
        if trainer.global_step == self.step:  # gradients accumulate
            return
        self.step = trainer.global_step
        share = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
        weights = _weights(pl_module)
        torch._foreach_lerp_([self.average[name] for name in weights], [w.float() for w in weights.values()], share)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in place, within `fit`."""
        if trainer.state.fn == "fit":
            self._put_average(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights in training back."""
        if trainer.state.fn == "fit":
            self._take_back(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model."""
        self._put_average(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the average as the weights, and the weights in training beside."""
        live = {name: weight.detach() for name, weight in _weights(pl_module).items()}
        checkpoint[KEY] = live if self.trained is None else self.trained
        checkpoint["state_dict"] |= {PREFIX + name: value for name, value in self.average.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep both until the training starts; a run that had no average begins one."""
        if KEY in checkpoint:
            self.trained = checkpoint[KEY]
            self.average = {name: checkpoint["state_dict"][PREFIX + name].float() for name in checkpoint[KEY]}

    @torch.no_grad()
    def _put_average(self, module: LightningModule) -> None:
        weights = _weights(module)
        self.trained = {name: weight.detach().clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.copy_(self.average[name])

    @torch.no_grad()
    def _take_back(self, module: LightningModule) -> None:
        if self.trained is not None:
            for name, weight in _weights(module).items():
                weight.copy_(self.trained[name])
            self.trained = None


def _weights(module: LightningModule) -> dict[str, nn.Parameter]:
    """Return the head's parameters by their names."""
    return dict(cast(Any, module).network.head.named_parameters())
