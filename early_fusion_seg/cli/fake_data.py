"""`early-fusion-seg fake-data KIND ROOT`: write a tiny synthetic copy of a data set in its official layout."""

import argparse
import shlex
from pathlib import Path

from early_fusion_seg.cli import example
from early_fusion_seg.cli.datasets import datasets
from early_fusion_seg.cli.parsing import recipe_names
from early_fusion_seg.data import Replica
from early_fusion_seg.errors import UserError


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: Command line arguments after `fake-data`.

    Returns:
        0.

    Raises:
        UserError: ROOT is not empty, or a number is out of range.
    """
    kinds = replicas()
    parser = argparse.ArgumentParser(
        "early-fusion-seg fake-data",
        usage=f"%(prog)s KIND ROOT [options]\nexample: {example('fake-data')}",
        description="Write a tiny synthetic copy of a data set in its official layout, to try commands without data.",
    )
    parser.add_argument("kind", choices=sorted(kinds), metavar="KIND", help=f"one of {', '.join(sorted(kinds))}")
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
    options = parser.parse_args(args)
    if options.images < 1 or min(options.size) < 8:
        raise UserError(
            f"--images is {options.images} and --size {options.size}; expected at least 1 and at least 8 pixels"
        )
    if options.root.exists() and (not options.root.is_dir() or any(options.root.iterdir())):
        raise UserError(f"{options.root} already exists; give a new folder")
    replica, use = kinds[options.kind]
    replica.write(options.root, images=options.images, size=tuple(options.size))
    print(
        f"written: {options.root} (synthetic data). Try it:\n  early-fusion-seg fit {use} --data.root "
        f"{shlex.quote(str(options.root))} "
        "--data.crop_size 64 --trainer.fast_dev_run true --model.encoder_weights random"
    )
    return 0


def replicas() -> dict[str, tuple[Replica, str]]:
    """Return the fake replicas: kind, such as "coco-panoptic" -> (replica, options of `fit` that read it)."""
    found: dict[str, tuple[Replica, str]] = {}
    for name, data in datasets().items():
        recipe = f"--config {name}" if name in recipe_names() else f"--data {data.__name__}"
        for layout, replica in data.replicas().items():
            found[f"{name}-{layout}" if layout else name] = replica, f"{recipe} {replica.options}".strip()
    return found
