"""COCO: the data module, panoptic segments, the format of the stuff server, and fake replicas."""

from early_fusion_seg.data.coco.datamodule import COCODataModule

__all__ = ["COCODataModule"]
