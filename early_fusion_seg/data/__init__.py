"""Data sets as LightningDataModules, usable with any network."""

from early_fusion_seg.data.base import SegmentationDataModule
from early_fusion_seg.data.camvid import CamVidDataModule
from early_fusion_seg.data.cityscapes import CityscapesDataModule
from early_fusion_seg.data.coco import COCODataModule
from early_fusion_seg.data.folder import FolderDataModule
from early_fusion_seg.data.mapillary import MapillaryVistasDataModule
from early_fusion_seg.data.synthetic import SyntheticDataModule
from early_fusion_seg.data.voc import VOCDataModule

__all__ = [
    "COCODataModule",
    "CamVidDataModule",
    "CityscapesDataModule",
    "FolderDataModule",
    "MapillaryVistasDataModule",
    "SegmentationDataModule",
    "SyntheticDataModule",
    "VOCDataModule",
]
