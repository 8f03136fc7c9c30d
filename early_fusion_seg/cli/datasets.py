"""What `doctor`, `evaluate` and `submit` share: the data set's name or class, and its arguments as --data.NAME."""

import argparse
import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser, Namespace

import early_fusion_seg
from early_fusion_seg.cli.messages import one_sentence
from early_fusion_seg.data import SegmentationDataModule, built_in_datasets
from early_fusion_seg.errors import UserError

DataClass = type[SegmentationDataModule]


def datasets() -> dict[str, DataClass]:
    """Return the built-in data sets that are read from files, by name."""
    return {name: kind for name, kind in built_in_datasets().items() if kind.layouts}


def dataset_parser(command: str, description: str, args: Sequence[str]) -> tuple[DataClass, ArgumentParser, list[str]]:
    """Make the parser of a command on a data set.

    Args:
        command: Name of the command.
        description: What it does, for `--help`.
        args: What follows the command: the name of a data set or `--data CLASS`, then options.

    Returns:
        The data module class, a parser to which the command adds its own arguments, and the arguments to parse.

    Raises:
        UserError: There is no such data set.
    """
    names = ", ".join(datasets())
    usage = f"early-fusion-seg {command} DATASET --data.root ROOT [options]"
    kind, rest = _data_class(args, usage)
    parser = ArgumentParser(
        prog=f"early-fusion-seg {command}",
        usage=usage,
        description=f"{description} DATASET is one of {names}; or give --data CLASS instead, such as "
        "--data my_package.MyDataModule. Each has options of its own.",
        exit_on_error=False,
        default_env=False,
    )
    of_training = inspect.signature(SegmentationDataModule.__init__).parameters.keys() - {"self", "root"}
    parser.add_class_arguments(kind, "data", skip=set(of_training))
    return kind, parser, rest


def parse(kind: DataClass, parser: ArgumentParser, args: list[str]) -> tuple[SegmentationDataModule, Namespace]:
    """Parse the arguments and make the data module.

    Raises:
        UserError: An argument is wrong.
    """
    try:
        options: Any = parser.parse_args(args)
    except argparse.ArgumentError as error:
        hint = f"{parser.prog} {dataset_name(kind)} --help lists the options"
        raise UserError(f"{one_sentence(error.message)}; {hint}") from error
    data = kind(**options.data.as_dict())
    data.prepare_data()
    return data, options


def dataset_name(kind: DataClass) -> str:
    """Return the name of a built-in data set, or the option that gives another class."""
    return next((name for name, other in datasets().items() if other is kind), f"--data {_path(kind)}")


def _data_class(args: Sequence[str], usage: str) -> tuple[DataClass, list[str]]:
    """Return the data module class that the arguments name, and the other arguments."""
    known = datasets()
    for i, arg in enumerate(args):
        if arg == "--data" and i + 1 < len(args):
            return _imported(args[i + 1]), [*args[:i], *args[i + 2 :]]
        if arg.startswith("--data="):
            return _imported(arg.removeprefix("--data=")), [*args[:i], *args[i + 1 :]]
    name, rest = (args[0], list(args[1:])) if args else ("", [])
    if name in ("-h", "--help"):
        name, rest = "folder", ["--help"]
    if name not in known:
        raise UserError(f"{usage}: DATASET is {name!r}; expected one of {', '.join(known)}, or --data CLASS")
    return known[name], rest


def _imported(path: str) -> DataClass:
    """Import a data module class by its path, or by its name in this package."""
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module) if module else early_fusion_seg, name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--data {path}: there is no such class ({error})") from None
    if not (isinstance(kind, type) and issubclass(kind, SegmentationDataModule)):
        raise UserError(f"--data {path} is no subclass of early_fusion_seg.data.SegmentationDataModule")
    return kind


def _path(kind: DataClass) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
