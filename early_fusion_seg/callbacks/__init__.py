"""The one place where Lightning meets drawing and files: panels, scores, throughput, predictions and results.

The callbacks ask of a module what ReverseHRNetSeg has: `class_names`, `palette`, `ignore_index`, `metrics[split]`
and `network.encoder`, and evaluation steps that return `{"prediction": (n, h, w) uint8}`; of a batch the keys `image`,
`mask` and `key`.

Shapes: n images of h x w pixels, (n, 3, h, w); labels (n, h, w); K classes.
"""

from early_fusion_seg.callbacks.class_iou import ClassIoU
from early_fusion_seg.callbacks.files import inside, pixels
from early_fusion_seg.callbacks.loggers import send_config
from early_fusion_seg.callbacks.panels import PanelLogger
from early_fusion_seg.callbacks.predictions import PredictionWriter
from early_fusion_seg.callbacks.results import ResultsWriter, check_images, show_results
from early_fusion_seg.callbacks.throughput import Throughput

__all__ = [
    "ClassIoU",
    "PanelLogger",
    "PredictionWriter",
    "ResultsWriter",
    "Throughput",
    "check_images",
    "inside",
    "pixels",
    "send_config",
    "show_results",
]
