"""Load the model of a checkpoint, and check that options and data agree with the checkpoint."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from early_fusion_seg.data import SegmentationDataModule
from early_fusion_seg.data.folder import FolderDataModule
from early_fusion_seg.encoder.encoder_checkpoint import read_checkpoint
from early_fusion_seg.errors import UserError
from early_fusion_seg.segmenter import ReverseHRNetSeg


def load_model(path: str, given: Mapping[str, Any]) -> ReverseHRNetSeg:
    """Load the model of a checkpoint, reading the file once.

    Args:
        path: The checkpoint.
        given: Model options of the command line; `encoder_weights` replaces the stored source of the weights.

    Raises:
        UserError: Another option differs from the stored one, or the checkpoint cannot be loaded.
    """
    checkpoint = read_checkpoint(path)
    check_hparams_match(given, checkpoint["hyper_parameters"], path)
    stored = checkpoint["encoder"]["weights"]
    weights = given.get("encoder_weights", stored)
    override = {} if weights == stored else {"encoder_weights": weights}
    return ReverseHRNetSeg.from_checkpoint(checkpoint, path, **override)


def check_hparams_match(given: Mapping[str, Any], stored: Mapping[str, Any], path: str) -> None:
    """Check that model options equal the hyperparameters of the checkpoint; `encoder_weights` may differ.

    An option that the checkpoint lacks is newer than the checkpoint and has its default there.

    Raises:
        UserError: Names the first option that differs.
    """
    defaults = {name: p.default for name, p in inspect.signature(ReverseHRNetSeg).parameters.items()}
    stored = defaults | dict(stored)
    for key, value in given.items():
        if key not in stored:
            raise UserError(f"model.{key} is not an option of the model; its options are {', '.join(stored)}")
        if key != "encoder_weights" and json.dumps(value) != json.dumps(stored[key]):
            raise UserError(
                f"model.{key} is {value!r}, but {stored[key]!r} in {path}; leave the option out, or pass the "
                "config.yaml of the run that wrote the checkpoint as --config"
            )


def is_plain_folder(data: SegmentationDataModule, command: str) -> bool:
    """Return whether the data is a folder of images to predict, without a label CSV."""
    return command == "predict" and isinstance(data, FolderDataModule) and not data.labels.is_file()


def check_classes_match(names: Sequence[str], stored: Sequence[str], path: str) -> None:
    """Check that data and checkpoint have the same classes.

    Raises:
        UserError: Names the first difference.
    """
    for i, (name, other) in enumerate(zip(names, stored, strict=False)):
        if name != other:
            raise UserError(
                f"class {i} is {name!r} in the data, but {other!r} in {path}; use the data set of that model"
            )
    if len(names) != len(stored):
        raise UserError(
            f"the data has {len(names)} classes, but {path} has {len(stored)}; use the data set of that model"
        )
