"""`early-fusion-seg fake-data KIND ROOT`: a tiny replica of a data set in its official layout, to try a recipe with."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from early_fusion_seg.data import fake, fake_benchmarks
from early_fusion_seg.errors import UserError

Writer = Callable[..., Path]

KINDS: dict[str, tuple[Writer, str]] = {  # and how to use what is written
    "camvid": (fake.fake_camvid_segnet, "--config camvid"),
    "camvid-original": (fake.fake_camvid_original, "--config camvid"),
    "cityscapes": (fake_benchmarks.fake_cityscapes, "--config cityscapes"),
    "cityscapes-zip": (partial(fake_benchmarks.fake_cityscapes, zipped=True), "--config cityscapes"),
    "coco": (fake_benchmarks.fake_coco_stuff, "--config coco"),
    "coco-panoptic": (fake_benchmarks.fake_coco_panoptic, "--config coco --data.labels panoptic"),
    "coco-stuff10k": (fake_benchmarks.fake_coco_stuff10k, "--config coco --data.labels stuff10k"),
    "folder": (fake.fake_folder, "--data FolderDataModule"),
    "mapillary": (fake_benchmarks.fake_mapillary, "--config mapillary"),
    "mapillary-v1.1": (partial(fake_benchmarks.fake_mapillary, version="v1.1"), "--config mapillary"),
    "voc": (fake_benchmarks.fake_voc, "--config voc"),
    "voc-aug": (partial(fake_benchmarks.fake_voc, extra="aug"), "--config voc"),
    "voc-aug-only": (partial(fake_benchmarks.fake_voc, extra="aug_only"), "--config voc"),
}


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: What follows `fake-data` on the command line.

    Returns:
        0.

    Raises:
        UserError: There is something at ROOT already, or a number is out of range.
    """
    parser = argparse.ArgumentParser(
        "early-fusion-seg fake-data", description="Write a tiny synthetic replica of a data set in its official layout."
    )
    parser.add_argument("kind", choices=sorted(KINDS), metavar="KIND", help=", ".join(sorted(KINDS)))
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder to write to; must not exist, or be empty")
    parser.add_argument("--images", type=int, default=8, help="images in each split (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), default=(128, 256), help="of each image, pixels"
    )
    options = parser.parse_args(args)
    if options.images < 1 or min(options.size) < 8:
        raise UserError(f"--images is {options.images} and --size {options.size}; expected at least 1, and 8 pixels")
    if options.root.exists() and (not options.root.is_dir() or any(options.root.iterdir())):
        raise UserError(f"{options.root} is there already; name a new folder")
    write, use = KINDS[options.kind]
    write(options.root, images=options.images, size=tuple(options.size))
    print(
        f"written: {options.root}, synthetic. Try\n  early-fusion-seg fit {use} --data.root {options.root} "
        "--data.crop_size 64 --trainer.fast_dev_run true --model.encoder_weights random"
    )
    return 0
