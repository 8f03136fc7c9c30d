"""Inference: label maps from logits, in bounded memory."""

from early_fusion_seg.inference.label_map import upsampled_argmax

__all__ = ["upsampled_argmax"]
