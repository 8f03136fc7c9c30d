"""`early-fusion-seg validate`: score a trained model on the validation split."""

from early_fusion_seg.cli.checkpoint_cli import ScoreCLI
from early_fusion_seg.cli.quiet_lightning import quiet_lightning


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: Command line arguments after `validate`.

    Returns:
        0.

    Raises:
        UserError: An option, a file or a setting is wrong.
    """
    with quiet_lightning():
        return ValidateCLI("validate", args).run_command()


class ValidateCLI(ScoreCLI):
    """Score a trained model on the val split and write results.json; model and classes come from the checkpoint."""

    def run_trainer(self) -> int:
        """Score every image once."""
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        return 0
