"""CheckpointCLI: the base of `validate`, `test` and `predict`, which load the model from a checkpoint."""

import abc
import json
from typing import Literal

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
from early_fusion_seg.multi_head import MultiHead


class CheckpointCLI(CommandCLI, abc.ABC):
    """Base of the commands that use a trained model; model and classes come from the checkpoint."""

    ckpt_help = (
        "checkpoint of a trained model; best or last: that of the newest run; several with the same encoder, which "
        "then runs once: '[a.ckpt, b.ckpt]'"
    )
    ckpt_type = list[str] | str | None
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
        parser.add_argument(
            "--ensemble",
            type=Literal["mean"] | None,
            help="mean: average the class probabilities of several checkpoints with the same classes",
        )
        add_training_options(parser, hidden=True)

    def instantiate_classes(self) -> None:
        """Make the data module from the configuration, load the model, and make the trainer."""
        paths = self._checkpoints()
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = self.config_init["data"]
        models = [load_model(path, self.config["model"]) for path in paths]
        if not is_plain_folder(self.datamodule, self.command):
            for model, path in zip(models, paths, strict=True):
                check_classes_match(self.datamodule.class_names, model.class_names, path)
        if len(models) == 1:
            self.model = models[0]
            self.model.inference = self.config_init["inference"]
            self.config["model"] = dict(self.model.hparams)
        else:
            heads = MultiHead(models, paths)
            heads.inference = self.config_init["inference"]
            self.model = heads.ensemble() if self.config["ensemble"] else heads
        self.make_folder()
        self.run_callbacks = self.result_callbacks()
        self.trainer = self.instantiate_trainer()

    def _checkpoints(self) -> list[str]:
        """Return the paths of the checkpoints; a list of one is the same as one."""
        paths = self.config["ckpt_path"]
        if not paths:
            raise UserError(f"{self.command} needs --ckpt_path FILE, the checkpoint of a trained model")
        paths = paths if isinstance(paths, list) else [paths]
        if len(paths) == 1:
            self.config["ckpt_path"] = paths[0]
        if len(paths) == 1 and self.config["ensemble"]:
            raise UserError(f"--ensemble needs several checkpoints, and {paths[0]} is the only one; leave it out")
        if len(paths) > 1 and self.command != "predict" and not self.config["ensemble"]:
            raise UserError(
                f"{self.command} scores one model and got {len(paths)} checkpoints; average their class probabilities "
                "with --ensemble mean, or score them one by one"
            )
        return paths

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
