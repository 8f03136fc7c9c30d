"""The package leaves the user's warning filters and log levels unchanged; the command line restores them."""

import logging
import warnings
from pathlib import Path

import pytest
from cli_runs import fit_args
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer

from early_fusion_seg.__main__ import main
from early_fusion_seg.cli.quiet_lightning import quiet_lightning
from early_fusion_seg.data.synthetic import SyntheticDataModule
from early_fusion_seg.errors import UserError
from early_fusion_seg.segmenter import ReverseHRNetSeg

LOGGERS = ("lightning.pytorch", "lightning.fabric")


def process_state() -> tuple[list[object], list[int], object]:
    """Return the warning filters, the levels of Lightning's loggers, and the format of warnings."""
    return list(warnings.filters), [logging.getLogger(name).level for name in LOGGERS], warnings.formatwarning


def test_training_in_python_changes_neither_filters_nor_log_levels(tmp_path: Path) -> None:
    before = process_state()
    data = SyntheticDataModule((32, 48), 2, 1, batch_size=2, num_workers=0, crop_size=32)
    model = ReverseHRNetSeg(class_names=data.class_names, encoder="resnet18", encoder_weights="random", width=4)
    assert process_state() == before
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=tmp_path, max_steps=1, enable_model_summary=False, **options)
    trainer.fit(model, datamodule=data)
    trainer.validate(model, datamodule=data, verbose=False)
    assert trainer.global_step == 1
    assert process_state() == before


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("refused", [False, True])
def test_the_command_line_restores_filters_and_log_levels(camvid: Path, tmp_path: Path, refused: bool) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    assert main(fit_args(camvid, tmp_path / "first", *short)) == 0  # imports that add filters happen here
    args = fit_args(camvid, tmp_path / "second", *short)
    before = process_state()
    assert main([*args, "--model.width=5"] if refused else args) == (2 if refused else 0)
    assert process_state() == before


def test_filters_and_levels_are_set_inside_the_block_only() -> None:
    before = process_state()
    with quiet_lightning():
        filters, levels, _ = process_state()
        assert len(filters) > len(before[0])
        assert levels == [logging.WARNING] * 2
        assert warnings.formatwarning("a crop is large", UserWarning, "a.py", 3) == "warning: a crop is large\n"
        old = warnings.formatwarning("f is old", DeprecationWarning, "a.py", 3)
        assert old == "warning: a.py:3: DeprecationWarning: f is old\n"
        warnings.warn("The 'train_dataloader' does not have many workers", stacklevel=1)  # else an error
    assert process_state() == before


class Broken(Callback):
    """A callback with programming errors."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def on_train_start(self, trainer: Trainer) -> None:  # type: ignore[override]  # lacks an argument
        raise AssertionError

    def on_fit_start(self, trainer: Trainer, pl_module: object) -> None:
        if self.error is not TypeError:
            raise self.error("a bug")


@pytest.mark.parametrize("error", [TypeError, ValueError, RuntimeError, AttributeError])
def test_a_programming_error_keeps_its_type(error: type[Exception], tmp_path: Path) -> None:
    data = SyntheticDataModule((32, 48), 2, 1, batch_size=2, num_workers=0, crop_size=32)
    model = ReverseHRNetSeg(class_names=data.class_names, encoder="resnet18", encoder_weights="random", width=4)
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_steps=1,
        callbacks=[Broken(error)],
        num_sanity_val_steps=0,
        enable_model_summary=False,
        **options,
    )
    with pytest.raises(error) as caught, quiet_lightning():
        trainer.fit(model, datamodule=data)
    assert type(caught.value) is error


def test_a_misconfiguration_is_a_user_error_and_the_state_is_restored() -> None:
    before = process_state()
    with pytest.raises(UserError, match="no such option"), quiet_lightning():
        raise MisconfigurationException("no such option")
    assert process_state() == before
