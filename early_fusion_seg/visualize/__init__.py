"""Drawing of label maps, panels and confusion matrices: arrays in, arrays out."""

from early_fusion_seg.visualize.confusion import confusion_picture
from early_fusion_seg.visualize.panels import (
    IGNORED,
    INK,
    LARGEST_TILE,
    PAPER,
    SMALLEST_TILE,
    WRONG,
    Labels,
    Pixels,
    colorize,
    draw_legend,
    error_map,
    fit_tile,
    overlay,
    panel,
    sheet,
)

__all__ = [
    "IGNORED",
    "INK",
    "LARGEST_TILE",
    "PAPER",
    "SMALLEST_TILE",
    "WRONG",
    "Labels",
    "Pixels",
    "colorize",
    "confusion_picture",
    "draw_legend",
    "error_map",
    "fit_tile",
    "overlay",
    "panel",
    "sheet",
]
