"""The command `doctor`: read the files of a data set, and print what was found, the problems, and how to fix them."""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, get_args

import numpy as np
import rich
from rich.progress import track
from rich.table import Table

from early_fusion_seg.cli.arguments import SAMPLE
from early_fusion_seg.cli.datasets import dataset_parser, parse
from early_fusion_seg.cli.doctor.advice import how_to_fix, masks_without_images
from early_fusion_seg.cli.doctor.layouts import known_layouts, suggestions
from early_fusion_seg.cli.messages import echo
from early_fusion_seg.data import FileSource, Item, SegmentationDataModule, Split
from early_fusion_seg.data.frequencies import Weighting
from early_fusion_seg.data.listing import File
from early_fusion_seg.data.mask_check import absent_classes, describe_absent, unknown_labels, what_masks_hold
from early_fusion_seg.errors import MissingFileError, UserError, first_five
from early_fusion_seg.io.images import read_image, size_text
from early_fusion_seg.io.terminal import plain
from early_fusion_seg.labels import LabelSet

SHOWN = 10  # problems printed per split
SPLITS: tuple[Split, ...] = ("train", "val", "test")
EXPECTED = " Expected there:"  # end of the first line of an error that shows a tree of files


class Problem(NamedTuple):
    """A problem of a file."""

    text: str
    file: File


@dataclass
class Findings:
    """Counts and problems of the images that were read in one split.

    Attributes:
        images: Images in the split.
        read: How many of them were read.
        problems: The problems, each with its file.
        sizes: (height, width) -> images.
        raw_ids: Raw id -> pixels.
        unknown: Raw id that the label set does not have -> masks that hold it.
    """

    images: int
    read: int = 0
    problems: list[Problem] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    raw_ids: Counter[int] = field(default_factory=Counter)
    unknown: dict[int, list[File]] = field(default_factory=dict)


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: Command line arguments after `doctor`.

    Returns:
        0 if train and val can be used, else 1.

    Raises:
        UserError: The arguments are wrong.
    """
    kind, parser, rest = dataset_parser("doctor", args)
    data, options = parse(kind, parser, rest)
    sources, errors = open_splits(data)
    if not data.root.is_dir():
        _, _, tree = errors["train"].partition("\n")
        echo(f"{data.root} is not a folder; set --data.root to the folder of the data set.{EXPECTED}\n{tree}")
        return 1
    echo(f"{data.root}: {', '.join(layout.name for layout in known_layouts(data.root, kind)) or 'no known layout'}")
    print_split_errors(errors)
    listed = not errors.keys() & {"train", "val"}
    usable, doubtful = listed, False
    for split, source in sources.items():
        found = examine(data, source, len(source) if options.full else SAMPLE, split)
        good, hinted = print_split(data, split, source, found, options.full)
        usable &= good or split == "test"
        doubtful |= hinted and not data.published_sizes  # a part of a benchmark may lack classes
    if not listed:
        for line in suggestions(kind, options.data.as_dict(), data.root):
            echo(line)
    verdict = "fit can start, but see above: classes have no pixel" if doubtful else "usable: fit can start"
    echo(verdict if usable else "not usable: fix the problems above")
    return 0 if usable else 1


def open_splits(data: SegmentationDataModule) -> tuple[dict[Split, FileSource], dict[Split, str]]:
    """List the images of every split; return the splits that can be listed, and the errors of the others."""
    sources: dict[Split, FileSource] = {}
    errors: dict[Split, str] = {}
    for split in SPLITS:
        try:
            source = data.source(split)
        except UserError as error:
            errors[split] = str(error)
        else:
            assert isinstance(source, FileSource)  # doctor knows data sets of files only
            sources[split] = source
    return sources, errors


def print_split_errors(errors: dict[Split, str]) -> None:
    """Print the errors of the splits, each once: the tree of files too, and errors that differ only in the split."""
    same: dict[str, list[Split]] = {}
    for split, text in errors.items():
        same.setdefault(re.sub(r"(train|val|test)(ing|idation)?", "", text), []).append(split)
    shown = ""
    for splits in same.values():
        first, _, rest = errors[splits[0]].partition("\n")
        short = first.removesuffix(EXPECTED).rstrip(".")
        if splits == ["test"]:
            echo(f"test: {short}; fit does not need this split")
        else:
            echo(f"{splits[0]}: {short if rest in ('', shown) else errors[splits[0]]}")
            shown = rest or shown
        if splits[1:]:
            echo(f"{' and '.join(splits[1:])}: same problem")


def examine(data: SegmentationDataModule, source: FileSource, count: int, split: str) -> Findings:
    """Read images and masks, evenly spread over a split, with all cores.

    Args:
        data: The data set.
        source: The split.
        count: Images to read.
        split: Name of the split, for the progress bar.
    """
    found = Findings(len(source))
    step = max(1, len(source) // max(1, count))
    positions = range(0, len(source), step)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
        pairs = pool.map(lambda i: examine_one(data, source, i), positions)
        results = track(pairs, split, len(positions), console=rich.get_console(), transient=True)
        for position, (problems, size, raw_ids) in zip(positions, results, strict=True):
            mask = source.items[position].mask or ""
            found.read += 1
            found.problems += problems
            if size is not None:
                found.sizes[size] += 1
            found.raw_ids.update(raw_ids)
            if source.label_set is not None:
                for raw_id in source.label_set.unknown_ids(raw_ids):
                    found.unknown.setdefault(raw_id, []).append(mask)
    return found


def examine_one(
    data: SegmentationDataModule, source: FileSource, index: int
) -> tuple[list[Problem], tuple[int, int] | None, dict[int, int]]:
    """Read one image and its mask; return the problems, the size, and the pixels of each raw id."""
    item = source.items[index]
    try:
        image = read_image(item.image)
    except MissingFileError:  # all missing files are listed together
        return [], None, {}
    except UserError as error:
        return [Problem(str(error), item.image)], None, {}
    size = (image.shape[0], image.shape[1])
    if item.mask is None or source.label_set is None:
        return [], size, {}
    texts, raw_ids = [], {}
    try:
        raw = source.read_raw(item.mask)
        ids, counts = np.unique(raw, return_counts=True)
        raw_ids = dict(zip(ids.tolist(), counts.tolist(), strict=True))
        if raw.shape != size:
            texts.append(f"{item.mask} is {size_text(raw)} pixels (width x height); its image is {size_text(image)}")
        if (problem := data.diagnose_mask(raw_ids, item.mask)) is not None:
            texts.append(problem)
    except MissingFileError:
        pass
    except UserError as error:
        texts.append(str(error))
    return [Problem(text, item.mask) for text in texts], size, raw_ids


def print_split(
    data: SegmentationDataModule, split: Split, source: FileSource, found: Findings, full: bool
) -> tuple[bool, bool]:
    """Print the findings of a split; return whether it can be used, and whether it lacks classes."""
    published = data.published_sizes.get(split)
    expected = "" if published in (None, found.images) else f" ({published} are published)"
    labeled = "labeled" if source.labeled else "without labels"
    sizes = ", ".join(f"{w}x{h} ({n})" for (h, w), n in found.sizes.most_common(3))
    more = f" and {len(found.sizes) - 3} other sizes" if len(found.sizes) > 3 else ""
    echo(f"{split}: {found.images} images{expected}, {labeled}; {found.read} read" + (sizes and f": {sizes}{more}"))
    wrong = split_problems(data, split, source, found)
    hint = None if wrong or source.label_set is None else absent_hint(source.label_set, split, found)
    for line in [*wrong, *([hint] if hint else []), *missing_parts(data, split, source.items, source.label_set)]:
        echo(f"  {line}")
    if source.label_set is not None and split == "train" and found.raw_ids:
        weights = class_weights(data) if full and not wrong else {}
        table = frequencies(source.label_set, found.raw_ids, weights)
        columns = f"; class weights of fit's --class_weights {' and '.join(weights)}" if weights else ""
        echo(f"classes in train, % of all pixels read{columns}")
        rich.get_console().print(table)
    return not wrong, hint is not None


def absent_hint(labels: LabelSet, split: Split, found: Findings) -> str | None:
    """Describe the classes without a pixel, as `fit` does."""
    if not found.raw_ids:
        return None
    absent = absent_classes(labels, found.raw_ids)
    return describe_absent(labels, absent, found.raw_ids, split, found.read, found.images)


def split_problems(data: SegmentationDataModule, split: Split, source: FileSource, found: Findings) -> list[str]:
    """Return the problems that make a split unusable, and how to fix them."""
    if not source.items:
        return [f"no images; {data.fix_for_no_images}"]
    lines = [problem.text for problem in found.problems[:SHOWN]]
    if len(found.problems) > SHOWN:
        lines.append(f"and {len(found.problems) - SHOWN} more")
    if missing := source.missing_files():
        lines.append(f"{len(missing)} file(s) do not exist: {first_five(missing)}")
    if found.unknown and source.label_set is not None:
        lines.append(unknown_labels(source.label_set, found.unknown, found.read))
    if lines:
        files = [*(problem.file for problem in found.problems), *missing, *chain.from_iterable(found.unknown.values())]
        lines.append(f"to fix: {how_to_fix(data, split, files)}")
    mask = source.items[0].mask
    if source.label_set is None or mask is None or not found.raw_ids:
        return lines
    fix = how_to_fix(data, split, [mask])
    if diagnosis := data.diagnose_raw_ids(found.raw_ids, fix):
        lines.append(diagnosis)
    elif not source.label_set.has_class(found.raw_ids):
        holds = what_masks_hold(source.label_set, range(source.label_set.num_classes), found.raw_ids)
        lines.append(f"no pixel read has a class, so there is nothing to train on or to score. {holds}; to fix: {fix}")
    return lines


def missing_parts(data: SegmentationDataModule, split: Split, items: list[Item], labels: LabelSet | None) -> list[str]:
    """Return what is missing in a split, perhaps on purpose."""
    sample = items[:: max(1, len(items) // SAMPLE)]
    images = [item.image for item in sample]
    if labels is not None and (unmatched := masks_without_images(data, items)):
        fix = how_to_fix(data, split, images)
        return [f"incomplete: {len(unmatched)} mask(s) have no image, such as {unmatched[0]}: {fix}"]
    if 0 < len(items) < data.published_sizes.get(split, 0):
        fix = how_to_fix(data, split, [*images, *(item.mask for item in sample if item.mask is not None)])
        return [f"incomplete, unless you use only a part on purpose: {fix}"]
    return []


def class_weights(data: SegmentationDataModule) -> dict[str, list[float]]:
    """Return both kinds of class weights; the class pixel counts stay in the cache."""
    return {kind: data.class_weights(kind) for kind in get_args(Weighting)}


def frequencies(labels: LabelSet, raw_ids: Counter[int], weights: dict[str, list[float]]) -> Table:
    """Return a table of the classes with raw ids and percentages of the pixels read.

    Args:
        labels: The classes.
        raw_ids: Raw id -> pixels.
        weights: Column heading -> one weight per class.
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
            several = len(found) > 1
            shown = [f"{raw_id} ({100 * n / total:.2f})" if several else f"{raw_id}" for raw_id, n in found.items()]
            percent = f"{100 * sum(found.values()) / total:.2f}"
            columns = (
                [f"{column[train_id]:.2f}" for column in weights.values()] if 0 <= train_id < labels.num_classes else []
            )
            table.add_row(plain(name), ", ".join(shown) or "none", percent, *columns)
    return table
