"""Find a checkpoint, load its model, and check that options and data agree with it."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_only

from early_fusion_seg.cli.messages import echo
from early_fusion_seg.cli.output import RUNS
from early_fusion_seg.data import SegmentationDataModule
from early_fusion_seg.data.folder import FolderDataModule
from early_fusion_seg.encoder.encoder_checkpoint import read_checkpoint
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.segmenter import ReverseHRNetSeg

SHOWN = 5  # checkpoints that are named if another one is missing


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


def check_not_finished(checkpoint: Mapping[str, Any], trainer: Mapping[str, Any], path: str) -> None:
    """Check that a training can resume from a checkpoint, and has not reached its end.

    Args:
        checkpoint: Contents of the checkpoint to resume from.
        trainer: The arguments of Lightning's Trainer.
        path: The checkpoint, for the message.

    Raises:
        UserError: The checkpoint has no optimizer state, or a limit has been reached, which is named.
    """
    if "optimizer_states" not in checkpoint:
        raise UserError(
            f"{path} has weights but no optimizer state, so a training cannot resume from it; "
            "give the last.ckpt of a run"
        )
    loop = checkpoint["loops"]["fit_loop"]
    done = {"max_epochs": loop["epoch_progress"]["current"]["processed"], "max_steps": checkpoint["global_step"]}
    for name, count in done.items():
        limit = trainer[name]
        if limit is not None and 0 <= limit <= count:
            raise UserError(
                f"trainer.{name} is {limit}, and {path} was saved after {count} {name.removeprefix('max_')}: "
                f"nothing is left to train; raise {name}"
            )
    timer = Timer(trainer["max_time"])
    timer.load_state_dict(checkpoint["callbacks"].get("Timer", {"time_elapsed": {}}))
    remaining = timer.time_remaining()
    if remaining is not None and remaining <= 0:
        raise UserError(
            f"trainer.max_time is {trainer['max_time']}, and {path} was saved after {timer.time_elapsed():.0f} s, so "
            "nothing is left to train; raise max_time, which counts from the first start of the run"
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


def find_checkpoint(name: str | None) -> str | None:
    """Return the path for `--ckpt_path NAME`; best and last are `best.ckpt` and `last.ckpt` of the newest run.

    Raises:
        MissingFileError: There is none; the message names checkpoints that exist.
    """
    if name is None or "://" in name:
        return name  # a remote address is refused when it is read
    path = Path(name).expanduser()
    if path.is_file():
        return str(path)
    found = checkpoints_in_runs()
    if name in ("best", "last"):
        found = [other for other in found if other.name == f"{name}.ckpt"]
        if found:
            rank_zero_only(echo)(f"--ckpt_path {name}: {found[0]}")
            return str(found[0])
    elif path.is_dir():
        found = sorted(path.rglob("*.ckpt")) or found
    known = ", ".join(map(str, found[:SHOWN])) or f"none below {RUNS}/; `early-fusion-seg fit` writes them"
    raise MissingFileError(f"there is no checkpoint {name}; existing ones: {known}")


def checkpoints_in_runs() -> list[Path]:
    """Return the checkpoints of the runs below `runs/`, those written last first."""
    found = [*RUNS.glob("*/checkpoints/*.ckpt"), *RUNS.glob("*/*/checkpoints/*.ckpt"), *RUNS.glob("demo*/*.ckpt")]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def folder_names(checkpoints: Sequence[str]) -> list[str]:
    """Return a folder name for each of several checkpoints.

    It is the name of the file, or where several have the same, that of the first folder in which these differ.

    Example:
        >>> folder_names(["road.ckpt", "runs/cracks/checkpoints/best.ckpt", "runs/rust/checkpoints/best.ckpt"])
        ['road', 'cracks', 'rust']
        >>> folder_names(["a/road.ckpt", "a/road.ckpt"])
        ['1_road', '2_road']
    """
    paths = [Path(path).resolve() for path in checkpoints]
    parts = [[path.stem, *(folder.name for folder in path.parents)] for path in paths]
    names = []
    for part in parts:
        levels = list(zip(*(other for other in parts if other[0] == part[0]), strict=False))
        depth = next((i for i, level in enumerate(levels) if len(set(level)) == len(level)), 0)
        names.append(part[depth])
    if len({name.casefold() for name in names}) < len(names):  # some file systems do not tell the case
        return [f"{i}_{path.stem}" for i, path in enumerate(paths, start=1)]
    return names
