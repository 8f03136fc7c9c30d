"""Semantic segmentation with a frozen classifier: early fusion of its features in a reverse HRNet."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from early_fusion_seg.data import CamVidDataModule as CamVidDataModule
    from early_fusion_seg.data import CityscapesDataModule as CityscapesDataModule
    from early_fusion_seg.data import COCODataModule as COCODataModule
    from early_fusion_seg.data import FolderDataModule as FolderDataModule
    from early_fusion_seg.data import MapillaryVistasDataModule as MapillaryVistasDataModule
    from early_fusion_seg.data import SyntheticDataModule as SyntheticDataModule
    from early_fusion_seg.data import VOCDataModule as VOCDataModule
    from early_fusion_seg.encoder import FrozenEncoder as FrozenEncoder
    from early_fusion_seg.head import ReverseHRNet as ReverseHRNet
    from early_fusion_seg.labels import LabelSet as LabelSet
    from early_fusion_seg.metrics import SegmentationMetrics as SegmentationMetrics
    from early_fusion_seg.network import EarlyFusionNet as EarlyFusionNet
    from early_fusion_seg.segmenter import ReverseHRNetSeg as ReverseHRNetSeg

__version__ = "0.1.0"

_MODULES = {
    "COCODataModule": "data",
    "CamVidDataModule": "data",
    "CityscapesDataModule": "data",
    "EarlyFusionNet": "network",
    "FolderDataModule": "data",
    "FrozenEncoder": "encoder",
    "LabelSet": "labels",
    "MapillaryVistasDataModule": "data",
    "ReverseHRNet": "head",
    "ReverseHRNetSeg": "segmenter",
    "SegmentationMetrics": "metrics",
    "SyntheticDataModule": "data",
    "VOCDataModule": "data",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: torch, timm and Lightning take seconds, `--help` needs none of them."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
