"""The run folder: its checkpoints, loggers and metrics, and the messages at the end of a run."""

import contextlib
import math
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import rich
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.table import Table

from early_fusion_seg.callbacks import PredictionsOfHeads, PredictionWriter
from early_fusion_seg.callbacks.best_checkpoint import BestCheckpoint
from early_fusion_seg.callbacks.class_iou import names_for_loggers
from early_fusion_seg.callbacks.last_checkpoint import LastCheckpoint
from early_fusion_seg.errors import UserError, is_ctrl_c
from early_fusion_seg.io.terminal import plain

LoggerName = Literal["csv", "tensorboard", "wandb"]
INSTALL = {"tensorboard": "pip install 'early-fusion-seg[tensorboard]'", "wandb": "pip install wandb"}
CHECKPOINTS = "checkpoints"
NO_SCORE = "val/mIoU is not a number, as no pixel of val has a label; the first checkpoint"
RUNS = Path("runs")
"""The runs whose folder is not given: `runs/COMMAND/version_N`."""


def run_folder(checkpoint: str | None) -> Path | None:
    """Return the folder of the run that wrote a checkpoint, if the file is still where `best_and_last` puts it."""
    folder = Path(checkpoint or "").parent
    return folder.parent if folder.name == CHECKPOINTS else None


def best_and_last(folder: Path, every_n_steps: int) -> list[Checkpoint]:
    """Return callbacks that save `best.ckpt` (highest val/mIoU) and `last.ckpt`; a resumed run replaces both."""
    folder = folder / CHECKPOINTS
    return [BestCheckpoint(folder), LastCheckpoint(folder, every_n_steps)]


def output_folder(name: str | None) -> Path | None:
    """Return the folder for `--output NAME`; `~` is the home folder.

    Raises:
        UserError: It is a remote address.
    """
    if name is None:
        return None
    if "://" in name:
        raise UserError(f"--output {name} is a remote address; give a local folder, and copy the results from there")
    return Path(name).expanduser()


def check_no_other_run(folder: Path, resumed: str | None) -> None:
    """Check that a folder to train into has no checkpoints of another run than the one that is resumed.

    Raises:
        UserError: It has; training would replace them.
    """
    own = run_folder(resumed)
    found = sorted(path.name for path in (folder / CHECKPOINTS).glob("*.ckpt"))
    if found and (own is None or own.resolve() != folder.resolve()):
        raise UserError(
            f"{folder / CHECKPOINTS} has the checkpoints of another run ({', '.join(found)}), which training would "
            f"replace; give another --output, or resume that run with --ckpt_path {folder / CHECKPOINTS / found[-1]}"
        )


def make_loggers(
    names: LoggerName | list[LoggerName], folder: Path, wandb: Mapping[str, Any] | None = None
) -> list[Logger]:
    """Return the CSV logger, then the other loggers by name; `wandb` are options of W&B's run.

    Raises:
        UserError: The package of a logger is not installed.
    """
    requested = [names] if isinstance(names, str) else names
    for name in INSTALL.keys() & set(requested):
        if find_spec(name) is None:
            raise UserError(f"--logger {name} needs {name}, which is not installed: {INSTALL[name]}")
    loggers: list[Logger] = [CSVLogger(folder, name="", version="")]
    if "tensorboard" in requested:
        loggers.append(TensorBoardLogger(folder, name="", version=""))
    if "wandb" in requested:
        project = {"project": os.environ.get("WANDB_PROJECT", "early-fusion-seg")}
        loggers.append(WandbLogger(save_dir=folder, **(project | dict(wandb or {}))))
    return loggers


def start_wandb(loggers: list[Logger]) -> None:
    """Start the run of a W&B logger, before any slow work.

    Raises:
        UserError: W&B has no account or no connection.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            from wandb.errors import Error  # takes more than a second to import

            try:
                _ = logger.experiment
            except Error as error:
                reason = str(error).splitlines()[0].rstrip(".")
                raise UserError(
                    f"W&B does not start ({reason}); run `wandb login` to sign in, or set WANDB_MODE=offline to work "
                    "without a connection and upload later with `wandb sync`"
                ) from error


@rank_zero_only
def report_classes(trainer: Trainer, class_names: Sequence[str]) -> None:
    """Print the IoU of each class in the last validation."""
    table = Table(title="last validation", title_justify="left")
    table.add_column("class")
    table.add_column("IoU %", justify="right")
    for name, key in zip(class_names, names_for_loggers(class_names), strict=True):
        iou = trainer.callback_metrics.get(f"val/IoU/{key}")
        table.add_row(plain(name), "-" if iou is None else f"{100 * float(iou):.1f}")
    if any(name.startswith("val/IoU/") for name in trainer.callback_metrics):
        rich.get_console().print(table)


@rank_zero_only
def report_checkpoint(trainer: Trainer) -> None:
    """Print score and path of the best checkpoint, and the commands that use it."""
    for best in trainer.checkpoint_callbacks:
        if isinstance(best, BestCheckpoint) and best.best_model_score is not None:
            score = float(best.best_model_score)
            words = f"best val/mIoU {100 * score:.1f} %" if math.isfinite(score) else NO_SCORE
            path = shlex.quote(os.path.relpath(best.best_model_path))
            config = shlex.quote(os.path.relpath(Path(trainer.default_root_dir, "config.yaml")))
            print(f"next: early-fusion-seg validate --config {config} --ckpt_path {path}")
            print(f"  or: early-fusion-seg predict FOLDER_OF_IMAGES --ckpt_path {path}")
            print(f"{words}: {best.best_model_path}")


def stop_signal(trainer: Trainer, error: BaseException) -> signal.Signals | None:
    """Return the signal that ended a run with an error, None if the error has another reason."""
    if is_ctrl_c(error):
        return signal.SIGINT
    received = [c.received for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)]
    lightnings = signal.SIGTERM if isinstance(error, SIGTERMException) else None  # without LastCheckpoint
    return next(filter(None, received), lightnings)


@rank_zero_only
def report_stop(trainer: Trainer, number: signal.Signals) -> None:
    """Print on stderr which signal stopped the run, and how to resume it."""
    saved = [str(c.path) for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint) and c.saved]
    saved = [path for path in saved if Path(path).is_file()]
    advice = f"resume with --ckpt_path {shlex.quote(saved[0])}" if saved else "no checkpoint was saved yet"
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(f"stopped by {number.name}; {advice}", file=sys.stderr)


@rank_zero_only
def report_predictions(writer: PredictionWriter | PredictionsOfHeads) -> None:
    """Print the folder of the predictions, and on stderr the files that could not be read or written."""
    print(f"written: {writer.folder}")
    if writer.unreadable:
        print("\n".join(["files that could not be read or written:", *writer.unreadable]), file=sys.stderr)
