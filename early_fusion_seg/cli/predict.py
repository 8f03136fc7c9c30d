"""`early-fusion-seg predict SOURCE`: segment images with a trained model."""

from collections.abc import Sequence

from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser

from early_fusion_seg.callbacks import PredictionsOfHeads, PredictionWriter
from early_fusion_seg.callbacks.predictions import Saved
from early_fusion_seg.cli.checkpoint_cli import CheckpointCLI
from early_fusion_seg.cli.load_model import folder_names
from early_fusion_seg.cli.output import report_predictions
from early_fusion_seg.cli.quiet_lightning import quiet_lightning
from early_fusion_seg.errors import UserError, first_five
from early_fusion_seg.multi_head import MultiHead

WITHOUT_VALUE = ("-h", "--help", "--print_config")


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: Command line arguments after `predict`.

    Returns:
        0; 1 if some files could not be read, or their predictions not be written.

    Raises:
        UserError: An option, a file or a setting is wrong.
    """
    with quiet_lightning():
        return PredictCLI("predict", source_as_option(args)).run_command()


class PredictCLI(CheckpointCLI):
    """Segment images with a trained model.

    SOURCE (or --data.root) is a folder, an image, a pattern in quotes such as 'photos/*.jpg', or a text file (.txt)
    with one path per line.
    """

    arguments = "SOURCE "

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is written, and how overlays are drawn."""
        super().add_core_arguments_to_parser(parser)
        parser.add_argument(
            "--save",
            type=list[Saved],
            default=["labels", "overlay"],
            help="what is written for each image: labels (masks/NAME.png), overlay (overlays/NAME.png), confidence "
            "(the probability of each label as a gray PNG), probabilities (of all classes, float16, as .npz)",
        )
        parser.add_argument(
            "--classes",
            type=list[str] | None,
            help="classes that overlays and legends show, such as '[Car, Pedestrian]'; default: all",
        )
        parser.add_argument("--opacity", type=float, default=0.5, help="opacity of the colors in overlays, 0 to 1")
        parser.add_argument("--legend", type=bool, default=False, help="draw a legend below each overlay")

    def result_callbacks(self) -> list[Callback]:
        """Return the callback that writes the predictions; several heads have a folder each."""
        options = {name: self.config[name] for name in ("save", "classes", "opacity", "legend")}
        self.predictions: PredictionWriter | PredictionsOfHeads = PredictionWriter(self.folder, **options)
        if isinstance(self.model, MultiHead):
            writers = [PredictionWriter(self.folder / name, **options) for name in folder_names(self.model.names)]
            self.predictions = PredictionsOfHeads(self.folder, writers)
        return [self.predictions]

    def run_trainer(self) -> int:
        """Segment every readable image; return 1 if some could not be read or written."""
        self.trainer.predict(self.model, datamodule=self.datamodule, return_predictions=False)
        report_predictions(self.predictions)
        return 1 if self.predictions.unreadable else 0


def source_as_option(args: Sequence[str]) -> list[str]:
    """Replace the argument SOURCE, anywhere between the options, by `--data.root SOURCE`.

    Raises:
        UserError: There are several, `--data.root` is given too, or nothing that could say where the images are.

    Example:
        >>> source_as_option(["photos", "--ckpt_path", "best"])
        ['--ckpt_path', 'best', '--data.root', 'photos']
    """
    sources: list[str] = []
    rest: list[str] = []
    for before, word in zip(["", *args], args, strict=False):
        is_option = before.startswith("--") or before == "-c"
        is_value = is_option and "=" not in before and before not in WITHOUT_VALUE
        (rest if word.startswith("-") or is_value else sources).append(word)
    if len(sources) > 1:
        raise UserError(
            f"predict takes one SOURCE and got {len(sources)}: {first_five(sources)}; put a pattern in quotes, such as "
            "'photos/*.jpg', or give a text file with one path per line"
        )
    names = {word.partition("=")[0] for word in rest}
    if sources and names & {"--data.root", "--data.init_args.root"}:
        raise UserError(f"{sources[0]} and --data.root are both given; leave one of them out")
    if not sources and not any(
        name in (*WITHOUT_VALUE, "-c", "--config") or name.startswith("--data") for name in names
    ):
        raise UserError(
            "predict needs SOURCE: a folder of images, an image, a pattern in quotes, or a text file with paths"
        )
    return [*rest, "--data.root", *sources] if sources else rest
