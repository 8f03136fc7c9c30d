"""Drawing of a confusion matrix.

Shapes: K classes, H x W the size of the picture.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from early_fusion_seg.visualize.panels import INK, PAPER, Color, Pixels

DARKEST: Color = (8, 48, 107)
NO_TRUTH: Color = (225, 225, 225)
MAX_NAMED_CLASSES = 40
"""Up to this number of classes, names and percentages are drawn; above it, only every tenth train id."""
EM, CELL, SIDE = 14, 36, 720
"""In pixels: font size; side of a cell with a name; approximate side of a matrix without names."""
MAX_NAME_LENGTH = 30
"""Characters after which a name is cut off."""
TITLE = "% of each class's pixels; rows: truth, columns: prediction"


def confusion_picture(confusion: NDArray[np.integer[Any]], class_names: Sequence[str]) -> Pixels:
    """Draw a confusion matrix with each row divided by its sum; rows of classes without ground truth are gray.

    The darkness of a cell is the square root of its fraction of the row, so that 1 % is visible.

    Args:
        confusion: (K, K) pixel counts; rows ground truth, columns prediction.
        class_names: The K names.

    Returns:
        (H, W, 3) uint8.
    """
    fractions = confusion / np.maximum(1, confusion.sum(1, keepdims=True))  # (K, K)
    k = len(fractions)
    named = k <= MAX_NAMED_CLASSES
    cell = CELL if named else max(4, SIDE // k)
    labels = [name[:MAX_NAME_LENGTH] if named else str(i) * (i % 10 == 0) for i, name in enumerate(class_names)]
    font = ImageFont.load_default(EM)
    margin = int(max(font.getlength(label) for label in labels)) + EM  # room for the longest label
    left, top = margin + EM, margin + 3 * EM
    width = max(left + k * cell, 2 * EM + int(font.getlength(TITLE))) + EM
    canvas = Image.new("RGB", (width, top + k * cell + EM), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((EM, 2 * EM), TITLE, INK, font, anchor="ls")
    canvas.paste(Image.fromarray(_cells(fractions, confusion.sum(1) > 0, cell)), (left, top))
    canvas.paste(_column_labels(labels, cell, margin, font), (left - EM, top - margin))
    for i, label in enumerate(labels):
        draw.text((left - EM // 2, top + i * cell + cell // 2), label, INK, font, anchor="rm")
    if named:
        for i, j in np.argwhere(fractions >= 0.005):
            x, y = left + j * cell + cell // 2, top + i * cell + cell // 2
            color = PAPER if fractions[i, j] > 0.25 else INK
            draw.text((x, y), f"{100 * fractions[i, j]:.0f}", color, font, anchor="mm")
    return np.asarray(canvas)


def _cells(fractions: NDArray[np.floating[Any]], in_truth: NDArray[np.bool_], cell: int) -> Pixels:
    """Draw row fractions (K, K) as squares of color: (K * cell, K * cell, 3)."""
    darkness = np.sqrt(fractions)[..., None]
    colors = np.array(PAPER) * (1 - darkness) + np.array(DARKEST) * darkness
    colors[~in_truth] = NO_TRUTH
    cells: Pixels = np.rint(colors).astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    cells[:: len(cells) - 1] = cells[:, :: len(cells) - 1] = INK  # frame
    return cells


def _column_labels(labels: Sequence[str], cell: int, margin: int, font: Any) -> Image.Image:
    """Draw the labels turned by 90 degrees, each above its column, with a margin of EM at both ends."""
    strip = Image.new("RGB", (margin, len(labels) * cell + 2 * EM), PAPER)
    draw = ImageDraw.Draw(strip)
    for i, label in enumerate(labels):
        draw.text((EM // 2, EM + i * cell + cell // 2), label, INK, font, anchor="lm")
    return strip.transpose(Image.Transpose.ROTATE_90)
