"""What the command line takes, recipes by their names, and the parser's complaints in plain words."""

import contextlib
import io
import re
from argparse import Action, ArgumentError
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML comes without types
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from early_fusion_seg.cli.messages import one_sentence
from early_fusion_seg.data import SegmentationDataModule, built_in_datasets
from early_fusion_seg.data.frequencies import Weighting
from early_fusion_seg.errors import UserError

HINTS = (
    "--trainer.NAME sets any argument of Lightning's Trainer, such as --trainer.max_epochs 30 or --trainer.devices 2; "
    "--data.NAME those of the data class, which --data.help CLASS lists."
)


class ShortHelp(DefaultHelpFormatter):
    """Show the options of this project; the trainer's forty are Lightning's to explain."""

    def add_argument(self, action: Action) -> None:
        """Leave out the trainer's options, and what is linked and so cannot be given."""
        linked = any(" --> " in option for option in action.option_strings)
        if not linked and action.dest.split(".")[0] != "trainer":
            super().add_argument(action)


def add_trainer(parser: LightningArgumentParser) -> None:
    """Add Lightning's Trainer."""
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.set_defaults({"trainer.log_every_n_steps": 10})  # small data sets have fewer batches than its 50


def add_data(parser: LightningArgumentParser, default: dict[str, str] | None = None) -> None:
    """Add the data as one argument that is a class.

    As Lightning adds it, it may be None too, and what its constructor says of a wrong value drowns among alternatives.
    """
    built_in_datasets()  # imports them, so that their short names are known
    parser.add_argument(
        "--data",
        type=SegmentationDataModule,
        required=default is None,
        default=default,
        help="the data class",
    )


def add_class_weights(parser: LightningArgumentParser) -> None:
    """Add what `fill_class_weights` takes."""
    parser.add_argument(
        "--class_weights",
        type=Weighting | None,
        help="for fit: weights of the classes in the loss from how often they occur in the training images, by "
        "median-frequency balancing or ENet's 1/ln(1.02 + share); --model.class_weights takes numbers instead",
    )


def fill_class_weights(config: Namespace) -> None:
    """Replace the kind of class weights in a configuration of fit by the numbers for its data.

    Raises:
        UserError: Numbers are given too, or the data cannot be read.
    """
    kind = config["class_weights"]
    if kind is None:
        return
    if config["model"]["class_weights"] is not None:
        raise UserError(f"--class_weights {kind} and --model.class_weights are both given; leave one of them out")
    parser = LightningArgumentParser()  # the model is made with the data, so these come from another instance
    add_data(parser)
    data = parser.instantiate_classes(config)["data"]
    rank_zero_only(data.prepare_data)()
    config["model"]["class_weights"] = data.class_weights(kind)
    config["class_weights"] = None


def parse(parser: LightningArgumentParser, args: Sequence[str]) -> Namespace:
    """Parse a command's arguments, or print what `--help` and `--print_config` ask for and exit.

    Raises:
        UserError: They are wrong; one sentence.
    """
    args = with_recipes(args)
    printing = any(arg.startswith("--print_config") for arg in args)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed) if printing else contextlib.nullcontext():
            return parser.parse_args(args)
    except ArgumentError as error:
        raise UserError(f"{one_sentence(error.message)}; {_hint(parser.prog, error.message)}") from error
    finally:
        print(without_defaults(printed.getvalue(), parser.get_defaults()["trainer"].as_dict()), end="")


def recipe_names() -> dict[str, str]:
    """Return the files of the packaged recipes by name."""
    folder = files("early_fusion_seg") / "recipes"
    return {Path(file.name).stem: str(file) for file in folder.iterdir() if file.name.endswith(".yaml")}


def recipe_path(name: str) -> str:
    """Return the file that `--config NAME` means: an existing file, or else a packaged recipe.

    Raises:
        UserError: Neither exists.
    """
    if Path(name).is_file():
        return name
    recipes = recipe_names()
    if name not in recipes:
        raise UserError(f"--config {name}: there is no such file, and the recipes are {', '.join(sorted(recipes))}")
    return recipes[name]


def with_recipes(args: Sequence[str]) -> list[str]:
    """Replace what follows `-c` and `--config` by the file that it means."""
    resolved = list(args)
    for i, arg in enumerate(args):
        if arg in ("-c", "--config") and i + 1 < len(args):
            resolved[i + 1] = recipe_path(args[i + 1])
        elif arg.startswith("--config="):
            resolved[i] = "--config=" + recipe_path(arg.removeprefix("--config="))
    return resolved


def without_defaults(text: str, trainer: Mapping[str, Any]) -> str:
    """Leave out of a printed configuration what the trainer would do anyway.

    Args:
        text: YAML, or nothing.
        trainer: The trainer's defaults.
    """
    config = yaml.safe_load(text)
    if not isinstance(config, dict) or "trainer" not in config:
        return text
    config["trainer"] = {key: value for key, value in config["trainer"].items() if value != trainer[key]}
    return str(yaml.safe_dump(config, sort_keys=False))


def _hint(prog: str, message: str) -> str:
    """Say where to look: the data class has its own settings."""
    if not re.match(r'Parser key "data|.*required: data', message):
        return f"{prog} --help lists the settings"
    names = sorted(kind.__name__ for kind in built_in_datasets().values())
    return f"the data classes are {', '.join(names)}, and --data.help CLASS lists the settings of one"
