"""Advice of `doctor`: how to fix files, and which masks have no image."""

import os
from collections.abc import Iterable, Sequence

from early_fusion_seg.data import Item, SegmentationDataModule
from early_fusion_seg.data.listing import File, ZipMember


def how_to_fix(data: SegmentationDataModule, split: str, files: Iterable[File]) -> str:
    """Return the steps that restore files of a split, each step once."""
    steps: dict[str, None] = {}  # a set that keeps its order
    for file in files:
        location = f"{split}:{str(file).removeprefix(str(data.root))}"
        if isinstance(file, ZipMember):
            steps[f"download {file.archive.name} again"] = None
        else:
            steps[next(fix for part, fix in data.fixes.items() if part in location)] = None
    return "; ".join(steps)


def masks_without_images(data: SegmentationDataModule, items: Sequence[Item]) -> list[str]:
    """Return the masks in the folders of a split that have no image.

    Zip files are not checked, as nothing is missing in them.
    """
    used = {item.mask for item in items if isinstance(item.mask, str)}
    if not data.masks_match_images or not used:
        return []
    suffix = str(items[0].mask).rpartition(items[0].key)[2]
    unmatched = []
    for folder in {mask.rpartition("/")[0] for mask in used}:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(suffix) and not entry.name.startswith(".")]
        unmatched += [f"{folder}/{name}" for name in names if f"{folder}/{name}" not in used]
    return sorted(unmatched)
