"""Data sets as LightningDataModules, usable with any network.

To add a data set, subclass `SegmentationDataModule`. The classes and functions that a subclass needs are exported here.
"""

from early_fusion_seg.data.datamodule import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import FileSource, Item, Source
from early_fusion_seg.data.layout import Layout
from early_fusion_seg.data.listing import files_below, matched
from early_fusion_seg.data.replica import Replica
from early_fusion_seg.data.submission import SubmissionFormat

__all__ = [
    "FileSource",
    "Item",
    "Layout",
    "Replica",
    "SegmentationDataModule",
    "Source",
    "Split",
    "SubmissionFormat",
    "built_in_datasets",
    "files_below",
    "matched",
]


def built_in_datasets() -> dict[str, type[SegmentationDataModule]]:
    """Return the data modules of this package, keyed by the name of their file or folder: camvid, cityscapes, ..."""
    import early_fusion_seg  # its data modules import this package

    kinds = [getattr(early_fusion_seg, name) for name in early_fusion_seg.__all__ if name.endswith("DataModule")]
    found = {kind.__module__.removeprefix(f"{__name__}.").partition(".")[0]: kind for kind in kinds}
    return dict(sorted(found.items()))
