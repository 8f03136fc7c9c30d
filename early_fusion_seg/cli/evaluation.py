"""validate, test and predict: the model from a checkpoint."""

import json
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from early_fusion_seg.callbacks import ClassIoU, PanelLogger, PredictionWriter, ResultsWriter
from early_fusion_seg.cli.base import CommandCLI
from early_fusion_seg.cli.output import preserve_metrics_csv, report_predictions, start_wandb
from early_fusion_seg.cli.parsing import add_data, add_trainer
from early_fusion_seg.commands.loading import check_classes_match, is_plain_folder, load_model
from early_fusion_seg.errors import UserError


class CheckpointCLI(CommandCLI):
    """Use a trained model. Model and classes come from the checkpoint; results go to the folder of the run."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer and data; of the model, only what may be said about one that is trained."""
        add_trainer(parser)
        parser.add_argument(
            "--model",
            type=dict[str, object],
            default={},
            help="--model.encoder_weights FILE says where the encoder's weights are now; anything else is in the "
            "checkpoint, and refused where it differs",
        )
        add_data(parser, {"class_path": "early_fusion_seg.FolderDataModule"} if self.command == "predict" else None)

    def instantiate_classes(self) -> None:
        """Make the data from the configuration, the model from the checkpoint, and the trainer."""
        path = self.config["ckpt_path"]
        if path is None:
            raise UserError(f"{self.command} needs --ckpt_path FILE, the checkpoint of a trained model")
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = self.config_init["data"]
        self.model = load_model(path, self.config["model"])
        if not is_plain_folder(self.datamodule, self.command):
            check_classes_match(self.datamodule.class_names, self.model.class_names, path)
        self.config["model"] = dict(self.model.hparams)
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with what writes the results."""
        if self.command == "predict":
            self.predictions = PredictionWriter(self.folder)
            self.run_callbacks = [self.predictions]
        else:
            config = json.loads(self.parser.dump(self.config, format="json"))
            results = ResultsWriter(self.folder, self.config["ckpt_path"], config)
            self.run_callbacks = [ClassIoU(), PanelLogger(), results]
        return super().instantiate_trainer(**kwargs)

    def evaluate(self) -> int:
        """Run the command; 1 where files could not be read."""
        start_wandb(self.trainer.loggers)
        with preserve_metrics_csv(self.folder):
            if self.command == "predict":
                self.trainer.predict(self.model, datamodule=self.datamodule, return_predictions=False)
                report_predictions(self.predictions)
                return 1 if self.predictions.unreadable else 0
            entry = self.trainer.validate if self.command == "validate" else self.trainer.test
            entry(self.model, datamodule=self.datamodule, verbose=False)
            return 0
