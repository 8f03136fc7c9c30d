"""Where data sets lie: the layouts of a folder and of the folders around it, and the command that reads them."""

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
ENTRIES = 1000  # entries of a folder that are read, so that folders full of images take no time
FOLDERS = 40  # folders below a folder that are searched


def known_layouts(root: Path, asked: DataClass) -> list[Layout]:
    """Return the layouts that a folder holds, of the data set asked for and of all built-in ones."""
    kinds = dict.fromkeys([*datasets().values(), asked])
    return layouts_in(root, chain.from_iterable(kind.layouts for kind in kinds))


def offers(kind: DataClass, options: dict[str, Any], root: Path) -> list[str]:
    """Return what can be read instead of what was asked for: the same data set elsewhere, or another one that is there.

    Every offer was tried, so it leads further than what was asked for.

    Args:
        kind: The data set asked for.
        options: The arguments of its data module.
        root: Where it was looked for.
    """
    places = [place for place in nearby(root) if layouts_in(place, kind.layouts)]
    best = max([root, *places], key=lambda place: _splits(kind, options | {"root": place}))
    if best != root:
        names = " and ".join(layout.name for layout in layouts_in(best, kind.layouts))
        return [f"{best} holds {names}: give {shlex.join(['--data.root', str(best)])}"]
    here = layouts_in(root, kind.layouts)
    if any(_asked_for(layout, options) for layout in here):
        return []  # files are missing, and another choice of labels would hide that
    found = [(root, other, layout) for other in datasets().values() for layout in layouts_in(root, other.layouts)]
    found += [(place, kind, layout) for place in places for layout in layouts_in(place, kind.layouts)]
    commands: dict[DataClass, str] = {}  # one for each data set
    for place, other, layout in found:
        choice = layout.options
        if choice is not None and other not in commands and _splits(other, choice | {"root": place}) == 2:
            commands[other] = _command(other, choice, place)
    return [f"what is there may fit: {command}" for command in commands.values()]


def nearby(root: Path) -> list[Path]:
    """Return the folders around a folder: some levels up, the nearest first, and two levels down."""
    children = _folders(root)
    return [*root.resolve().parents[:LEVELS_UP], *children, *(inner for child in children for inner in _folders(child))]


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            folders = [Path(entry.path) for entry in islice(entries, ENTRIES) if entry.is_dir()]
    except PermissionError:  # an unreadable folder holds no data set for this user
        return []
    return sorted(path for path in folders if not path.name.startswith("."))[:FOLDERS]


def _asked_for(layout: Layout, options: dict[str, Any]) -> bool:
    choice = layout.options
    return choice is not None and all(options[name] in (value, None) for name, value in choice.items())


def _splits(kind: DataClass, options: dict[str, Any]) -> int:
    """Return how many of train and val have images that can be listed."""
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Mapillary's, of a missing config file; its own run repeats it
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
