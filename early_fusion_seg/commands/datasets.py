"""What the commands on a data set share: its name, and the arguments of its data module as --data.NAME."""

import argparse
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from early_fusion_seg.commands.wording import one_sentence
from early_fusion_seg.data import (
    CamVidDataModule,
    CityscapesDataModule,
    COCODataModule,
    FolderDataModule,
    MapillaryVistasDataModule,
    SegmentationDataModule,
    VOCDataModule,
)
from early_fusion_seg.errors import UserError

DATASETS: dict[str, type[SegmentationDataModule]] = {
    "camvid": CamVidDataModule,
    "cityscapes": CityscapesDataModule,
    "coco": COCODataModule,
    "folder": FolderDataModule,
    "mapillary": MapillaryVistasDataModule,
    "voc": VOCDataModule,
}
LOADING = {  # what matters to training alone
    "batch_size",
    "eval_batch_size",
    "num_workers",
    "crop_size",
    "scale",
    "random_scale",
    "short_side",
    "rare_class_share",
    "train_transform",
    "eval_transform",
}


def dataset_parser(command: str, description: str, args: list[str]) -> tuple[str, ArgumentParser]:
    """Make the parser of a command on a data set, with the data set's own arguments.

    Args:
        command: Name of the command.
        description: What it does, for `--help`.
        args: What follows the command; the first is the data set's name.

    Returns:
        The name, and a parser to which the command adds its own arguments.

    Raises:
        UserError: There is no such data set.
    """
    usage = f"early-fusion-seg {command} DATASET --data.root ROOT [options]"
    name = args[0] if args else ""
    if name in ("-h", "--help"):
        name = "folder"
    if name not in DATASETS:
        raise UserError(f"{usage}: DATASET is {name!r}; expected one of {', '.join(DATASETS)}")
    parser = ArgumentParser(
        prog=f"early-fusion-seg {command}",
        usage=usage,
        description=f"{description} DATASET is one of {', '.join(DATASETS)}; each has options of its own.",
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("dataset", metavar="DATASET", choices=list(DATASETS))
    parser.add_class_arguments(DATASETS[name], "data", skip=LOADING)
    return name, parser


def parse(parser: ArgumentParser, args: list[str]) -> tuple[SegmentationDataModule, Namespace]:
    """Parse, and make the data module.

    Raises:
        UserError: An argument is wrong.
    """
    try:
        options: Any = parser.parse_args(args)
    except argparse.ArgumentError as error:
        hint = f"{parser.prog} {args[0]} --help lists the options"
        raise UserError(f"{one_sentence(error.message)}; {hint}") from error
    data = DATASETS[options.dataset](**options.data.as_dict())
    data.prepare_data()
    return data, options
