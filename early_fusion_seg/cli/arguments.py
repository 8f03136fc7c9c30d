"""Arguments of the commands that do not use Lightning's Trainer. PyTorch is not imported here, so `--help` is fast."""

import argparse
import re
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

from jsonargparse import ArgumentParser

from early_fusion_seg.cli import example
from early_fusion_seg.cli.short_help import ShortHelp

Split = Literal["train", "val", "test"]
Ids = Literal["auto", "raw", "train"]
SAMPLE = 20  # images that doctor reads per split without --full
SCENES = 800  # training scenes of the demo
ENCODER_WEIGHTS = "hub, bundled, or the new place of an encoder weights file that has moved; default: as in training"
IN_MEMORY = "synthetic"  # the data set that has no files


class DatasetCommand(NamedTuple):
    """A command that reads a data set.

    Attributes:
        description: What it does.
        add_arguments: Adds its own arguments, next to the options of the data module.
    """

    description: str
    add_arguments: Callable[[ArgumentParser], None]


def dataset_names() -> list[str]:
    """Return the names of the built-in data sets that are read from files, without importing them."""
    stub = files("early_fusion_seg").joinpath("__init__.pyi").read_text(encoding="utf-8")
    return sorted(set(re.findall(r"from \.data\.(\w+) import", stub)) - {IN_MEMORY})


def dataset_command_parser(command: str) -> ArgumentParser:
    """Make the parser of a command that reads a data set, without the options of the data module."""
    usage = dataset_usage(command)
    description, add_arguments = DATASET_COMMANDS[command]
    parser = ArgumentParser(
        prog=f"early-fusion-seg {command}",
        usage=f"{usage}\nexample: {example(command)}",
        description=f"{description} DATASET is one of {', '.join(dataset_names())}; `{command} voc --help` lists the "
        "--data options of VOC. For a data module of your own, give --data CLASS instead, such as --data "
        "my_package.MyDataModule.",
        formatter_class=ShortHelp,
        exit_on_error=False,
        default_env=False,
    )
    add_arguments(parser)
    return parser


def dataset_usage(command: str) -> str:
    """Return the usage of a command that reads a data set."""
    return f"early-fusion-seg {command} DATASET --data.root ROOT [options]"


def help_text(command: str) -> str | None:
    """Return the text of `COMMAND --help`, or None for a command whose arguments are not in this file."""
    if command == "demo":
        return demo_parser().format_help()
    if command == "fake-data":
        return fake_data_parser().format_help()
    if command == "export":
        return export_parser().format_help()
    if command not in DATASET_COMMANDS:
        return None
    parser = dataset_command_parser(command)
    parser.add_argument("--data.root", type=str, required=True, help="folder of the data set")
    return str(parser.format_help())


def demo_parser() -> argparse.ArgumentParser:
    """Make the parser of `demo`."""
    parser = argparse.ArgumentParser(
        "early-fusion-seg demo",
        usage=f"%(prog)s [options]\nexample: {example('demo')} --epochs 2",
        description="Train on synthetic street scenes, test on others, and draw panels. Nothing is downloaded.",
        formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=30),
    )
    parser.add_argument("--output", default="runs/demo", help="folder for the results; earlier results are replaced")
    parser.add_argument("--seed", type=int, default=0, help="random seed of scenes and training, 0 or more")
    parser.add_argument("--epochs", type=int, default=6, help="training epochs")
    parser.add_argument("--scenes", type=int, default=SCENES, help="number of training scenes")
    return parser


def fake_data_parser() -> argparse.ArgumentParser:
    """Make the parser of `fake-data`."""
    parser = argparse.ArgumentParser(
        "early-fusion-seg fake-data",
        usage=f"%(prog)s KIND ROOT [options]\nexample: {example('fake-data')}",
        description="Write a tiny synthetic copy of a data set in its official layout, to try commands without data.",
    )
    kinds = f"{', '.join(dataset_names())}, or one of their other layouts, such as coco-panoptic"
    parser.add_argument("kind", metavar="KIND", help=kinds)
    parser.add_argument("root", type=Path, metavar="ROOT", help="new or empty folder to write to")
    parser.add_argument("--images", type=int, default=8, help="images in each split (default: %(default)s)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        default=(128, 256),
        help="height and width of the images in pixels (default: 128 256)",
    )
    return parser


def export_parser() -> argparse.ArgumentParser:
    """Make the parser of `export`."""
    parser = argparse.ArgumentParser(
        "early-fusion-seg export",
        usage=f"%(prog)s --ckpt_path FILE [options]\nexample: {example('export')}",
        description="Write a trained model as one file that takes images of any size and needs none of this package; "
        "then compare the file with the model on images of many sizes.",
    )
    parser.add_argument(
        "--ckpt_path", required=True, help="checkpoint of a trained model; best or last: that of the newest run"
    )
    parser.add_argument(
        "--format",
        choices=("onnx", "pt2"),
        default="onnx",
        help="onnx: for onnxruntime and others; pt2: torch.export's format, for PyTorch (default: %(default)s)",
    )
    parser.add_argument("--output", help="folder for the file; default: runs/export/version_N with the next free N")
    parser.add_argument("--scores", action="store_true", help="add the output `probabilities`, of all classes")
    parser.add_argument(
        "--scale", type=float, help="resize factor for images before the network; default: that of training"
    )
    parser.add_argument(
        "--results", type=Path, help="results.json whose score the file holds; default: that in the run's folder"
    )
    parser.add_argument(
        "--encoder_weights",
        help="hub, bundled, or the new place of an encoder weights file that has moved; default: as in training",
    )
    return parser


def _add_doctor(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--full",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help=f"read all files instead of a sample of {SAMPLE} images per split; also prints class weights",
    )


def _add_evaluate(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--predictions", type=str, required=True, help="folder of PNGs, named IMAGE.png or IMAGE_ANYTHING.png"
    )
    parser.add_argument(
        "--split",
        type=Split,
        default="val",
        help="split to score",
    )
    parser.add_argument(
        "--ids",
        type=Ids,
        default="auto",
        help="class ids in the PNGs; raw: those of the data set's masks, which test servers take; train: those that "
        "predict writes; auto: train for what predict wrote, else raw",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        help="folder for results.json, or a file of another name that ends with .json; default: none is written",
    )


def _add_calibrate(parser: ArgumentParser) -> None:
    parser.add_argument("--ckpt_path", type=str, required=True, help="checkpoint to calibrate, changed in place")
    parser.add_argument("--encoder_weights", type=str | None, help=ENCODER_WEIGHTS)
    parser.add_argument(
        "--output",
        type=str | None,
        help="folder for calibration.json; default: runs/calibrate/version_N with the next free N",
    )


def _add_submit(parser: ArgumentParser) -> None:
    parser.add_argument("--ckpt_path", type=str | None, help="checkpoint of the model to submit")
    parser.add_argument("--encoder_weights", type=str | None, help=ENCODER_WEIGHTS)
    parser.add_argument("--output", type=str | None, help="folder for the PNGs and the archive; a rerun keeps its PNGs")
    parser.add_argument("--check", type=str | None, help="check this folder or archive instead; needs no checkpoint")
    parser.add_argument("--split", type=Split, default="test", help="split to segment or check")


DATASET_COMMANDS = {
    "calibrate": DatasetCommand(
        "Fit the temperature that makes class probabilities agree with accuracy: on every second image of val, with "
        "scores of the others. The labels stay the same.",
        _add_calibrate,
    ),
    "doctor": DatasetCommand("Check the files of a data set and print how to fix them.", _add_doctor),
    "evaluate": DatasetCommand(
        "Score a folder of predictions (PNGs) by the rules of the official evaluator.", _add_evaluate
    ),
    "submit": DatasetCommand(
        "Write the upload for the benchmark's test server, or check it. Images pass the network as in predict, with "
        "its options --inference.NAME.",
        _add_submit,
    ),
}
