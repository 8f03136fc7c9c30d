"""Inference: from images of any kind to label maps and class probabilities."""

from early_fusion_seg.inference.calibration import CalibrationMetrics, score_pixels
from early_fusion_seg.inference.eval_copy import eval_copy
from early_fusion_seg.inference.image_tensor import Images, for_each_image
from early_fusion_seg.inference.label_map import upsampled_argmax
from early_fusion_seg.inference.predictor import Prediction, Predictor
from early_fusion_seg.inference.settings import InferenceSettings, InputSize

__all__ = [
    "CalibrationMetrics",
    "Images",
    "InferenceSettings",
    "InputSize",
    "Prediction",
    "Predictor",
    "eval_copy",
    "for_each_image",
    "score_pixels",
    "upsampled_argmax",
]
