"""Options that several commands share, recipes by name, and parsing with short error messages."""

import contextlib
import inspect
import io
import json
import re
from argparse import SUPPRESS, ArgumentError
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML comes without types
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from early_fusion_seg.cli.messages import one_sentence
from early_fusion_seg.data import SegmentationDataModule, built_in_datasets
from early_fusion_seg.data.frequencies import Weighting
from early_fusion_seg.errors import UserError

LOG_STEPS = 10  # the default of log_every_n_steps; epochs that are shorter lower it
HINTS = (
    "--data.NAME sets an option of the data module, such as --data.num_workers 4; --data.help CLASS lists them all. "
    "--trainer.NAME sets an argument of Lightning's Trainer, such as --trainer.precision bf16-mixed or "
    "--trainer.devices 2."
)


def add_trainer(parser: LightningArgumentParser) -> None:
    """Add the arguments of Lightning's Trainer."""
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.set_defaults(
        {
            "trainer.log_every_n_steps": LOG_STEPS,
            "trainer.enable_model_summary": False,  # Lightning's table calls the frozen encoder a module of 0 FLOPs
        }
    )


def add_data(parser: LightningArgumentParser, default: dict[str, str] | None = None) -> None:
    """Add `--data`, the class of the data module.

    Lightning's own argument allows None too, and hides the constructor's error message among those of alternatives.
    """
    built_in_datasets()  # imports them, so that jsonargparse knows their short names
    parser.add_argument(
        "--data",
        type=SegmentationDataModule,
        required=default is None,
        default=default,
        help="data module: one of those below, or your own, such as my_package.MyDataModule",
    )


def add_training_options(parser: LightningArgumentParser, hidden: bool = False) -> None:
    """Add the options that act only in training.

    Args:
        parser: The parser.
        hidden: Leave them out of the help.
    """
    options: dict[str, tuple[Any, Any, str]] = {  # name -> (type, default, help)
        "save_every_n_steps": (
            PositiveInt,
            200,
            "save last.ckpt every N optimizer steps and at the end of each epoch",
        ),
        "ema_decay": (
            float | None,
            None,
            "validate and save an exponential moving average (EMA) of the head's weights, with this decay per step, "
            "such as 0.999; default: no average",
        ),
        "class_weights": (
            Weighting | None,
            None,
            "compute the class weights of the loss from the class frequencies of the training images: median "
            "(median-frequency balancing) or inverse-log (ENet's 1/ln(1.02 + frequency)); default: none. "
            "--model.class_weights sets numbers instead",
        ),
    }
    for name, (kind, default, text) in options.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=SUPPRESS if hidden else text)


def fill_class_weights(config: Namespace) -> None:
    """Replace `class_weights` in a configuration by the numbers for its data, in `model.class_weights`.

    Raises:
        UserError: Both are given, or the data cannot be read.
    """
    kind = config["class_weights"]
    if kind is None:
        return
    if config["model"]["class_weights"] is not None:
        raise UserError(f"--class_weights {kind} and --model.class_weights are both given; leave one of them out")
    parser = LightningArgumentParser()  # for another data module: the one of the run is made with the model
    add_data(parser)
    data = parser.instantiate_classes(config)["data"]
    data.prepare_in_turn()
    config["model"]["class_weights"] = data.class_weights(kind)
    config["class_weights"] = None


def parse(parser: LightningArgumentParser, args: Sequence[str]) -> Namespace:
    """Parse the arguments of a command; `--help` and `--print_config` print their text and exit.

    Raises:
        UserError: An argument is wrong; the message is one sentence.
    """
    args = with_plain_strings(with_recipes(args))
    printing = any(arg.startswith("--print_config") for arg in args)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed) if printing else contextlib.nullcontext():
            return parser.parse_args(args)
    except ArgumentError as error:
        nearest = _nearest_option(error.message, list(parser.get_defaults().keys()))
        raise UserError(f"{one_sentence(error.message)}; {nearest}{_hint(parser.prog, error.message)}") from error
    finally:
        print(without_defaults(printed.getvalue(), parser.get_defaults()["trainer"].as_dict()), end="")


def recipe_names() -> dict[str, str]:
    """Return the packaged recipes: name -> file."""
    folder = files("early_fusion_seg") / "recipes"
    return {Path(file.name).stem: str(file) for file in folder.iterdir() if file.name.endswith(".yaml")}


def recipe_path(name: str) -> str:
    """Return the file for `--config NAME`: an existing file of that name, or else a packaged recipe.

    Raises:
        UserError: There is neither.
    """
    if Path(name).is_file():
        return name
    recipes = recipe_names()
    if name not in recipes:
        raise UserError(f"--config {name}: no such file or recipe; the recipes are {', '.join(sorted(recipes))}")
    return recipes[name]


def with_recipes(args: Sequence[str]) -> list[str]:
    """Replace the names of recipes after `-c` and `--config` by their files."""
    resolved = list(args)
    for i, arg in enumerate(args):
        if arg in ("-c", "--config") and i + 1 < len(args):
            resolved[i + 1] = recipe_path(args[i + 1])
        elif arg.startswith("--config="):
            resolved[i] = "--config=" + recipe_path(arg.removeprefix("--config="))
    return resolved


def with_plain_strings(args: Sequence[str]) -> list[str]:
    """Keep paths that look like YAML, such as a folder called `null` or `a: b`, from being read as YAML.

    The parser reads `--data.NAME VALUE` as YAML before it knows the type of the option. As part of a configuration,
    the value is a string until the type is known.
    """
    words = iter(args)
    plain: list[str] = []
    for word in words:
        name, equals, after = word.partition("=")
        data = re.fullmatch(r"--data\.(?:init_args\.)?(\w+)", name)
        if not (data or name in ("--output", "--ckpt_path")) or word == "--data.help":
            plain.append(word)
            continue
        value = after if equals else next(words, None)  # None: the value is missing
        if value is None or _is_yaml_string(value) or (name == "--ckpt_path" and _is_yaml_list(value)):
            plain += [word] if equals or value is None else [word, value]
        elif data:
            plain += ["--config", json.dumps({"data": {"init_args": {data[1]: value}}})]
        else:
            plain += [name, f"./{value}" if value != "~" else str(Path.home())]
    return plain


def _is_yaml_string(value: str) -> bool:
    """Return whether the parser reads a value as a string; unlike PyYAML it reads 1e3 as a number."""
    with contextlib.suppress(ValueError):  # not a number
        float(value)
        return False
    try:
        return isinstance(yaml.safe_load(value), str)
    except yaml.YAMLError:
        return True


def _is_yaml_list(value: str) -> bool:
    """Return whether a value is a list of several checkpoints; a file may have such a name too."""
    with contextlib.suppress(yaml.YAMLError):
        return isinstance(yaml.safe_load(value), list) and not Path(value).is_file()
    return False


def without_defaults(text: str, trainer: Mapping[str, Any]) -> str:
    """Remove the trainer's arguments that have their default value from a printed configuration.

    Args:
        text: YAML, or an empty string.
        trainer: The trainer's defaults.
    """
    config = yaml.safe_load(text)
    if not isinstance(config, dict) or "trainer" not in config:
        return text
    config["trainer"] = {key: value for key, value in config["trainer"].items() if value != trainer[key]}
    return str(yaml.safe_dump(config, sort_keys=False))


def _nearest_option(message: str, options: list[str]) -> str:
    """Return "did you mean X? " for an unknown option that is close to one of the parser or of a data module."""
    found = re.search(
        r"unrecognized arguments: --([\w.]+)|Group '(\w+)' does not accept option '(\w+)'|"
        r"Option '(\w+)' is not accepted",
        message,
    )
    if found is None:
        return ""
    option, group, in_group, of_data = found.groups()
    if of_data is not None:
        kinds = [kind for kind in built_in_datasets().values() if f"{kind.__name__}'" in message]
        parameters = set(inspect.signature(SegmentationDataModule).parameters)
        parameters.update(*(inspect.signature(kind).parameters for kind in kinds))
        option, options = f"data.{of_data}", [f"data.{name}" for name in sorted(parameters)]
    elif group is not None:
        option = f"{group}.{in_group}"
    return "".join(f"did you mean --{name}? " for name in get_close_matches(option, options, 1))


def _hint(prog: str, message: str) -> str:
    """Return which help lists the options: that of the command, or that of the data module."""
    if not re.match(r'Parser key "data|.*required: data', message):
        return f"{prog} --help lists the options"
    names = sorted(kind.__name__ for kind in built_in_datasets().values())
    return f"the data modules are {', '.join(names)}, and --data.help CLASS lists the options of one"
