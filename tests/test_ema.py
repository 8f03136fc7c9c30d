import contextlib
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from test_segmenter import SMALL, loader, trainer

from early_fusion_seg.callbacks.ema import HeadEMA
from early_fusion_seg.callbacks.last_checkpoint import LastCheckpoint
from early_fusion_seg.errors import UserError
from early_fusion_seg.segmenter import ReverseHRNetSeg

EPOCHS = 3


class Watch(Callback):
    """The head's weights after each step, and those that are validated."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def on_fit_start(self, trainer: Trainer, module: ReverseHRNetSeg) -> None:
        if not trainer.global_step:
            self.steps.append(head(module))

    def on_train_batch_end(self, trainer: Trainer, module: ReverseHRNetSeg, *_: object) -> None:
        if trainer.global_step == len(self.steps):
            self.steps.append(head(module))

    def on_validation_epoch_end(self, trainer: Trainer, module: ReverseHRNetSeg) -> None:
        if not trainer.sanity_checking:
            self.validated.append(head(module))


def head(module: ReverseHRNetSeg) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.network.head.named_parameters()}


def run(folder: Path, epochs: int = EPOCHS, checkpoint: Path | None = None, **options: object) -> tuple:
    torch.manual_seed(0)
    model, watch = ReverseHRNetSeg(**(SMALL | {"warmup_steps": 1, "lr": 1e-2})), Watch()
    callbacks = [HeadEMA(0.5), watch, LastCheckpoint(folder)]
    engine = trainer(folder, max_epochs=EPOCHS, callbacks=callbacks, enable_checkpointing=True, **options)
    if epochs < EPOCHS:
        model.on_train_epoch_start = lambda: engine.current_epoch < epochs or _stop()
    with contextlib.suppress(InterruptedError):  # of _stop
        engine.fit(model, loader(), loader(2, 1), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return model, watch


def _stop() -> None:
    raise InterruptedError


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_validated_kept_and_stored_is_the_average_of_the_steps(tmp_path, accumulate):
    model, watch = run(tmp_path, accumulate_grad_batches=accumulate)
    steps = 2 * EPOCHS // accumulate
    assert len(watch.steps) == steps + 1
    average = watch.steps[0]
    for t, weights in enumerate(watch.steps[1:], start=1):
        kept = min(0.5, (1 + t) / (10 + t))
        average = {name: kept * average[name] + (1 - kept) * weights[name] for name in weights}
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    loaded = ReverseHRNetSeg.load_from_checkpoint(tmp_path / "last.ckpt")
    for name, value in average.items():
        for other in (watch.validated[-1][name], head(model)[name], head(loaded)[name]):
            torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-7)
        assert torch.equal(stored["head_in_training"][name], watch.steps[-1][name])
    assert any(not torch.allclose(average[name], watch.steps[-1][name], atol=1e-4) for name in average)


def test_the_encoder_is_left_alone_and_not_in_the_average(tmp_path):
    model, _ = run(tmp_path)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["encoder"]["fingerprint"] == ReverseHRNetSeg(**SMALL).network.encoder.fingerprint()
    assert model.network.encoder.state_hash() == ReverseHRNetSeg(**SMALL).network.encoder.state_hash()
    assert set(stored["head_in_training"]) == set(head(model))
    assert all(key.startswith("network.head.") for key in stored["state_dict"])


def test_a_run_goes_on_with_weights_and_average(tmp_path):
    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "half", epochs=1)
    again, _ = run(tmp_path / "again", checkpoint=tmp_path / "half" / "last.ckpt")
    for name, value in head(whole).items():
        assert torch.equal(value, head(again)[name]), name
    a, b = (torch.load(tmp_path / n / "last.ckpt", weights_only=True)["head_in_training"] for n in ("whole", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(UserError, match="expected a number between 0 and 1"):
        HeadEMA(decay)


def test_an_encoder_that_is_trained_along_is_refused(tmp_path):
    model = ReverseHRNetSeg(**(SMALL | {"freeze_encoder": False}))
    with pytest.raises(UserError, match="leave it out with freeze_encoder=False"):
        trainer(tmp_path, callbacks=[HeadEMA()]).fit(model, loader(), loader(2, 1))
