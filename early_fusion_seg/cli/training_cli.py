"""TrainingCLI: the base of `fit` and `estimate`, which make model and data from the configuration."""

from abc import ABC
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from early_fusion_seg.callbacks import ClassIoU, PanelLogger, Throughput
from early_fusion_seg.callbacks.ema import KEY, HeadEMA
from early_fusion_seg.callbacks.validate_at_end import ValidateAtEnd
from early_fusion_seg.cli.command_cli import CommandCLI
from early_fusion_seg.cli.load_model import check_classes_match, check_hparams_match, check_not_finished
from early_fusion_seg.cli.output import best_and_last
from early_fusion_seg.cli.parsing import LOG_STEPS, add_data, add_trainer, add_training_options, fill_class_weights
from early_fusion_seg.encoder.encoder_checkpoint import read_checkpoint
from early_fusion_seg.errors import UserError
from early_fusion_seg.segmenter import ReverseHRNetSeg

LINKED = ("class_names", "num_classes", "palette", "ignore_index", "absent", "pred_void")


class TrainingCLI(CommandCLI, ABC):
    """Base of the commands that take the options of `fit` and make its trainer."""

    ckpt_help = "checkpoint to resume from; last: the newest run's"

    def __init__(self, command: str, args: list[str]) -> None:
        self.stored: dict[str, Any] | None = None  # hyperparameters of the checkpoint to resume from
        self.stored_encoder: dict[str, Any] = {}  # its entry of the encoder
        self.steps_before = 0  # optimizer steps of that checkpoint
        super().__init__(command, args)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data; the model takes its classes from the data."""
        add_trainer(parser)
        parser.add_lightning_class_args(ReverseHRNetSeg, "model")
        add_data(parser)
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of training."""
        super().add_arguments_to_parser(parser)
        add_training_options(parser)

    def before_instantiate_classes(self) -> None:
        """Read the checkpoint first, so that a wrong one is refused at once."""
        super().before_instantiate_classes()
        path = self.config["ckpt_path"]
        if path is None:
            return
        checkpoint = read_checkpoint(path)
        self.stored, self.steps_before = checkpoint["hyper_parameters"], checkpoint["global_step"]
        if (KEY in checkpoint) != (self.config["ema_decay"] is not None):
            word = "with" if KEY in checkpoint else "without"
            raise UserError(f"{path} was saved {word} --ema_decay; resume {word} it")
        check_not_finished(checkpoint, self.config["trainer"], path)
        self.stored_encoder = checkpoint["encoder"]

    def instantiate_classes(self) -> None:
        """Compute the class weights, then make data, model and trainer."""
        fill_class_weights(self.config)
        weights = self.config["model"]["encoder_weights"]
        if "state_dict" in self.stored_encoder and weights == self.stored_encoder["weights"]:
            self.config["model"]["encoder_weights"] = "checkpoint"  # the file that it came from may have moved
        super().instantiate_classes()
        self.config["model"]["encoder_weights"] = weights

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with the callbacks of training."""
        self.make_folder()
        trainer = self.config["trainer"]
        throughput = Throughput(each_epoch=trainer["log_every_n_steps"] == LOG_STEPS)
        self.run_callbacks = [throughput, ClassIoU(), PanelLogger(), ValidateAtEnd()]
        if self.config["ema_decay"] is not None:
            self.run_callbacks.insert(0, HeadEMA(self.config["ema_decay"]))
        if trainer["enable_checkpointing"] is not False:
            self.run_callbacks += best_and_last(self.folder, self.config["save_every_n_steps"])
        return super().instantiate_trainer(**kwargs)

    def check_resumable(self) -> None:
        """Check that the checkpoint to resume from, if any, has the classes of the data and the settings of the model.

        Raises:
            UserError: Names the first difference.
        """
        if self.stored is not None:
            path = self.config["ckpt_path"]
            check_classes_match(self.datamodule.class_names, self.stored["class_names"], path)
            check_hparams_match(dict(self.model.hparams), self.stored, path)
