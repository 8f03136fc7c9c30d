"""Inference: from one image of any kind to its label map."""

from early_fusion_seg.inference.eval_copy import eval_copy
from early_fusion_seg.inference.image_tensor import image_tensor
from early_fusion_seg.inference.label_map import upsampled_argmax

__all__ = ["eval_copy", "image_tensor", "upsampled_argmax"]
