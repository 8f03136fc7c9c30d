"""The folder of a run: configuration, checkpoints, loggers, and what is said when it ends."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
CHECKPOINTS = "checkpoints"


def run_folder(checkpoint: str | None) -> Path | None:
    """Return the folder of the run that wrote a checkpoint, if it still lies where `best_and_last` put it."""
    folder = Path(checkpoint or "").parent
    return folder.parent if folder.name == CHECKPOINTS else None


def best_and_last(folder: Path, every_n_steps: int) -> list[Checkpoint]:
    """Keep `best.ckpt` (val/mIoU) and `last.ckpt`; a run that goes on in the same folder replaces them."""
    folder = folder / CHECKPOINTS
    best = ModelCheckpoint(folder, "best", monitor="val/mIoU", mode="max", enable_version_counter=False)
    return [best, LastCheckpoint(folder, every_n_steps)]


@contextmanager
def preserve_metrics_csv(folder: Path) -> Iterator[None]:
    """Set the scores of an earlier run in the same folder aside, which the CSV logger would delete.

    They come back where no others have taken their place: a run that is refused, or `predict`.
    """
    scores = folder / "metrics.csv"
    if getattr(rank_zero_only, "rank", 0) or not scores.is_file():
        yield
        return
    aside = scores.replace(folder / f"metrics_{max(0, last_number(folder, 'metrics_')) + 1}.csv")
    try:
        yield
    finally:
        if not scores.exists():
            aside.replace(scores)


def make_loggers(names: LoggerName | list[LoggerName], folder: Path) -> list[Logger]:
    """Return the CSV logger and, after it, those asked for."""
    wanted = [names] if isinstance(names, str) else names
    loggers: list[Logger] = [CSVLogger(folder, name="", version="")]
    if "tensorboard" in wanted:
        loggers.append(TensorBoardLogger(folder, name="", version=""))
    if "wandb" in wanted:
        loggers.append(WandbLogger(project="early-fusion-seg", save_dir=folder))
    return loggers


def start_wandb(loggers: list[Logger]) -> None:
    """Start the run of a W&B logger, before anything costs time.

    Raises:
        UserError: There is no account, or no connection.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            from wandb.errors import Error  # takes more than a second, and few need it

            try:
                _ = logger.experiment
            except Error as error:
                reason = str(error).splitlines()[0].rstrip(".")
                raise UserError(
                    f"W&B does not start ({reason}); without an account run `wandb login`, "
                    "without a connection set WANDB_MODE=offline, and `wandb sync` sends the files later"
                ) from error


@rank_zero_only
def report_checkpoint(trainer: Trainer) -> None:
    """Say where the best checkpoint is."""
    best = trainer.checkpoint_callback
    if isinstance(best, ModelCheckpoint) and best.best_model_score is not None:
        print(f"best val/mIoU {100 * float(best.best_model_score):.1f} %: {best.best_model_path}")


@rank_zero_only
def report_end(trainer: Trainer) -> None:
    """Say on stderr that the process was told to end, and how to go on."""
    kept = [str(c.path) for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint) and c.saved]
    kept = [path for path in kept if Path(path).is_file()]
    how = f"fit goes on with --ckpt_path {kept[0]}" if kept else "nothing was saved yet"
    print(f"ended by SIGTERM; {how}", file=sys.stderr)


@rank_zero_only
def report_predictions(writer: PredictionWriter) -> None:
    """Say where the predictions are, and name on stderr the files that could not be read."""
    print(f"written: {writer.folder}")
    if writer.unreadable:
        print("\n".join(["not segmented:", *writer.unreadable]), file=sys.stderr)
