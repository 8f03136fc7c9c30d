"""Inference: from images of any kind to label maps and class probabilities."""

from early_fusion_seg.inference.calibration import CalibrationMetrics, score_pixels
from early_fusion_seg.inference.eval_copy import eval_copy
from early_fusion_seg.inference.image_tensor import image_tensor
from early_fusion_seg.inference.label_map import upsampled_argmax
from early_fusion_seg.inference.predictor import Predictor
from early_fusion_seg.inference.settings import InferenceSettings, InputSize

__all__ = [
    "CalibrationMetrics",
    "InferenceSettings",
    "InputSize",
    "Predictor",
    "eval_copy",
    "image_tensor",
    "score_pixels",
    "upsampled_argmax",
]
