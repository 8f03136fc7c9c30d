"""Recognize data sets in a folder and the folders around it, and suggest the command that reads them."""

import os
import shlex
import warnings
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from early_fusion_seg.cli.datasets import DataClass, dataset_name, datasets
from early_fusion_seg.data import Layout
from early_fusion_seg.data.layout import layouts_in
from early_fusion_seg.errors import UserError

LEVELS_UP = 3  # from VOCdevkit/VOC2012/JPEGImages to the folder that holds VOCdevkit
ENTRIES = 1000  # entries read per folder, so that a folder full of images takes no time
FOLDERS = 40  # subfolders searched per folder


def known_layouts(root: Path, kind: DataClass) -> list[Layout]:
    """Return the layouts in a folder: those of a data set and of all built-in ones."""
    kinds = dict.fromkeys([*datasets().values(), kind])
    return layouts_in(root, chain.from_iterable(each.layouts for each in kinds))


def suggestions(kind: DataClass, options: dict[str, Any], root: Path) -> list[str]:
    """Return what to try instead: another root for the same data set, or the command for another layout.

    Each suggestion was tried: it lists more splits than the options given.

    Args:
        kind: The data module class of the command line.
        options: Its arguments.
        root: The folder that does not hold the data set as expected.
    """
    folders_around = [place for place in nearby(root) if layouts_in(place, kind.layouts)]
    best = max([root, *folders_around], key=lambda place: _listable_splits(kind, options | {"root": place}))
    if best != root:
        names = " and ".join(layout.name for layout in layouts_in(best, kind.layouts))
        return [f"{best} holds {names}; give {shlex.join(['--data.root', str(best)])}"]
    here = layouts_in(root, kind.layouts)
    if any(_has_options(layout, options) for layout in here):
        return []  # files are missing; reading other labels would hide that
    found = [(root, other, layout) for other in datasets().values() for layout in layouts_in(root, other.layouts)]
    found += [(place, kind, layout) for place in folders_around for layout in layouts_in(place, kind.layouts)]
    commands: dict[DataClass, str] = {}  # one per data set
    for place, other, layout in found:
        choice = layout.options
        if choice is not None and other not in commands and _listable_splits(other, choice | {"root": place}) == 2:
            commands[other] = _command(other, choice, place)
    return [f"another layout was found; try: {command}" for command in commands.values()]


def nearby(root: Path) -> list[Path]:
    """Return the folders around a folder: three levels up, nearest first, then two levels down."""
    children = _folders(root)
    return [*root.resolve().parents[:LEVELS_UP], *children, *(inner for child in children for inner in _folders(child))]


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            folders = [Path(entry.path) for entry in islice(entries, ENTRIES) if entry.is_dir()]
    except PermissionError:  # this user cannot read data from it
        return []
    return sorted(path for path in folders if not path.name.startswith("."))[:FOLDERS]


def _has_options(layout: Layout, options: dict[str, Any]) -> bool:
    """Return whether these options of the data module read the layout."""
    choice = layout.options
    return choice is not None and all(options[name] in (value, None) for name, value in choice.items())


def _listable_splits(kind: DataClass, options: dict[str, Any]) -> int:
    """Return how many of the splits train and val have images that can be listed."""
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Mapillary's warning of a missing config file, repeated when it is read
        data = kind(**options)
        for split in ("train", "val"):
            with suppress(UserError):  # this split cannot be listed
                count += len(data.source(split)) > 0
    return count


def _command(kind: DataClass, options: dict[str, Any], root: Path) -> str:
    words = ["early-fusion-seg", "doctor", *dataset_name(kind).split(" ")]
    for name, value in options.items():
        words += [f"--data.{name}", str(value).lower() if isinstance(value, bool) else value]
    return shlex.join([*words, "--data.root", str(root)])
