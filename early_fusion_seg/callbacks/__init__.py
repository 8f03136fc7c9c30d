"""Lightning callbacks: checkpoints, averaged weights, scores, throughput, panels, predictions and results.

The callbacks that read the model need what ReverseHRNetSeg has: `class_names`, `palette`, `ignore_index`,
`metrics[split]`, `network.encoder`, and evaluation steps that return `{"prediction": (n, h, w) uint8}`. `predict_step`
may also return `confidence` and `probabilities`. They read the keys `image`, `mask` and `key` of a batch.

Shapes: n images of h x w pixels, (n, 3, h, w); labels (n, h, w); K classes.
"""

from early_fusion_seg.callbacks.class_iou import ClassIoU
from early_fusion_seg.callbacks.ema import HeadEMA
from early_fusion_seg.callbacks.image_files import path_inside, to_pixels
from early_fusion_seg.callbacks.last_checkpoint import LastCheckpoint
from early_fusion_seg.callbacks.loggers import log_config
from early_fusion_seg.callbacks.panels import PanelLogger
from early_fusion_seg.callbacks.predictions import PredictionWriter
from early_fusion_seg.callbacks.predictions_of_heads import PredictionsOfHeads
from early_fusion_seg.callbacks.results import ResultsWriter, check_images, show_results
from early_fusion_seg.callbacks.step_timer import StepTimer
from early_fusion_seg.callbacks.throughput import Throughput
from early_fusion_seg.callbacks.validate_at_end import ValidateAtEnd

__all__ = [
    "ClassIoU",
    "HeadEMA",
    "LastCheckpoint",
    "PanelLogger",
    "PredictionWriter",
    "PredictionsOfHeads",
    "ResultsWriter",
    "StepTimer",
    "Throughput",
    "ValidateAtEnd",
    "check_images",
    "log_config",
    "path_inside",
    "show_results",
    "to_pixels",
]
