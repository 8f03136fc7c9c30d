"""COCO: data module, panoptic annotations, submission format of the COCO-Stuff server, and fake replicas."""

from early_fusion_seg.data.coco.datamodule import COCODataModule

__all__ = ["COCODataModule"]
