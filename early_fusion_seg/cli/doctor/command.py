"""The command `doctor`: read the files of a data set, report what is right and wrong, and how to fix it."""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

import numpy as np
import rich
from rich.progress import track
from rich.table import Table

from early_fusion_seg.cli.datasets import dataset_parser, parse
from early_fusion_seg.cli.doctor.advice import how_to_fix, masks_without_images
from early_fusion_seg.cli.doctor.layouts import known_layouts, offers
from early_fusion_seg.cli.messages import say
from early_fusion_seg.data import FileSource, Item, SegmentationDataModule, Split
from early_fusion_seg.data.frequencies import Weighting
from early_fusion_seg.data.listing import File
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.images import read_image, size_text
from early_fusion_seg.labels import LabelSet, in_ranges

SAMPLE = 20  # images of each split that are read without --full
SHOWN = 10  # troubles of a split that are printed
NAMED = 5  # classes that are named where many are absent
SPLITS: tuple[Split, ...] = ("train", "val", "test")
EXPECTED = " Expected there:"  # ends the first line of an error that shows a tree


class Trouble(NamedTuple):
    """What is wrong with a file."""

    text: str
    file: File


@dataclass
class Findings:
    """What was found in images of one split.

    Attributes:
        images: Images in the split.
        read: How many of them were read.
        troubles: What is wrong, by file.
        sizes: (height, width) -> images.
        raw_ids: Raw id -> pixels.
    """

    images: int
    read: int = 0
    troubles: list[Trouble] = field(default_factory=list)
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
    description = "Check a data set and explain how to fix it; `doctor voc --help` shows the options of VOC."
    kind, parser, rest = dataset_parser("doctor", description, args)
    parser.add_argument(
        "--full",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="read every file, not only a sample of 20 of each split, with all cores",
    )
    data, options = parse(kind, parser, rest)
    sources, errors = open_splits(data)
    if not data.root.is_dir():
        _, _, tree = errors["train"].partition("\n")
        say(f"{data.root} is not a folder; --data.root names the folder of the data.{EXPECTED}\n{tree}")
        return 1
    say(f"{data.root}: {', '.join(layout.name for layout in known_layouts(data.root, kind)) or 'no known layout'}")
    complain(errors)
    listed = not errors.keys() & {"train", "val"}
    usable = listed
    for split, source in sources.items():
        found = examine(data, source, len(source) if options.full else SAMPLE, split)
        good = show(data, split, source, found, options.full)
        usable &= good or split == "test"
    if not listed:
        for line in offers(kind, options.data.as_dict(), data.root):
            say(line)
    say("usable: fit can start" if usable else "not usable as it is")
    return 0 if usable else 1


def open_splits(data: SegmentationDataModule) -> tuple[dict[Split, FileSource], dict[Split, str]]:
    """List the images of every split, or what stands against that."""
    sources: dict[Split, FileSource] = {}
    errors: dict[Split, str] = {}
    for split in SPLITS:
        try:
            source = data.source(split)
        except UserError as error:
            errors[split] = str(error)
        else:
            assert isinstance(source, FileSource)  # all of these read files
            sources[split] = source
    return sources, errors


def complain(errors: dict[Split, str]) -> None:
    """Print what stands against the splits: a tree once, and once what only differs in the name of the split."""
    alike: dict[str, list[Split]] = {}
    for split, text in errors.items():
        alike.setdefault(re.sub(r"(train|val|test)(ing|idation)?", "", text), []).append(split)
    shown = ""
    for splits in alike.values():
        first, _, rest = errors[splits[0]].partition("\n")
        short = first.removesuffix(EXPECTED).rstrip(".")
        if splits == ["test"]:
            say(f"test: {short}; fit needs none")
        else:
            say(f"{splits[0]}: {short if rest in ('', shown) else errors[splits[0]]}")
            shown = rest or shown
        if splits[1:]:
            say(f"{' and '.join(splits[1:])}: likewise")


def examine(data: SegmentationDataModule, source: FileSource, count: int, split: str) -> Findings:
    """Read images and labels, evenly spread over a split, with all cores.

    Args:
        data: The data set.
        source: The split.
        count: Images to read.
        split: Its name, for the progress bar.
    """
    found = Findings(len(source))
    step = max(1, len(source) // max(1, count))
    positions = range(0, len(source), step)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding runs outside of Python's lock
        pairs = pool.map(lambda i: examine_one(data, source, i), positions)
        results = track(pairs, split, len(positions), console=rich.get_console(), transient=True)
        for troubles, size, raw_ids in results:
            found.read += 1
            found.troubles += troubles
            if size is not None:
                found.sizes[size] += 1
            found.raw_ids.update(raw_ids)
    return found


def examine_one(
    data: SegmentationDataModule, source: FileSource, index: int
) -> tuple[list[Trouble], tuple[int, int] | None, dict[int, int]]:
    """Read one image: what is wrong with it, its size, and the pixels of each raw id."""
    item = source.items[index]
    try:
        image = read_image(item.image)
    except UserError as error:
        return [Trouble(str(error), item.image)], None, {}
    size = (image.shape[0], image.shape[1])
    if item.mask is None or source.label_set is None:
        return [], size, {}
    texts, raw_ids = [], {}
    try:
        raw = source.read_raw(item.mask)
        ids, counts = np.unique(raw, return_counts=True)
        raw_ids = dict(zip(ids.tolist(), counts.tolist(), strict=True))
        if raw.shape != size:
            texts.append(f"{item.mask} is {size_text(raw)} pixels (width x height) and its image {size_text(image)}")
        if (problem := data.diagnose_mask(raw_ids, item.mask)) is not None:
            texts.append(problem)
        source.label_set.encode(raw, str(item.mask))
    except UserError as error:
        texts.append(str(error))
    return [Trouble(text, item.mask) for text in texts], size, raw_ids


def show(data: SegmentationDataModule, split: Split, source: FileSource, found: Findings, full: bool) -> bool:
    """Print what was found in a split, and return whether it can be used."""
    published = data.published_sizes.get(split)
    expected = "" if published in (None, found.images) else f", where {published} are published"
    labeled = "labeled" if source.labeled else "without labels"
    sizes = ", ".join(f"{w}x{h} ({n})" for (h, w), n in found.sizes.most_common(3))
    more = f" and {len(found.sizes) - 3} other sizes" if len(found.sizes) > 3 else ""
    say(f"{split}: {found.images} images{expected}, {labeled}; {found.read} read" + (sizes and f": {sizes}{more}"))
    wrong = faults(data, split, source, found)
    for line in [*wrong, *incomplete(data, split, source.items, source.label_set)]:
        say(f"  {line}")
    if source.label_set is not None and split == "train" and found.raw_ids:
        weights = class_weights(data) if full and not wrong else {}
        table, absent = frequencies(source.label_set, found.raw_ids, weights)
        if absent and not wrong and found.read == found.images:
            rest = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
            say(f"  classes without a pixel: {', '.join(absent[:NAMED])}{rest}")
        said = f"; weights of fit's --class_weights {' or '.join(weights)}" if weights else ""
        say(f"what train would learn from, % of all pixels read{said}")
        rich.get_console().print(table)
    return not wrong


def faults(data: SegmentationDataModule, split: Split, source: FileSource, found: Findings) -> list[str]:
    """Return what makes a split unusable, and how to fix it."""
    if not source.items:
        return [f"no images; {data.fix_for_no_images}"]
    lines = [trouble.text for trouble in found.troubles[:SHOWN]]
    if len(found.troubles) > SHOWN:
        lines.append(f"and {len(found.troubles) - SHOWN} more")
    if found.troubles:
        lines.append(f"to fix: {how_to_fix(data, split, [trouble.file for trouble in found.troubles])}")
    mask = source.items[0].mask
    if source.label_set is None or mask is None or not found.raw_ids:
        return lines
    fix = how_to_fix(data, split, [mask])
    if diagnosis := data.diagnose_raw_ids(found.raw_ids, fix):
        lines.append(diagnosis)
    elif not source.label_set.has_class(found.raw_ids):
        ids = in_ranges(found.raw_ids)
        lines.append(f"no pixel read has a class (the labels found are {ids}): nothing to learn or to score; {fix}")
    return lines


def incomplete(data: SegmentationDataModule, split: Split, items: list[Item], labels: LabelSet | None) -> list[str]:
    """Return what a split lacks, perhaps on purpose."""
    some = items[:: max(1, len(items) // SAMPLE)]
    images = [item.image for item in some]
    if labels is not None and (alone := masks_without_images(data, items)):
        again = how_to_fix(data, split, images)
        return [f"incomplete: {len(alone)} mask(s) have no image, such as {alone[0]}: {again}"]
    if 0 < len(items) < data.published_sizes.get(split, 0):
        again = how_to_fix(data, split, [*images, *(item.mask for item in some if item.mask is not None)])
        return [f"incomplete, unless a part is meant: {again}"]
    return []


def class_weights(data: SegmentationDataModule) -> dict[str, list[float]]:
    """Return both kinds of class weights; this leaves the index of the classes in the cache."""
    return {kind: data.class_weights(kind) for kind in get_args(Weighting)}


def frequencies(labels: LabelSet, raw_ids: Counter[int], weights: dict[str, list[float]]) -> tuple[Table, list[str]]:
    """Return a table of the classes, with raw ids found and shares of all pixels read, and the classes without any.

    Args:
        labels: The classes.
        raw_ids: Raw id -> pixels.
        weights: Heading of a column -> a weight for each class.
    """
    to_train = dict(labels.raw_to_train)
    ids: dict[int, dict[int, int]] = {}  # train id -> raw id -> pixels
    for raw_id, count in sorted(raw_ids.items()):
        ids.setdefault(to_train.get(raw_id, -1), {})[raw_id] = count
    total = raw_ids.total()
    table = Table("class", "raw ids found")
    for heading in ("%", *weights):
        table.add_column(heading, justify="right")
    for train_id, name in [*enumerate(labels.class_names), (labels.ignore_index, "ignored"), (-1, "unknown")]:
        found = ids.get(train_id, {})
        if 0 <= train_id < labels.num_classes or found:
            many = len(found) > 1
            shown = [f"{raw_id} ({100 * n / total:.2f})" if many else f"{raw_id}" for raw_id, n in found.items()]
            share = f"{100 * sum(found.values()) / total:.2f}"
            more = (
                [f"{column[train_id]:.2f}" for column in weights.values()] if 0 <= train_id < labels.num_classes else []
            )
            table.add_row(name, ", ".join(shown) or "none", share, *more)
    return table, [name for train_id, name in enumerate(labels.class_names) if train_id not in ids]
