"""`early-fusion-seg fit`: train a model, from the start or from a checkpoint."""

import signal

from lightning.pytorch.utilities.exceptions import SIGTERMException

from early_fusion_seg.cli.output import preserve_metrics_csv, report_checkpoint, report_end, start_wandb
from early_fusion_seg.cli.quiet_lightning import quiet_lightning
from early_fusion_seg.cli.training_cli import TrainingCLI


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: What follows `fit` on the command line.

    Returns:
        0; 143 after SIGTERM.

    Raises:
        UserError: Anything that the user can fix.
    """
    with quiet_lightning():
        return FitCLI(args).fit()


class FitCLI(TrainingCLI):
    """Train a model. The best and the last checkpoint, scores and panels go to the folder of the run."""

    def __init__(self, args: list[str]) -> None:
        super().__init__("fit", args)

    def fit(self) -> int:
        """Train, from the start or from a checkpoint; 143 where the process was told to end."""
        path = self.config["ckpt_path"]
        self.check_resumable()
        start_wandb(self.trainer.loggers)
        try:
            with preserve_metrics_csv(self.folder):
                self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True)
        except SIGTERMException:
            report_end(self.trainer)
            return 128 + signal.SIGTERM
        report_checkpoint(self.trainer)
        return 0
