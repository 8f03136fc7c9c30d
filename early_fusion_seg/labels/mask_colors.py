"""Read masks in the colors of a label set.

Shapes: h, w are the height and width of a mask.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from early_fusion_seg.errors import UserError, first_five
from early_fusion_seg.io.image_files import Openable
from early_fusion_seg.io.images import has_equal_channels, read_mask_pixels
from early_fusion_seg.labels.label_set import Color, LabelSet


def read_mask_or_colors(label_set: LabelSet, file: str | Path | Openable) -> NDArray[Any]:
    """Read a mask as raw ids (h, w): numbers, as `read_mask` reads them, or the colors of a label set.

    Raises:
        UserError: The file cannot be read as a mask, or its numbers and its colors mean different classes.
    """
    values, palette = read_mask_pixels(file)
    if values.ndim == 3:
        return raw_ids_of_colors(label_set, values, str(file))
    if palette is not None:
        _check_palette(label_set, values, palette, str(file))
    return values


def raw_ids_of_colors(label_set: LabelSet, pixels: NDArray[np.uint8], file: str | Path) -> NDArray[Any]:
    """Convert a mask in colors to raw ids.

    Args:
        label_set: Label set with `colors`.
        pixels: RGB (h, w, 3). Three equal channels may also be the raw ids themselves.
        file: The mask file, for messages.

    Returns:
        Raw ids (h, w).

    Raises:
        UserError: A color is not in the table, or gray pixels mean other classes as colors than as raw ids.
    """
    codes = _color_codes(pixels)
    by_color, in_table = _look_up(label_set, codes)
    gray = has_equal_channels(pixels)
    if not in_table.all():
        if gray:
            return pixels[..., 0]
        raise _unknown_colors_error(label_set, codes[~in_table], file)
    if gray and not label_set.unknown_ids(np.unique(pixels).tolist()):
        _check_same_classes(label_set, pixels[..., 0], by_color, file)
    return by_color


def _look_up(label_set: LabelSet, codes: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return the raw id of each color, and whether the label set has the color for one class."""
    known, raw_ids = _color_table(label_set.raw_to_train, label_set.colors)
    places = np.searchsorted(known[:-1], codes)
    return raw_ids[places], known[places] == codes


def _check_palette(label_set: LabelSet, values: NDArray[Any], palette: NDArray[np.uint8], file: str) -> None:
    """Check that the palette of an indexed mask was not renumbered, as by a program that stores colors as a palette.

    If all of its colors, at least two, are in the label set, they must mean the same classes as the numbers.
    """
    by_color, in_table = _look_up(label_set, _color_codes(palette))
    to_train = dict(label_set.raw_to_train)
    of_number = np.array([to_train.get(number, -1) for number in range(len(palette))])
    of_color = np.array([to_train.get(raw_id, -1) for raw_id in by_color.tolist()])
    differs = in_table & (of_number >= 0) & (of_number != of_color)
    if not differs.any():
        return
    used = np.flatnonzero(np.bincount(values.ravel(), minlength=len(palette))[: len(palette)])
    if len(used) > 1 and in_table[used].all() and differs[used].any():
        number = int(used[differs[used]][0])
        color = "#{:02x}{:02x}{:02x}".format(*palette[number])
        raise UserError(
            f"{file} holds the number {number} in the color {color}, which {label_set.file or label_set.name} gives to "
            f"the raw_id {by_color[number]}: a program may have renumbered its colors. Save it as RGB if colors are "
            "right, or as gray if the numbers are."
        )


def _color_codes(pixels: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return each color (..., 3) as one number, 0xRRGGBB."""
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    return red << 16 | green << 8 | blue


@lru_cache(maxsize=16)
def _color_table(
    raw_to_train: tuple[tuple[int, int], ...], colors: tuple[Color, ...]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the colors as sorted numbers, and the raw id of each.

    A color of several classes is left out. The last entry is no color, so that the arrays are never empty.
    """
    rows: dict[int, list[tuple[int, int]]] = {}
    codes = _color_codes(np.array(colors, np.uint8).reshape(-1, 3)).tolist()
    for code, pair in zip(codes, raw_to_train, strict=False):
        rows.setdefault(code, []).append(pair)
    clear = {code: pairs[0][0] for code, pairs in rows.items() if len({train_id for _, train_id in pairs}) == 1}
    table = np.array([*sorted(clear.items()), (2**24, 0)], np.int32)
    return table[:, 0], table[:, 1]


def _check_same_classes(label_set: LabelSet, numbers: NDArray[Any], by_color: NDArray[Any], file: str | Path) -> None:
    """Check that gray pixels mean the same classes as raw ids and as colors."""
    differ = label_set.encode(numbers, file) != label_set.encode(by_color, file)
    if differ.any():
        number, other = int(numbers[differ][0]), int(by_color[differ][0])
        color = f"#{number:02x}{number:02x}{number:02x}"
        raise UserError(
            f"{file} has three equal channels, which can be read in two ways: {number} is a raw_id, and {color} is the "
            f"color of the raw_id {other} in {label_set.file or label_set.name}. Save the mask with one channel, or "
            f"change the color of {other}."
        )


def _unknown_colors_error(label_set: LabelSet, codes: NDArray[np.int32], file: str | Path) -> UserError:
    found, counts = np.unique(codes, return_counts=True)
    listed = first_five(f"#{code:06x} in {n} pixel(s)" for code, n in zip(found.tolist(), counts.tolist(), strict=True))
    return UserError(
        f"{file} is in colors, and {label_set.file or label_set.name} has no class, or several, for {len(found)} of "
        f"them: {listed}. Give each color one line there, or save the mask with one channel that holds the raw_id of "
        "each pixel."
    )
