"""A model from its checkpoint, and nothing that contradicts it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from early_fusion_seg.checkpoint import read_checkpoint
from early_fusion_seg.data import FolderDataModule, SegmentationDataModule
from early_fusion_seg.errors import UserError
from early_fusion_seg.segmenter import ReverseHRNetSeg


def load_model(path: str, given: Mapping[str, Any]) -> ReverseHRNetSeg:
    """Load the model of a checkpoint.

    Args:
        path: The checkpoint.
        given: What the configuration says of the model: `encoder_weights` replaces the stored place of the encoder.

    Raises:
        UserError: Anything else differs from what is stored, or the checkpoint cannot be loaded.
    """
    checkpoint = read_checkpoint(path)
    check_hparams_match(given, checkpoint["hyper_parameters"], path)
    weights = given.get("encoder_weights", checkpoint["encoder"]["weights"])
    override = {} if weights == checkpoint["encoder"]["weights"] else {"encoder_weights": weights}
    return ReverseHRNetSeg.load_from_checkpoint(path, **override)


def check_hparams_match(given: Mapping[str, Any], stored: Mapping[str, Any], path: str) -> None:
    """Check that nothing said of the model contradicts its checkpoint; where its encoder is now may differ.

    Raises:
        UserError: Names the first setting that does.
    """
    for key, value in given.items():
        if key not in stored:
            raise UserError(f"model.{key} is not a setting of the model; it has {', '.join(stored)}")
        if key != "encoder_weights" and json.dumps(value) != json.dumps(stored[key]):
            raise UserError(
                f"model.{key} is {value!r}, but {stored[key]!r} in {path}, which decides; "
                "give --config the config.yaml of the run that wrote it"
            )


def is_plain_folder(data: SegmentationDataModule, command: str) -> bool:
    """Tell whether this is a folder of images to predict, of which nobody has said what classes it has."""
    return command == "predict" and isinstance(data, FolderDataModule) and not data.labels.is_file()


def check_classes_match(names: Sequence[str], stored: Sequence[str], path: str) -> None:
    """Check that data and checkpoint have the same classes.

    Raises:
        UserError: Names the first difference.
    """
    for i, (name, other) in enumerate(zip(names, stored, strict=False)):
        if name != other:
            raise UserError(
                f"class {i} is {name!r} in the data, but {other!r} in {path}; use the data it was trained on"
            )
    if len(names) != len(stored):
        raise UserError(
            f"the data has {len(names)} classes, but {path} has {len(stored)}; use the data it was trained on"
        )
