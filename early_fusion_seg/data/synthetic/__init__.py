"""Synthetic street scenes: the data module, and the functions that draw the scenes."""

from early_fusion_seg.data.synthetic.datamodule import SceneSource, SyntheticDataModule

__all__ = ["SceneSource", "SyntheticDataModule"]
