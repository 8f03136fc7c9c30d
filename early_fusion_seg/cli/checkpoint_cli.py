"""CheckpointCLI: the base of `validate`, `test` and `predict`, which load the model from a checkpoint."""

import abc
import json

from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser

from early_fusion_seg.callbacks import ClassIoU, PanelLogger, ResultsWriter
from early_fusion_seg.cli.command_cli import CommandCLI
from early_fusion_seg.cli.load_model import check_classes_match, is_plain_folder, load_model
from early_fusion_seg.cli.metrics_csv import preserve_metrics_csv
from early_fusion_seg.cli.output import start_wandb
from early_fusion_seg.cli.parsing import add_data, add_trainer, add_training_options
from early_fusion_seg.errors import UserError
from early_fusion_seg.inference import InferenceSettings


class CheckpointCLI(CommandCLI, abc.ABC):
    """Base of the commands that use a trained model; model and classes come from the checkpoint."""

    ckpt_help = "checkpoint of a trained model; best or last: that of the newest run"
    output_help = "folder for the results; default: runs/COMMAND/version_N with the next free N"

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, data, and the model options, which must agree with the checkpoint."""
        add_trainer(parser)
        parser.add_argument(
            "--model",
            type=dict[str, object],
            default={},
            help="--model.encoder_weights hub, bundled or FILE loads the encoder's weights from there, such as from a "
            "file that has moved; all other model settings come from the checkpoint, and other values are refused",
        )
        parser.add_class_arguments(InferenceSettings, "inference")
        add_data(parser, {"class_path": "early_fusion_seg.FolderDataModule"} if self.command == "predict" else None)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Accept the options of fit too, so that the config.yaml of a run can be given; they have no effect."""
        super().add_arguments_to_parser(parser)
        add_training_options(parser, hidden=True)

    def instantiate_classes(self) -> None:
        """Make the data module from the configuration, load the model, and make the trainer."""
        path = self.config["ckpt_path"]
        if path is None:
            raise UserError(f"{self.command} needs --ckpt_path FILE, the checkpoint of a trained model")
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = self.config_init["data"]
        self.model = load_model(path, self.config["model"])
        self.model.inference = self.config_init["inference"]
        if not is_plain_folder(self.datamodule, self.command):
            check_classes_match(self.datamodule.class_names, self.model.class_names, path)
        self.config["model"] = dict(self.model.hparams)
        self.make_folder()
        self.run_callbacks = self.result_callbacks()
        self.trainer = self.instantiate_trainer()

    @abc.abstractmethod
    def result_callbacks(self) -> list[Callback]:
        """Return the callbacks that write the results."""

    @abc.abstractmethod
    def run_trainer(self) -> int:
        """Run the trainer and return the exit code."""

    def run_command(self) -> int:
        """Run the command and return the exit code."""
        assert self.run is not None  # made with the trainer
        with self.run:
            start_wandb(self.trainer.loggers)
            with preserve_metrics_csv(self.folder):
                return self.run_trainer()


class ScoreCLI(CheckpointCLI, abc.ABC):
    """Base of the commands that score a trained model."""

    def result_callbacks(self) -> list[Callback]:
        """Return the callbacks that log the scores and write `results.json`."""
        config = json.loads(self.parser.dump(self.config, format="json"))
        return [ClassIoU(), PanelLogger(), ResultsWriter(self.folder, self.config["ckpt_path"], config)]
