"""What the commands share."""

import logging
import warnings
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from early_fusion_seg import __version__
from early_fusion_seg.checkpointing import AtomicCheckpointIO
from early_fusion_seg.cli.devices import distributed_settings
from early_fusion_seg.cli.output import LoggerName, RunConfig, make_loggers, next_folder, run_folder
from early_fusion_seg.cli.parsing import HINTS, ShortHelp, add_class_weights, parse
from early_fusion_seg.data import SegmentationDataModule
from early_fusion_seg.errors import UserError
from early_fusion_seg.segmenter import ReverseHRNetSeg

UNHELPFUL = (  # warnings that a user need do nothing about
    r"Experiment logs directory .* exists and is not empty",  # earlier scores are kept
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning's use of torch
    r"Found \d+ module\(s\) in eval mode",  # the frozen encoder is meant to be
    r"predict returned None",  # a file that is no image; it is reported at the end
    r"\s*Dump of a value that does not round-trip: a tuple",  # albumentations takes the list that comes back
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
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
            help="for fit: optimizer steps between two writings of last.ckpt, which each epoch's end writes too",
        )
        parser.add_argument(
            "--ema_decay",
            type=float | None,
            help="for fit: validate and store an exponential moving average of the head's weights, such as 0.999",
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
