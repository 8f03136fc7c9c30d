"""`early-fusion-seg predict`: segment a folder of images with a trained model."""

from lightning.pytorch import Callback

from early_fusion_seg.callbacks import PredictionsOfHeads, PredictionWriter
from early_fusion_seg.cli.checkpoint_cli import CheckpointCLI
from early_fusion_seg.cli.load_model import folder_names
from early_fusion_seg.cli.output import report_predictions
from early_fusion_seg.cli.quiet_lightning import quiet_lightning
from early_fusion_seg.multi_head import MultiHead


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: Command line arguments after `predict`.

    Returns:
        0; 1 if some files could not be read, or their predictions not be named.

    Raises:
        UserError: An option, a file or a setting is wrong.
    """
    with quiet_lightning():
        return PredictCLI("predict", args).run_command()


class PredictCLI(CheckpointCLI):
    """Segment a folder of images with a trained model and write masks and overlays."""

    def result_callbacks(self) -> list[Callback]:
        """Return the callback that writes masks and overlays; several heads have a folder each."""
        self.predictions: PredictionWriter | PredictionsOfHeads = PredictionWriter(self.folder)
        if isinstance(self.model, MultiHead):
            writers = [PredictionWriter(self.folder / name) for name in folder_names(self.model.names)]
            self.predictions = PredictionsOfHeads(self.folder, writers)
        return [self.predictions]

    def run_trainer(self) -> int:
        """Segment every readable image; return 1 if some could not be read or written."""
        self.trainer.predict(self.model, datamodule=self.datamodule, return_predictions=False)
        report_predictions(self.predictions)
        return 1 if self.predictions.unreadable else 0
