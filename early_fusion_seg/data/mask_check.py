"""Check masks before a run: unknown labels, splits without a label, classes without a pixel, and too large crops.

A run must start at once, so `survey` reads masks in random order only until the classes are seen, and at most 256 masks
or 100 megapixels. What is said about them is certain. A class is called absent if all masks were read, or their pixels
were counted before (`class_pixel_counts`), or if the masks read lack at least half of the classes; the message then
says how many were read. Only a split in which no label is found is read to its end.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from early_fusion_seg.data.class_pixel_counts import cached_counts
from early_fusion_seg.data.dataset import FileSource, Source
from early_fusion_seg.data.transforms import TrainAugmentation
from early_fusion_seg.errors import UserError, first_five
from early_fusion_seg.labels import LabelSet, in_ranges
from early_fusion_seg.labels.label_set import RAW_IDS

MAX_MASKS = 256
MAX_PIXELS = 10**8  # one or two seconds on one core
CHUNK = 8  # masks read at a time, so the fewest that are read
SHOWN = 20  # different labels of masks that are shown
MAX_FILLED = 0.5  # share of a crop that is filled at factor 1, without a warning
MAX_MEANT = 5  # ignored labels that are suggested as absent classes


@dataclass
class Survey:
    """What the masks that were read hold.

    Attributes:
        total: Masks in the split.
        read: How many of them were read.
        sizes: Height and width of each.
        holders: Raw id -> names of the masks that hold it.
    """

    total: int
    read: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    holders: dict[int, list[str]] = field(default_factory=dict)

    def add(self, name: str, raw: NDArray[Any]) -> None:
        """Add a mask (h, w) of raw ids."""
        self.read += 1
        self.sizes.append((raw.shape[0], raw.shape[1]))
        for raw_id in raw_ids_in(raw):
            self.holders.setdefault(raw_id, []).append(name)


def check_masks(source: Source, labels: LabelSet, split: str, warn: bool = True) -> list[tuple[int, int]]:
    """Refuse a split with unknown labels or without any label, and warn of classes without a pixel.

    Args:
        source: The split; its images have labels.
        labels: The classes, for a source that returns train ids.
        split: "train" needs every class, any other split two.
        warn: Warn of classes without a pixel, in the first process.

    Returns:
        Height and width of the masks that were read.

    Raises:
        UserError: Masks hold unknown labels, or no pixel of the split has a class.
    """
    labels = (source.label_set if isinstance(source, FileSource) else None) or labels.of_train_ids()
    found = survey(source, labels, split)
    if not found.read:
        return []
    if unknown := labels.unknown_ids(found.holders):
        raise UserError(unknown_labels(labels, {raw_id: found.holders[raw_id] for raw_id in unknown}, found.read))
    if not labels.has_class(found.holders):
        raise UserError(no_labels(labels, found.holders, split))
    absent, total = absent_classes(labels, found.holders), found.total
    if absent and found.read < total and isinstance(source, FileSource):
        counts = cached_counts(source, labels.num_classes)
        if counts is not None:
            absent, total = np.flatnonzero(counts.sum(0) == 0).tolist(), found.read
    text = describe_absent(labels, absent, found.holders, split, found.read, total)
    if warn and text is not None:
        rank_zero_warn(text)
    return found.sizes


def survey(source: Source, labels: LabelSet, split: str) -> Survey:
    """Read masks in random order until enough is known; masks that cannot be read are left to the run."""
    found, pixels = Survey(len(source)), 0
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    for index, raw in _read_in_chunks(source, order):
        if raw is not None:
            found.add(str(source.items[index].mask) if isinstance(source, FileSource) else source.key(index), raw)
            pixels += raw.size
        if found.read % CHUNK:
            continue
        seen = labels.num_classes - len(absent_classes(labels, found.holders))
        unknown = bool(labels.unknown_ids(found.holders))  # then read on to count them
        enough = seen >= needed_classes(labels, split) and not unknown
        if (seen or unknown) and (enough or found.read >= MAX_MASKS or pixels >= MAX_PIXELS):
            break
    return found


def _read_in_chunks(source: Source, order: Sequence[int]) -> Iterator[tuple[int, NDArray[Any] | None]]:
    """Yield the index and the raw ids (h, w) of each mask, or None for a mask that cannot be read."""

    def read(index: int) -> NDArray[Any] | None:
        with suppress(UserError):  # the run reads the mask again and reports it
            if isinstance(source, FileSource):
                mask = source.items[index].mask
                return None if mask is None else source.read_raw(mask)
            return source.read(index)[1]
        return None

    with ThreadPoolExecutor(min(CHUNK, os.cpu_count() or 1)) as pool:  # decoding releases the GIL
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            yield from zip(chunk, pool.map(read, chunk), strict=True)


def raw_ids_in(raw: NDArray[Any]) -> list[int]:
    """Return the numbers in a mask (h, w), sorted."""
    if raw.dtype == np.uint8 and raw.size:  # ten times faster than np.unique
        counts = cv2.calcHist([np.ascontiguousarray(raw)], [0], None, [256], [0, 256])
        return [int(i) for i in np.flatnonzero(counts)]
    return [int(i) for i in np.unique(raw)]


def needed_classes(labels: LabelSet, split: str) -> int:
    """Return how many classes a split needs: training all; with fewer than two, a score says nothing."""
    return labels.num_classes if split == "train" else min(2, labels.num_classes)


def absent_classes(labels: LabelSet, raw_ids: Iterable[int]) -> list[int]:
    """Return the train ids of the classes to which none of the raw ids belongs."""
    to_train = dict(labels.raw_to_train)
    present = {to_train.get(raw_id) for raw_id in raw_ids}
    return [train_id for train_id in range(labels.num_classes) if train_id not in present]


def describe_absent(
    labels: LabelSet, absent: Sequence[int], raw_ids: Iterable[int], split: str, read: int, total: int
) -> str | None:
    """Describe the classes without a pixel, with the ignored labels that may have been meant for them.

    Args:
        labels: The classes.
        absent: Train ids of the classes that no mask read has.
        raw_ids: Labels in the masks read.
        split: Name of the split.
        read: Masks that were read.
        total: Masks in the split.

    Returns:
        A sentence, or None if the split has the classes that it needs, or too few masks were read to tell.
    """
    too_few_read = read < total and 2 * len(absent) < labels.num_classes
    if too_few_read or labels.num_classes - len(absent) >= needed_classes(labels, split):
        return None
    where = split if read >= total else f"the {read} masks read of {split}, which has {total},"
    names = first_five([labels.class_names[train_id] for train_id in absent])
    text = f"no pixel of {where} has the class{'es' if len(absent) > 1 else ''} {names}"
    return f"{text}. {what_masks_hold(labels, absent, raw_ids)}"


def no_labels(labels: LabelSet, raw_ids: Iterable[int], split: str) -> str:
    """Describe a split in which every pixel is ignored."""
    purpose = "train on" if split == "train" else "score"
    holds = what_masks_hold(labels, range(labels.num_classes), raw_ids)
    return f"no pixel of {split} has a class, so there is nothing to {purpose}. {holds}"


def what_masks_hold(labels: LabelSet, absent: Sequence[int], raw_ids: Iterable[int]) -> str:
    """Describe the labels in masks, and ask whether the ignored ones mean absent classes."""
    found, to_train = sorted(raw_ids), dict(labels.raw_to_train)
    ignored = [raw_id for raw_id in found if to_train.get(raw_id) == labels.ignore_index]
    text = f"The masks hold {in_ranges(found)}" if len(found) <= SHOWN else f"The masks hold {len(found)} labels"
    if not 0 < len(ignored) <= MAX_MEANT:
        return text
    meant = in_ranges(ignored) if len(ignored) == 1 else "one of them"
    name = labels.class_names[absent[0]] if len(absent) == 1 else "one of these classes"
    text += f", and {in_ranges(ignored)} {'is' if len(ignored) == 1 else 'are'} ignored: does {meant} mean {name}?"
    return text if labels.file is None else f"{text} If so, give it the train_id of the class in {labels.file}"


def warn_of_large_crop(transform: TrainAugmentation, scale: float, sizes: Sequence[tuple[int, int]]) -> None:
    """Warn if more than half of a crop is filled because the training images are smaller.

    Crops that are a little larger are usual: 512x512 for VOC's 500x375.

    Args:
        transform: The augmentation.
        scale: Resize factor before it.
        sizes: Height and width of some images.
    """
    if transform.crop_size is None or not sizes:
        return
    resized = [(max(1, round(height * scale)), max(1, round(width * scale))) for height, width in sizes]
    scaled, crop = np.array([transform.size_at_factor_1(size) for size in resized]), np.array(transform.crop_size)
    filled = 1 - float((np.minimum(scaled, crop).prod(1) / crop.prod()).mean())
    if filled > MAX_FILLED:
        median = np.median(scaled, 0).astype(int)
        height, width = np.minimum(median, crop).tolist()
        rank_zero_warn(
            f"{filled:.0%} of each crop is filling: crop_size is {crop[0]}x{crop[1]} (height x width), and training "
            f"images are {median[0]}x{median[1]} after scaling (median). Take crop_size [{height}, {width}] "
            f"(--data.crop_size '[{height},{width}]')"
        )


def unknown_labels(labels: LabelSet, holders: Mapping[int, Sequence[object]], read: int) -> str:
    """Describe labels that the table does not have, each once.

    Args:
        labels: The table.
        holders: Unknown raw id -> names of the masks that hold it.
        read: Masks that were read.
    """
    known = in_ranges(raw_id for raw_id, _ in labels.raw_to_train)
    each = first_five(
        [f"{raw_id} ({len(masks)} of {read} masks, such as {masks[0]})" for raw_id, masks in holders.items()]
    )
    text = f"the masks hold labels that the label set '{labels.name}' does not have (it has {known}): {each}"
    if labels.file is None:
        return text
    possible = [raw_id for raw_id in holders if 0 <= raw_id < RAW_IDS]
    if not possible:
        return f"{text}. Correct the masks"
    line = f"'{possible[0]},255,void,#000000'"
    return (
        f"{text}. Correct the masks, or add a line for each to {labels.file}: {line} ignores it, "
        "and the train_id of a class instead of 255 makes it that class"
    )
