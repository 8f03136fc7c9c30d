"""The run folder: its checkpoints, loggers and metrics, and the messages at the end of a run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from early_fusion_seg.callbacks import PredictionWriter
from early_fusion_seg.callbacks.last_checkpoint import LastCheckpoint
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.atomic import last_number

LoggerName = Literal["csv", "tensorboard", "wandb"]
INSTALL = {"tensorboard": "pip install 'early-fusion-seg[tensorboard]'", "wandb": "pip install wandb"}
CHECKPOINTS = "checkpoints"


def run_folder(checkpoint: str | None) -> Path | None:
    """Return the folder of the run that wrote a checkpoint, if the file is still where `best_and_last` puts it."""
    folder = Path(checkpoint or "").parent
    return folder.parent if folder.name == CHECKPOINTS else None


def best_and_last(folder: Path, every_n_steps: int) -> list[Checkpoint]:
    """Return callbacks that save `best.ckpt` (highest val/mIoU) and `last.ckpt`; a resumed run replaces both."""
    folder = folder / CHECKPOINTS
    best = ModelCheckpoint(folder, "best", monitor="val/mIoU", mode="max", enable_version_counter=False)
    return [best, LastCheckpoint(folder, every_n_steps)]


@contextmanager
def preserve_metrics_csv(folder: Path) -> Iterator[None]:
    """Rename the metrics.csv of an earlier run in the same folder, which the CSV logger would delete.

    The file gets its name back if no new one was written: after an early error, or by `predict`.
    """
    metrics = folder / "metrics.csv"
    if getattr(rank_zero_only, "rank", 0) or not metrics.is_file():
        yield
        return
    earlier = metrics.replace(folder / f"metrics_{max(0, last_number(folder, 'metrics_')) + 1}.csv")
    try:
        yield
    finally:
        if not metrics.exists():
            earlier.replace(metrics)


def make_loggers(names: LoggerName | list[LoggerName], folder: Path) -> list[Logger]:
    """Return the CSV logger, then the other loggers by name.

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
        loggers.append(WandbLogger(project="early-fusion-seg", save_dir=folder))
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
def report_checkpoint(trainer: Trainer) -> None:
    """Print score and path of the best checkpoint."""
    best = trainer.checkpoint_callback
    if isinstance(best, ModelCheckpoint) and best.best_model_score is not None:
        print(f"best val/mIoU {100 * float(best.best_model_score):.1f} %: {best.best_model_path}")


@rank_zero_only
def report_stop(trainer: Trainer) -> None:
    """Print on stderr that SIGTERM stopped the run, and how to resume it."""
    saved = [str(c.path) for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint) and c.saved]
    saved = [path for path in saved if Path(path).is_file()]
    advice = f"resume with --ckpt_path {saved[0]}" if saved else "no checkpoint was saved yet"
    print(f"stopped by SIGTERM; {advice}", file=sys.stderr)


@rank_zero_only
def report_predictions(writer: PredictionWriter) -> None:
    """Print the folder of the predictions, and on stderr the files that could not be read or written."""
    print(f"written: {writer.folder}")
    if writer.unreadable:
        print("\n".join(["files that could not be read or written:", *writer.unreadable]), file=sys.stderr)
