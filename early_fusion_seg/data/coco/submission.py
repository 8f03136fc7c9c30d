"""Submission format of the COCO-Stuff server: one JSON of run-length encoded masks.

The category ids are 92..182 for stuff, and 183 for all things together.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from early_fusion_seg.data.dataset import FileSource
from early_fusion_seg.data.submission import SubmissionFormat
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.images import image_size, read_mask

FIRST_STUFF, THINGS = 92, 183  # category ids in a submission


def _write_results(part: Path, paths: list[Path]) -> None:
    entries = [entry for path in paths for entry in stuff_entries(int(path.stem), read_mask(path))]
    part.write_text(json.dumps(entries), encoding="utf-8")


def stuff_entries(image_id: int, raw: NDArray[Any]) -> Iterator[dict[str, Any]]:
    """Encode a label map as entries of COCO-Stuff's results JSON.

    Args:
        image_id: COCO's number of the image.
        raw: Raw ids (h, w) of stuffthingmaps.

    Yields:
        One entry per category; each pixel is in the mask of one entry, and all things are category 183.
    """
    coder = _import_mask_coder()
    coco_ids = np.where(raw.astype(int) + 1 < FIRST_STUFF, THINGS, raw.astype(int) + 1)
    for category in np.unique(coco_ids):
        encoded = coder.encode(np.asfortranarray(coco_ids == category, np.uint8))
        text = {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}
        yield {"image_id": image_id, "category_id": int(category), "segmentation": text}


def _check_results(source: FileSource, path: Path) -> Iterator[str]:
    """Yield the problems of a results JSON, given the images of the split."""
    coder = _import_mask_coder()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        areas: dict[int, int] = {}
        for entry in entries:
            if not FIRST_STUFF <= entry["category_id"] <= THINGS:
                yield f"{path}: image {entry['image_id']} has the category {entry['category_id']}; expected 92..183"
            areas[entry["image_id"]] = areas.get(entry["image_id"], 0) + int(coder.area(entry["segmentation"]))
        sizes = {entry["image_id"]: entry["segmentation"]["size"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{path} cannot be read as COCO-Stuff's results ({type(error).__name__}: {error})"
        return
    for item in source.items:
        width, height = image_size(item.image)
        number = int(item.key)
        if number not in areas:
            yield f"{path} lacks image {number}"
        elif list(sizes[number]) != [height, width]:
            yield f"{path}: image {number} has masks of {sizes[number]} (height, width); expected [{height}, {width}]"
        elif areas[number] != height * width:
            yield f"{path}: image {number} has masks of {areas[number]} pixels in all; expected {height * width}"


def _import_mask_coder() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("a COCO submission needs pycocotools: pip install pycocotools") from None
    return mask


SUBMISSION = SubmissionFormat(
    "stuff_results.json", "the server of the COCO-Stuff challenge", pack=_write_results, check_archive=_check_results
)
