"""`early-fusion-seg fit`: train a model, or resume from a checkpoint."""

import signal
import warnings

from lightning.pytorch.utilities.exceptions import SIGTERMException

from early_fusion_seg.cli.output import preserve_metrics_csv, report_checkpoint, report_stop, start_wandb
from early_fusion_seg.cli.quiet_lightning import quiet_lightning
from early_fusion_seg.cli.training_cli import TrainingCLI


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: Command line arguments after `fit`.

    Returns:
        0; 143 after SIGTERM.

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

    def fit(self) -> int:
        """Train, from the start or from a checkpoint, and return the exit code."""
        path = self.config["ckpt_path"]
        self.check_resumable()
        if path is not None:  # a resumed run continues in its folder; `quiet_lightning` restores the filters
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        start_wandb(self.trainer.loggers)
        try:
            with preserve_metrics_csv(self.folder):
                self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True)
        except SIGTERMException:
            report_stop(self.trainer)
            return 128 + signal.SIGTERM
        report_checkpoint(self.trainer)
        return 0
