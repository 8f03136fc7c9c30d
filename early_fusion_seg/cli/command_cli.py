"""CommandCLI: the base of all commands that run on Lightning's Trainer."""

import os
import secrets
from abc import ABC
from typing import Any, ClassVar

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # not listed in its __all__
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from early_fusion_seg import __version__
from early_fusion_seg.callbacks.narrow_progress_bar import NarrowProgressBar
from early_fusion_seg.callbacks.run_config import RunConfig
from early_fusion_seg.callbacks.slow_bfloat16 import SlowBfloat16Warning
from early_fusion_seg.cli import example
from early_fusion_seg.cli.devices import distributed_settings, is_first_process
from early_fusion_seg.cli.load_model import find_checkpoint
from early_fusion_seg.cli.output import RUNS, LoggerName, make_loggers, output_folder, run_folder
from early_fusion_seg.cli.parsing import HINTS, parse, recipe_names
from early_fusion_seg.cli.short_help import ShortHelp
from early_fusion_seg.data import SegmentationDataModule
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.atomic import AtomicCheckpointIO
from early_fusion_seg.io.run_folder import RunFolder
from early_fusion_seg.segmenter import ReverseHRNetSeg


class CommandCLI(LightningCLI, ABC):
    """Base of the commands that use Lightning's Trainer: parsing, trainer, loggers and run folder.

    Args:
        command: Name of the command.
        args: Command line arguments after the name.
    """

    output_help: ClassVar[str]  # help of `--output`; COMMAND stands for the name of the command
    ckpt_help: ClassVar[str]  # help of `--ckpt_path`
    ckpt_type: ClassVar[Any] = str | None
    arguments: ClassVar[str] = ""  # what stands before the options in the usage

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        self.run_callbacks: list[Callback] = []
        self.run: RunFolder | None = None
        parser_options = {
            "prog": f"early-fusion-seg {command}",
            "usage": f"%(prog)s {self.arguments}[options]\nexample: {example(command)}",
            "description": f"{self.__doc__} {HINTS}",
            "formatter_class": ShortHelp,
            "exit_on_error": False,
            "dump_header": [f"early_fusion_seg=={__version__}"],
        }
        config_name = "config.yaml" if command == "fit" else f"{command}_config.yaml"
        try:
            super().__init__(
                ReverseHRNetSeg,
                SegmentationDataModule,
                save_config_callback=RunConfig,
                save_config_kwargs={"config_filename": config_name, "save_to_log_dir": False},
                parser_kwargs=parser_options,
                args=args,
                run=False,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # hyperparameters stay plain types
            )
        except BaseException:
            if self.run is not None:
                self.run.close(failed=True)
            raise

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser with `--config`, which takes recipes too."""
        parser = LightningArgumentParser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=ActionConfigFile,
            help=f"name of a recipe ({', '.join(sorted(recipe_names()))}) or YAML file with options; may be given "
            "several times, and later options override earlier ones",
        )
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed."""
        parser.add_argument(
            "--seed_everything",
            type=int | bool,
            default=0,
            help="random seed of Python, NumPy and PyTorch; true: choose one at random, false: set none",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add output folder, loggers and checkpoint."""
        parser.add_argument(
            "--output",
            type=str | None,
            help=self.output_help.replace("COMMAND", self.command),
        )
        parser.add_argument(
            "--logger",
            type=LoggerName | list[LoggerName],
            default="csv",
            help="where metrics are logged besides metrics.csv in the output folder; several: --logger "
            "'[tensorboard, wandb]'",
        )
        parser.add_argument(
            "--wandb",
            type=dict[str, object],
            default={},
            help="--wandb.project NAME; also name, entity, tags",
        )
        parser.add_argument("--ckpt_path", type=self.ckpt_type, help=self.ckpt_help)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments; an error is one sentence."""
        self.config = parse(parser, args)
        if self.config["seed_everything"] is True:  # Lightning would take 0
            os.environ.setdefault("PL_GLOBAL_SEED", str(secrets.randbits(32)))

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and the run folder. The saved configuration names no folder: a rerun gets a new one."""
        found = self.config["ckpt_path"]
        found = [find_checkpoint(path) for path in found] if isinstance(found, list) else find_checkpoint(found)
        self.config["ckpt_path"] = found
        resumed = run_folder(self.config["ckpt_path"]) if self.command == "fit" else None
        self.output = output_folder(self.config["output"]) or resumed
        self.config["output"] = None

    def make_folder(self) -> RunFolder:
        """Make the run folder, once model and data exist, so that wrong settings leave no folder behind."""
        self.run = RunFolder(self.output, RUNS / self.command, is_first_process())
        self.folder = self.run.path
        return self.run

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; the loggers and callbacks of this project are added to the user's."""
        options = self.config["trainer"]
        if options["default_root_dir"] is None:
            kwargs["default_root_dir"] = str(self.folder)
        if options["logger"] in (None, True):
            kwargs["logger"] = make_loggers(self.config["logger"], self.folder, self.config["wandb"])
        own = self.config_init["trainer"]["callbacks"] or []
        has_bar = any(isinstance(callback, ProgressBar) for callback in (own if isinstance(own, list) else [own]))
        if options["enable_progress_bar"] is not False and not has_bar:
            self.run_callbacks.append(NarrowProgressBar())
        self.trainer_defaults["callbacks"] = [*self.run_callbacks, SlowBfloat16Warning()]
        kwargs |= distributed_settings(options)
        plugins = self.config_init["trainer"]["plugins"] or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:  # what the trainer and its connectors raise for wrong values
            raise UserError(f"the trainer does not accept its settings: {error}") from error
