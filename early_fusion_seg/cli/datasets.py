"""The arguments of `doctor`, `evaluate` and `submit`: the name or class of a data set, and its options --data.NAME."""

import argparse
import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser, Namespace

import early_fusion_seg
from early_fusion_seg.cli.arguments import dataset_command_parser, dataset_usage
from early_fusion_seg.cli.messages import one_sentence
from early_fusion_seg.data import SegmentationDataModule, built_in_datasets
from early_fusion_seg.errors import UserError

DataClass = type[SegmentationDataModule]


def datasets() -> dict[str, DataClass]:
    """Return the built-in data sets that are read from files: name -> data module class."""
    return {name: kind for name, kind in built_in_datasets().items() if kind.layouts}


def dataset_parser(command: str, args: Sequence[str]) -> tuple[DataClass, ArgumentParser, list[str]]:
    """Make the parser of a command that reads a data set.

    Args:
        command: Name of the command.
        args: Arguments after the command: the name of a data set or `--data CLASS`, then options.

    Returns:
        The data module class, the parser, and the arguments to parse.

    Raises:
        UserError: The data set or class is unknown.
    """
    kind, rest = _data_class(args, dataset_usage(command))
    parser = dataset_command_parser(command)
    training_options = inspect.signature(SegmentationDataModule.__init__).parameters.keys() - {"self", "root"}
    parser.add_class_arguments(kind, "data", skip=set(training_options))
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
    """Return the name of a built-in data set, or `--data CLASS` for another class."""
    return next((name for name, other in datasets().items() if other is kind), f"--data {_class_path(kind)}")


def _data_class(args: Sequence[str], usage: str) -> tuple[DataClass, list[str]]:
    """Return the data module class named by the arguments, and the other arguments."""
    known = datasets()
    for i, arg in enumerate(args):
        if arg == "--data" and i + 1 < len(args):
            return _import_data_class(args[i + 1]), [*args[:i], *args[i + 2 :]]
        if arg.startswith("--data="):
            return _import_data_class(arg.removeprefix("--data=")), [*args[:i], *args[i + 1 :]]
    name, rest = (args[0], list(args[1:])) if args else ("", [])
    if name not in known:
        raise UserError(f"{usage}: DATASET is {name!r}; expected one of {', '.join(known)}, or --data CLASS")
    return known[name], rest


def _import_data_class(path: str) -> DataClass:
    """Import a data module class by its path, or by its name in this package."""
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module) if module else early_fusion_seg, name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--data {path} cannot be imported ({error}); expected a class such as my_package.MyData"
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, SegmentationDataModule)):
        raise UserError(f"--data {path} is not a subclass of early_fusion_seg.data.SegmentationDataModule")
    return kind


def _class_path(kind: DataClass) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
