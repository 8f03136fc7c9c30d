"""`early-fusion-seg fit`: train a model, or resume from a checkpoint."""

import warnings

from early_fusion_seg.cli.metrics_csv import continue_metrics_csv, preserve_metrics_csv
from early_fusion_seg.cli.output import (
    check_no_other_run,
    report_checkpoint,
    report_classes,
    report_stop,
    run_folder,
    start_wandb,
    stop_signal,
)
from early_fusion_seg.cli.quiet_lightning import quiet_lightning
from early_fusion_seg.cli.training_cli import TrainingCLI
from early_fusion_seg.errors import UserError


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: Command line arguments after `fit`.

    Returns:
        0; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.

    Raises:
        UserError: An option, a file or a setting is wrong.
    """
    with quiet_lightning():
        return FitCLI(args).fit()


class FitCLI(TrainingCLI):
    """Train a model; checkpoints, metrics and panels are written to the run folder."""

    output_help = (
        "run folder; default: when resuming, that of --ckpt_path, else runs/fit/version_N with the next free N"
    )

    def __init__(self, args: list[str]) -> None:
        super().__init__("fit", args)

    def before_instantiate_classes(self) -> None:
        """Check that no checkpoints of another run would be replaced."""
        super().before_instantiate_classes()
        trainer = self.config["trainer"]
        if self.output is not None and trainer["enable_checkpointing"] is not False and not trainer["fast_dev_run"]:
            check_no_other_run(self.output, self.config["ckpt_path"])

    def fit(self) -> int:
        """Train, from the start or from a checkpoint, and return the exit code."""
        assert self.run is not None  # made with the trainer
        with self.run:
            self.check_resumable()
            start_wandb(self.trainer.loggers)
            try:
                self._train()
            except UserError:
                raise
            except BaseException as error:
                number = stop_signal(self.trainer, error)
                if number is None:
                    raise
                report_stop(self.trainer, number)
                return 128 + number
            if self.trainer.global_step == self.steps_before:
                raise UserError(
                    "nothing was trained: the limits of the trainer (max_epochs, max_steps, max_time, "
                    "limit_train_batches) are reached before the first step; raise them"
                )
            report_classes(self.trainer, self.model.class_names)
            report_checkpoint(self.trainer)
        return 0

    def _train(self) -> None:
        path = self.config["ckpt_path"]
        if path is not None:  # a resumed run continues in its folder; `quiet_lightning` restores the filters
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        own = run_folder(path)
        continues = own is not None and own.resolve() == self.folder.resolve()
        with (
            continue_metrics_csv(self.folder, self.trainer.loggers) if continues else preserve_metrics_csv(self.folder)
        ):
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True)
