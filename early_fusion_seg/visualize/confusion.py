"""A confusion matrix as a picture.

Shapes: K classes, H, W height and width of the picture.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from early_fusion_seg.visualize.panels import INK, PAPER, Color, Pixels

FULL: Color = (8, 48, 107)
NO_TRUTH: Color = (225, 225, 225)
NAMED = 40
"""Up to so many classes have names and numbers; more have the number of every tenth train id."""
EM, CELL, SIDE, LONGEST_NAME = 14, 36, 720, 30
"""Height of letters, cell of a named class, about the side of a matrix without names, in pixels; letters of a name."""
TITLE = "% of each class's pixels; rows: truth, columns: prediction"


def confusion_picture(confusion: NDArray[np.integer[Any]], class_names: Sequence[str]) -> Pixels:
    """Draw a confusion matrix, each row divided by its sum; rows without truth are gray.

    The darkness of a cell is the square root of its share, so that one per cent can be seen.

    Args:
        confusion: (K, K) counts, rows truth, columns predictions.
        class_names: The K names.

    Returns:
        (H, W, 3) uint8.
    """
    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))  # (K, K)
    k = len(shares)
    named = k <= NAMED
    cell = CELL if named else max(4, SIDE // k)
    labels = [name[:LONGEST_NAME] if named else str(i) * (i % 10 == 0) for i, name in enumerate(class_names)]
    font = ImageFont.load_default(EM)
    margin = int(max(font.getlength(label) for label in labels)) + EM  # of the longest label
    left, top = margin + EM, margin + 3 * EM
    width = max(left + k * cell, 2 * EM + int(font.getlength(TITLE))) + EM
    paper = Image.new("RGB", (width, top + k * cell + EM), PAPER)
    draw = ImageDraw.Draw(paper)
    draw.text((EM, 2 * EM), TITLE, INK, font, anchor="ls")
    paper.paste(Image.fromarray(_cells(shares, confusion.sum(1) > 0, cell)), (left, top))
    paper.paste(_column_labels(labels, cell, margin, font), (left - EM, top - margin))
    for i, label in enumerate(labels):
        draw.text((left - EM // 2, top + i * cell + cell // 2), label, INK, font, anchor="rm")
    if named:
        for i, j in np.argwhere(shares >= 0.005):
            x, y = left + j * cell + cell // 2, top + i * cell + cell // 2
            color = PAPER if shares[i, j] > 0.25 else INK
            draw.text((x, y), f"{100 * shares[i, j]:.0f}", color, font, anchor="mm")
    return np.asarray(paper)


def _cells(shares: NDArray[np.floating[Any]], in_truth: NDArray[np.bool_], cell: int) -> Pixels:
    """Paint shares (K, K) as squares: (K * cell, K * cell, 3)."""
    depth = np.sqrt(shares)[..., None]
    colors = np.array(PAPER) * (1 - depth) + np.array(FULL) * depth
    colors[~in_truth] = NO_TRUTH
    painted: Pixels = np.rint(colors).astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    painted[:: len(painted) - 1] = painted[:, :: len(painted) - 1] = INK  # a frame
    return painted


def _column_labels(labels: Sequence[str], cell: int, margin: int, font: Any) -> Image.Image:
    """Write the labels from below upwards, each above its column; the strip is wider by EM on both sides."""
    strip = Image.new("RGB", (margin, len(labels) * cell + 2 * EM), PAPER)
    draw = ImageDraw.Draw(strip)
    for i, label in enumerate(labels):
        draw.text((EM // 2, EM + i * cell + cell // 2), label, INK, font, anchor="lm")
    return strip.transpose(Image.Transpose.ROTATE_90)
