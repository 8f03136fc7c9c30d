"""How to fix the files of a data set, and masks without images."""

import os
from collections.abc import Iterable, Sequence

from early_fusion_seg.data import Item, SegmentationDataModule
from early_fusion_seg.data.listing import File, ZipMember


def how_to_fix(data: SegmentationDataModule, split: str, files: Iterable[File]) -> str:
    """Return what to do to get files of a split again, each step once."""
    found: dict[str, None] = {}
    for file in files:
        place = f"{split}:{str(file).removeprefix(str(data.root))}"
        if isinstance(file, ZipMember):
            found[f"download {file.archive.name} again"] = None
        else:
            found[next(fix for part, fix in data.fixes.items() if part in place)] = None
    return "; ".join(found)


def masks_without_images(data: SegmentationDataModule, items: Sequence[Item]) -> list[str]:
    """Return the masks in the folders of a split that have no image.

    Zip files are not checked: they are complete.
    """
    used = {item.mask for item in items if isinstance(item.mask, str)}
    if not data.masks_match_images or not used:
        return []
    suffix = str(items[0].mask).rpartition(items[0].key)[2]
    alone = []
    for folder in {mask.rpartition("/")[0] for mask in used}:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(suffix) and not entry.name.startswith(".")]
        alone += [f"{folder}/{name}" for name in names if f"{folder}/{name}" not in used]
    return sorted(alone)
