"""Label sets: the classes of a data set and their numbers in mask files, as rows of CSV files."""

from early_fusion_seg.labels.label_set import IGNORE_INDEX, LabelRow, LabelSet, in_ranges, load_label_set, packaged_rows
from early_fusion_seg.labels.mask_colors import read_mask_or_colors

__all__ = [
    "IGNORE_INDEX",
    "LabelRow",
    "LabelSet",
    "in_ranges",
    "load_label_set",
    "packaged_rows",
    "read_mask_or_colors",
]
