"""Semantic segmentation with a frozen classifier: early fusion of its features in a reverse HRNet."""

__version__ = "0.1.0"

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its update check would open a connection at import

from early_fusion_seg.data import CamVidDataModule, FolderDataModule
from early_fusion_seg.encoder import FrozenEncoder
from early_fusion_seg.head import ReverseHRNet
from early_fusion_seg.labels import LabelSet
from early_fusion_seg.metrics import SegmentationMetrics
from early_fusion_seg.network import EarlyFusionNet
from early_fusion_seg.segmenter import ReverseHRNetSeg

__all__ = [
    "CamVidDataModule",
    "EarlyFusionNet",
    "FolderDataModule",
    "FrozenEncoder",
    "LabelSet",
    "ReverseHRNet",
    "ReverseHRNetSeg",
    "SegmentationMetrics",
    # "SyntheticDataModule",
]
