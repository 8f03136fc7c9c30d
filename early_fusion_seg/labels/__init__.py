"""Label sets: which numbers in a mask mean which class, as rows in CSV files."""

from early_fusion_seg.labels.label_set import IGNORE_INDEX, LabelRow, LabelSet, in_ranges, load_label_set, packaged_rows

__all__ = ["IGNORE_INDEX", "LabelRow", "LabelSet", "in_ranges", "load_label_set", "packaged_rows"]
