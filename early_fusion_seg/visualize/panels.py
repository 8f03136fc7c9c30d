"""Drawing of label maps, alone, over the image, or in panels with titles and legend.

Shapes: h x w the size of an image, H x W that of a panel, K classes. Images are (h, w, 3) uint8 RGB, label
maps (h, w) integers 0..K-1 or `ignore_index`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from early_fusion_seg.errors import UserError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.integer[Any]]
Color = tuple[int, int, int]

IGNORED: Color = (0, 0, 0)
WRONG: Color = (235, 30, 40)
PAPER: Color = (255, 255, 255)
"""Background of panels."""
INK: Color = (32, 32, 36)
"""Color of text and frames."""
SMALLEST_TILE, LARGEST_TILE = 320, 640
"""Longer side of a tile in pixels. Images are enlarged or subsampled by a whole number to come close to this range."""


def colorize(labels: Labels, palette: ArrayLike, ignore_index: int = 255) -> Pixels:
    """Map each label to the color of its class; ignored pixels become black.

    Args:
        labels: (h, w) labels.
        palette: (K, 3) RGB, 0..255.
        ignore_index: The label of ignored pixels.

    Returns:
        (h, w, 3) uint8.

    Raises:
        UserError: `labels` is not a label map, or holds a label that is neither a class nor ignored.

    Example:
        >>> colorize(np.array([[0, 255]]), [[10, 20, 30]]).tolist()
        [[[10, 20, 30], [0, 0, 0]]]
    """
    colors = np.asarray(palette, np.uint8).reshape(-1, 3)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"labels are {labels.dtype} of shape {labels.shape}; expected integers of shape (h, w)")
    ignored = labels == ignore_index
    unknown = ~ignored & ((labels < 0) | (labels >= len(colors)))
    if unknown.any():
        raise UserError(
            f"the label map holds {labels[unknown][0]}; the palette has colors for 0..{len(colors) - 1}, "
            f"and {ignore_index} is ignored"
        )
    table = np.concatenate([colors, np.array([IGNORED], np.uint8)])
    colored: Pixels = table[np.where(ignored, len(colors), labels)]
    return colored


def overlay(image: Pixels, labels: Labels, palette: ArrayLike, alpha: float = 0.5, ignore_index: int = 255) -> Pixels:
    """Blend the colors of the classes with an image; ignored pixels show only the image.

    Args:
        image: (h, w, 3) uint8.
        labels: (h, w) labels.
        palette: (K, 3) RGB, 0..255.
        alpha: Opacity of the colors, 0..1.
        ignore_index: The label of ignored pixels.

    Returns:
        (h, w, 3) uint8.

    Raises:
        UserError: Sizes differ, `alpha` is out of range, or `labels` is refused by `colorize`.
    """
    _check_sizes(image, labels=labels)
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}; expected a number in 0..1")
    opacity = np.where(labels == ignore_index, 0.0, alpha)[..., None]
    mixed = image * (1 - opacity) + colorize(labels, palette, ignore_index) * opacity
    rounded: Pixels = np.rint(mixed).astype(np.uint8)
    return rounded


def error_map(image: Pixels, truth: Labels, prediction: Labels, ignore_index: int = 255) -> Pixels:
    """Mark wrong pixels in red on a pale gray version of the image; pixels without ground truth are black.

    Args:
        image: (h, w, 3) uint8.
        truth: (h, w) ground truth labels.
        prediction: (h, w) predicted labels.
        ignore_index: The label of pixels without ground truth.

    Returns:
        (h, w, 3) uint8.

    Raises:
        UserError: Sizes differ.
    """
    _check_sizes(image, truth=truth, prediction=prediction)
    gray = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    shown = np.broadcast_to(110 + gray // 2, image.shape).astype(np.uint8)
    shown[truth != prediction] = WRONG
    shown[truth == ignore_index] = IGNORED
    return shown


def panel(
    image: Pixels,
    truth: Labels,
    prediction: Labels,
    palette: ArrayLike,
    class_names: Sequence[str],
    ignore_index: int = 255,
) -> Pixels:
    """Draw image, ground truth, prediction and errors as four tiles, with a legend of the classes that occur.

    Landscape images are laid out two by two, portrait images in a row. Small images are enlarged and large ones
    subsampled by a whole number, so that the text has about the same relative size for any image.

    Args:
        image: (h, w, 3) uint8.
        truth: (h, w) ground truth labels.
        prediction: (h, w) predicted labels.
        palette: (K, 3) RGB, 0..255.
        class_names: The K names.
        ignore_index: The label of pixels without ground truth.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: Sizes differ, or a label is neither a class nor ignored.
    """
    _check_sizes(image, truth=truth, prediction=prediction)
    valid = truth != ignore_index
    wrong = valid & (truth != prediction)
    tiles = {
        "image": image,
        "truth": colorize(truth, palette, ignore_index),
        "prediction": colorize(prediction, palette, ignore_index),
        f"errors: {100 * wrong.sum() / max(1, valid.sum()):.1f} % of the pixels": error_map(
            image, truth, prediction, ignore_index
        ),
    }
    legend = _legend([truth, prediction], palette, class_names, ignore_index)
    if wrong.any():
        legend.append(("wrong", WRONG))
    return _compose({title: fit_tile(tile) for title, tile in tiles.items()}, legend)


def sheet(
    images: Sequence[Pixels],
    labels: Sequence[Labels | None],
    titles: Sequence[str],
    palette: ArrayLike,
    class_names: Sequence[str],
    ignore_index: int = 255,
) -> Pixels:
    """Draw images of one size, each with an overlay of its labels at its right, and a legend of the classes that occur.

    Ignored pixels of the overlays are black.

    Args:
        images: n images (h, w, 3) uint8.
        labels: n label maps (h, w); None for an image without labels.
        titles: n titles.
        palette: (K, 3) RGB, 0..255.
        class_names: The K names.
        ignore_index: The label of pixels without ground truth.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: Sizes differ, or a label is neither a class nor ignored.
    """
    tiles: dict[str, Pixels] = {}
    for i, (image, truth, title) in enumerate(zip(images, labels, titles, strict=True)):
        tiles[f"{i + 1}: {title}"] = fit_tile(image)
        if truth is not None:
            tile = overlay(image, truth, palette, ignore_index=ignore_index)
            tile[truth == ignore_index] = IGNORED
            tiles[f"{i + 1}: labels"] = fit_tile(tile)
    known = [truth for truth in labels if truth is not None]
    return _compose(tiles, _legend(known, palette, class_names, ignore_index), columns=2 if known else 1)


def _legend(
    label_maps: Sequence[Labels], palette: ArrayLike, class_names: Sequence[str], ignore_index: int
) -> list[tuple[str, Color]]:
    """List name and color of each class that occurs, and of ignored pixels if there are any."""
    occurring = {label for labels in label_maps for label in np.unique(labels).tolist()}
    colors = np.asarray(palette, np.uint8).reshape(-1, 3)
    legend = [(class_names[label], tuple(colors[label].tolist())) for label in sorted(occurring - {ignore_index})]
    return [*legend, ("ignored", IGNORED)] if ignore_index in occurring else legend


def fit_tile(tile: Pixels) -> Pixels:
    """Enlarge a small picture (h, w, 3) or subsample a large one by a whole number, without mixing colors."""
    longer = max(tile.shape[:2])
    if longer < SMALLEST_TILE:
        factor = -(-SMALLEST_TILE // longer)
        return tile.repeat(factor, axis=0).repeat(factor, axis=1)
    step = max(1, longer // LARGEST_TILE)
    return tile[::step, ::step]


def _compose(tiles: dict[str, Pixels], legend: Sequence[tuple[str, Color]], columns: int | None = None) -> Pixels:
    """Arrange tiles of one size with their titles in a grid, with the legend below."""
    height, width = next(iter(tiles.values())).shape[:2]
    columns = columns or (2 if width >= height else len(tiles))
    em = max(14, max(height, width) // 22)
    font = ImageFont.load_default(em)
    step_x, step_y = width + em, height + 2 * em  # tile, title and gap
    below = draw_legend(legend, columns * step_x + em, em)
    top = -(-len(tiles) // columns) * step_y
    canvas = Image.new("RGB", (below.shape[1], top + below.shape[0]), PAPER)
    canvas.paste(Image.fromarray(below), (0, top))
    draw = ImageDraw.Draw(canvas)
    for i, (title, tile) in enumerate(tiles.items()):
        x, y = em + i % columns * step_x, i // columns * step_y + 2 * em
        draw.text((x, y - em // 3), title, INK, font, anchor="ls")
        canvas.paste(Image.fromarray(np.ascontiguousarray(tile)), (x, y))
    return np.asarray(canvas)


def draw_legend(entries: Sequence[tuple[str, Color]], width: int, em: int) -> Pixels:
    """Draw names beside squares of their colors, as many side by side as fit.

    Args:
        entries: Names and colors.
        width: Width of the picture in pixels; it is wider if one entry needs that.
        em: Height of the text and side of the squares in pixels.

    Returns:
        (H, W, 3) uint8.
    """
    font = ImageFont.load_default(em)
    entry = max((int(font.getlength(name)) for name, _ in entries), default=0) + 3 * em
    width = max(width, entry + em)
    per_row = (width - em) // entry
    height = em + -(-len(entries) // per_row) * 3 * em // 2
    canvas = Image.new("RGB", (width, height + em // 2), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, (name, color) in enumerate(entries):
        x, y = em + i % per_row * entry, em + i // per_row * 3 * em // 2
        draw.rectangle((x, y, x + em - 1, y + em - 1), color, INK)
        draw.text((x + 3 * em // 2, y + em - em // 6), name, INK, font, anchor="ls")
    return np.asarray(canvas)


def _check_sizes(image: Pixels, **label_maps: Labels) -> None:
    """Raise a UserError if the image is not (h, w, 3) uint8, or a label map holds no integers or has another size."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise UserError(f"the image is {image.dtype} of shape {image.shape}; expected uint8 of shape (h, w, 3)")
    for name, labels in label_maps.items():
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"{name} holds {labels.dtype}; expected integers, the number of the class of each pixel")
        if labels.shape != image.shape[:2]:
            raise UserError(f"{name} has the shape {labels.shape}, the image {image.shape[:2]}; expected equal shapes")
