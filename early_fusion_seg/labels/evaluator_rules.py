"""The two rules in which official evaluators of benchmarks differ: absent classes and void predictions."""

from typing import Literal, NamedTuple

AbsentClassRule = Literal["nan-skip", "gt-only", "zero", "strict-nan"]
"""How a class that is absent from the ground truth counts in the mean IoU.

nan-skip: as 0 if it was predicted, otherwise not at all (Cityscapes, Mapillary Vistas, mmsegmentation).
gt-only: not at all (COCO-Stuff, detectron2).
zero: as 0, in the mean accuracy too (SegNet's CamVid). This rule is that of SegNet's script, in which a void prediction
    is always wrong in the pixel accuracy.
strict-nan: as 0 if it was predicted, otherwise the mean is nan (PASCAL VOC).
"""

VoidPredictionRule = Literal["fn", "drop", "error"]
"""How a labeled pixel counts that is predicted as void.

fn: as a false negative. drop: not at all. error: it raises an error, also where the ground truth is ignored.
"""


class EvaluatorRules(NamedTuple):
    """The rules of one official evaluator."""

    absent: AbsentClassRule
    pred_void: VoidPredictionRule
