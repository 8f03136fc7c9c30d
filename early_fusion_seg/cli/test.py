"""`early-fusion-seg test`: score a trained model on the test split."""

from early_fusion_seg.cli.checkpoint_cli import ScoreCLI
from early_fusion_seg.cli.quiet_lightning import quiet_lightning


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: Command line arguments after `test`.

    Returns:
        0.

    Raises:
        UserError: An option, a file or a setting is wrong.
    """
    with quiet_lightning():
        return TestCLI("test", args).run_command()


class TestCLI(ScoreCLI):
    """Score a trained model on the test split and write results.json; model and classes come from the checkpoint."""

    def run_trainer(self) -> int:
        """Score every image once."""
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        return 0
