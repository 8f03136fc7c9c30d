"""The two rules in which the benchmarks' official evaluators differ: absent classes and void predictions."""

from typing import Literal, NamedTuple

AbsentClassRule = Literal["nan-skip", "gt-only", "zero", "strict-nan"]
"""How a class that is absent from the ground truth counts in the mean.

nan-skip: 0 if it was predicted somewhere, else left out (Cityscapes, Mapillary Vistas, mmsegmentation).
gt-only: always left out (COCO-Stuff, detectron2). zero: always 0 (SegNet's CamVid).
strict-nan: 0 if it was predicted somewhere, else the mean is nan (PASCAL VOC).
"""

VoidPredictionRule = Literal["fn", "drop", "error"]
"""How a labeled pixel that is predicted as void counts: as a false negative, not at all, or as an error."""


class EvaluatorRules(NamedTuple):
    """The rules of one evaluator."""

    absent: AbsentClassRule
    pred_void: VoidPredictionRule
