"""fit, validate, test and predict: a LightningCLI for training, and one for what starts from a checkpoint.

`fit` builds the model from the configuration and tells it the classes of the data; so does `estimate`, in a file of its
own. The other commands take the whole model from the checkpoint, and refuse data with other classes. What a run writes
is in one folder.
"""

import json
import logging
import signal
import sys
import warnings
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from early_fusion_seg import __version__
from early_fusion_seg.callbacks import ClassIoU, PanelLogger, PredictionWriter, ResultsWriter, Throughput
from early_fusion_seg.checkpoint import read_checkpoint
from early_fusion_seg.checkpointing import AtomicCheckpointIO
from early_fusion_seg.cli.devices import distributed_settings
from early_fusion_seg.cli.output import (
    LoggerName,
    RunConfig,
    ValidateAtEnd,
    best_and_last,
    keep_scores,
    make_loggers,
    next_folder,
    report_checkpoint,
    report_predictions,
    run_folder,
    start_wandb,
)
from early_fusion_seg.cli.parsing import (
    HINTS,
    ShortHelp,
    add_class_weights,
    add_data,
    add_trainer,
    fill_class_weights,
    parse,
)
from early_fusion_seg.commands.loading import (
    is_plain_folder,
    load_model,
    refuse_other_classes,
    refuse_other_settings,
)
from early_fusion_seg.data import SegmentationDataModule
from early_fusion_seg.errors import UserError
from early_fusion_seg.segmenter import ReverseHRNetSeg

LINKED = ("class_names", "num_classes", "palette", "ignore_index", "absent", "pred_void")
UNHELPFUL = (  # warnings that a user need do nothing about
    r"Experiment logs directory .* exists and is not empty",  # earlier scores are kept
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning's use of torch
    r"Found \d+ module\(s\) in eval mode",  # the frozen encoder is meant to be
    r"predict returned None",  # a file that is no image; it is reported at the end
)


def run(command: str, args: list[str]) -> int:
    """Run a command.

    Args:
        command: "fit", "validate", "test" or "predict".
        args: What follows it.

    Returns:
        0; 1 where some files could not be read; 143 where the process was told to end (SIGTERM).

    Raises:
        UserError: Anything that the user can mend.
    """
    with plain_words():
        try:
            return FitCLI(args).fit() if command == "fit" else CheckpointCLI(command, args).evaluate()
        except SIGTERMException:
            print("ended by SIGTERM; fit goes on from the last.ckpt of its run with --ckpt_path", file=sys.stderr)
            return 128 + signal.SIGTERM


@contextmanager
def plain_words() -> Iterator[None]:
    """Leave out what Lightning says that a user need not know, and make UserErrors of what it refuses."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # below that: seed, devices found, advertisements
    for message in UNHELPFUL:
        warnings.filterwarnings("ignore", message)
    try:
        yield
    except MisconfigurationException as error:  # Lightning's word for what a user has to mend
        raise UserError(str(error)) from error


class CommandCLI(LightningCLI, ABC):
    """What the commands share: parsing, trainer, loggers and the folder of the run.

    Args:
        command: Name of the command.
        args: What follows it on the command line.
    """

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        self.run_callbacks: list[Callback] = []
        super().__init__(
            ReverseHRNetSeg,
            SegmentationDataModule,
            save_config_callback=RunConfig,
            save_config_kwargs={
                "config_filename": "config.yaml" if command == "fit" else f"{command}_config.yaml",
                "save_to_log_dir": False,
            },
            parser_kwargs={
                "prog": f"early-fusion-seg {command}",
                "usage": "%(prog)s [options]",
                "description": f"{self.__doc__} {HINTS}",
                "formatter_class": ShortHelp,
                "exit_on_error": False,
                "dump_header": [f"early_fusion_seg=={__version__}"],
            },
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # hyperparameters stay plain types
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed."""
        parser.add_argument(
            "--seed_everything", type=int | bool, default=0, help="seed of everything random; false: none, true: any"
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what the commands have beyond trainer, model and data."""
        parser.add_argument(
            "--output",
            type=str | None,
            help="folder of the run; default: runs/COMMAND/version_N, or that of the run that fit goes on with",
        )
        parser.add_argument(
            "--logger",
            type=LoggerName | list[LoggerName],
            default="csv",
            help="where scores go, beside metrics.csv in that folder; several: '[tensorboard, wandb]'",
        )
        parser.add_argument("--ckpt_path", type=str | None, help="checkpoint; fit goes on from it, the others use it")
        parser.add_argument(
            "--save_every_n_steps",
            type=PositiveInt,
            default=200,
            help="for fit: optimiser steps between two writings of last.ckpt, which each epoch's end writes too",
        )
        add_class_weights(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with recipes and plain messages."""
        self.config = parse(parser, args)

    def before_instantiate_classes(self) -> None:
        """Choose the folder, and forget it in the configuration: a rerun of that must not overwrite this run."""
        begun = run_folder(self.config["ckpt_path"]) if self.command == "fit" else None
        self.folder = Path(self.config["output"] or begun or next_folder(Path("runs", self.command)))
        self.config["output"] = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with this project's loggers and callbacks beside the user's."""
        given = self.config["trainer"]
        if given["default_root_dir"] is None:
            kwargs["default_root_dir"] = str(self.folder)
        if given["logger"] in (None, True):
            kwargs["logger"] = make_loggers(self.config["logger"], self.folder)
        self.trainer_defaults["callbacks"] = self.run_callbacks
        kwargs |= distributed_settings(given)
        plugins = self.config_init["trainer"]["plugins"] or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:  # what the trainer and its connectors raise for values they refuse
            raise UserError(f"the trainer refuses its settings: {error}") from error


class TrainingCLI(CommandCLI, ABC):
    """What `fit` takes, and the trainer that it uses."""

    def __init__(self, command: str, args: list[str]) -> None:
        self.stored: dict[str, Any] | None = None  # hyperparameters of the checkpoint to go on from
        super().__init__(command, args)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data; the data tells the model the classes."""
        add_trainer(parser)
        parser.add_lightning_class_args(ReverseHRNetSeg, "model")
        add_data(parser)
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Read the checkpoint before anything costs time."""
        super().before_instantiate_classes()
        path, epochs = self.config["ckpt_path"], self.config["trainer"]["max_epochs"]
        if path is None:
            return
        checkpoint = read_checkpoint(path)
        self.stored = checkpoint["hyper_parameters"]
        if epochs is not None and 0 <= epochs <= checkpoint["epoch"]:
            raise UserError(
                f"trainer.max_epochs is {epochs}, but {path} is from epoch {checkpoint['epoch'] + 1}; raise max_epochs"
            )

    def instantiate_classes(self) -> None:
        """Make data, model and trainer, after the class weights that follow from the data."""
        fill_class_weights(self.config)
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with what training needs beside."""
        trainer = self.config["trainer"]
        self.run_callbacks = [Throughput(), ClassIoU(), PanelLogger(), ValidateAtEnd()]
        if trainer["logger"] is not False:
            self.run_callbacks.append(LearningRateMonitor("step"))
        if trainer["enable_checkpointing"] is not False:
            self.run_callbacks += best_and_last(self.folder, self.config["save_every_n_steps"])
        return super().instantiate_trainer(**kwargs)

    def refuse_other_checkpoint(self) -> None:
        """Check that the checkpoint to go on from, if any, has the classes of the data and the settings of the model.

        Raises:
            UserError: Names the first difference.
        """
        if self.stored is not None:
            path = self.config["ckpt_path"]
            refuse_other_classes(self.datamodule.class_names, self.stored["class_names"], path)
            refuse_other_settings(dict(self.model.hparams), self.stored, path)


class FitCLI(TrainingCLI):
    """Train a model. The best and the last checkpoint, scores and panels go to the folder of the run."""

    def __init__(self, args: list[str]) -> None:
        super().__init__("fit", args)

    def fit(self) -> int:
        """Train, from the start or from a checkpoint."""
        path = self.config["ckpt_path"]
        self.refuse_other_checkpoint()
        if path is not None:
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # it goes on there
        start_wandb(self.trainer.loggers)
        keep_scores(self.folder)
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True)
        report_checkpoint(self.trainer)
        return 0


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
            refuse_other_classes(self.datamodule.class_names, self.model.class_names, path)
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
        keep_scores(self.folder)
        if self.command == "predict":
            self.trainer.predict(self.model, datamodule=self.datamodule, return_predictions=False)
            report_predictions(self.predictions)
            return 1 if self.predictions.unreadable else 0
        entry = self.trainer.validate if self.command == "validate" else self.trainer.test
        entry(self.model, datamodule=self.datamodule, verbose=False)
        return 0
