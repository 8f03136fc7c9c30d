"""Data sets as LightningDataModules, usable with any network."""

from early_fusion_seg.data.base import SegmentationDataModule
from early_fusion_seg.data.camvid import CamVidDataModule
from early_fusion_seg.data.folder import FolderDataModule
from early_fusion_seg.data.synthetic import SyntheticDataModule

__all__ = ["CamVidDataModule", "FolderDataModule", "SegmentationDataModule", "SyntheticDataModule"]
