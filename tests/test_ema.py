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


class WeightRecorder(Callback):
    """Records the weights of the head after each step and at each validation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def on_fit_start(self, trainer: Trainer, module: ReverseHRNetSeg) -> None:
        if trainer.global_step == 0:
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
    model, recorder = ReverseHRNetSeg(**(SMALL | {"warmup_steps": 1, "lr": 1e-2})), WeightRecorder()
    callbacks = [HeadEMA(0.5), recorder, LastCheckpoint(folder)]
    engine = trainer(folder, max_epochs=EPOCHS, callbacks=callbacks, enable_checkpointing=True, **options)
    if epochs < EPOCHS:
        model.on_train_epoch_start = lambda: engine.current_epoch < epochs or _stop()
    with contextlib.suppress(InterruptedError):  # raised by _stop
        engine.fit(model, loader(), loader(2, 1), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return model, recorder


def _stop() -> None:
    raise InterruptedError


@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_model_and_checkpoint_have_the_average_of_the_steps(tmp_path, accumulate):
    model, recorder = run(tmp_path, accumulate_grad_batches=accumulate)
    steps = 2 * EPOCHS // accumulate
    assert len(recorder.steps) == steps + 1
    average = recorder.steps[0]
    for t, weights in enumerate(recorder.steps[1:], start=1):
        decay = min(0.5, (1 + t) / (10 + t))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    loaded = ReverseHRNetSeg.load_from_checkpoint(tmp_path / "last.ckpt")
    for name, value in average.items():
        for other in (recorder.validated[-1][name], head(model)[name], head(loaded)[name]):
            torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-7)
        assert torch.equal(stored["head_in_training"][name], recorder.steps[-1][name])
    assert any(not torch.allclose(average[name], recorder.steps[-1][name], atol=1e-4) for name in average)


def test_the_encoder_does_not_change_and_is_not_averaged(tmp_path):
    model, _ = run(tmp_path)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["encoder"]["fingerprint"] == ReverseHRNetSeg(**SMALL).network.encoder.fingerprint()
    assert model.network.encoder.state_hash() == ReverseHRNetSeg(**SMALL).network.encoder.state_hash()
    assert set(stored["head_in_training"]) == set(head(model))
    assert all(key.startswith("network.head.") for key in stored["state_dict"])


def test_a_resumed_run_has_the_same_weights_and_average(tmp_path):
    uninterrupted, _ = run(tmp_path / "uninterrupted")
    run(tmp_path / "interrupted", epochs=1)
    resumed, _ = run(tmp_path / "resumed", checkpoint=tmp_path / "interrupted" / "last.ckpt")
    for name, value in head(uninterrupted).items():
        assert torch.equal(value, head(resumed)[name]), name
    checkpoints = [tmp_path / name / "last.ckpt" for name in ("uninterrupted", "resumed")]
    a, b = (torch.load(path, weights_only=True)["head_in_training"] for path in checkpoints)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_callback_that_is_used_again_starts_with_the_weights_of_the_second_model(tmp_path):
    ema = HeadEMA(0.9)
    trainer(tmp_path, callbacks=[ema]).fit(ReverseHRNetSeg(**SMALL), loader(), loader(2, 1))
    torch.manual_seed(1)
    second, recorder = ReverseHRNetSeg(**SMALL), WeightRecorder()
    start = head(second)
    trainer(tmp_path, callbacks=[ema, recorder]).fit(second, loader(), loader(2, 1))
    assert all(torch.equal(recorder.steps[0][name], value) for name, value in start.items())
    average = start
    for t, weights in enumerate(recorder.steps[1:], start=1):
        decay = min(0.9, (1 + t) / (10 + t))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    for name, value in head(second).items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(UserError, match="expected a number between 0 and 1"):
        HeadEMA(decay)


def test_a_trainable_encoder_is_refused(tmp_path):
    model = ReverseHRNetSeg(**(SMALL | {"freeze_encoder": False}))
    with pytest.raises(UserError, match=r"leave out ema_decay \(HeadEMA\) or freeze the encoder"):
        trainer(tmp_path, callbacks=[HeadEMA()]).fit(model, loader(), loader(2, 1))
