"""The folder of a run: configuration, checkpoints, loggers, and what is said when it ends."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]  # PyYAML comes without types
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from early_fusion_seg.callbacks import PredictionWriter, send_config
from early_fusion_seg.checkpointing import LastCheckpoint
from early_fusion_seg.errors import UserError
from early_fusion_seg.writing import replace_file

LoggerName = Literal["csv", "tensorboard", "wandb"]
CHECKPOINTS = "checkpoints"


class RunConfig(SaveConfigCallback):
    """Save the resolved configuration in the folder of the run, and hand it to the loggers."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write or replace the file."""
        text = self.parser.dump(self.config)
        path = Path(trainer.default_root_dir, self.config_filename)
        replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
        config = yaml.safe_load(text)
        for logger in trainer.loggers:
            send_config(logger, config)


def next_folder(parent: Path) -> Path:
    """Return the `version_N` that comes after all that exist below a folder."""
    return parent / f"version_{_last_number(parent, 'version_') + 1}"


def run_folder(checkpoint: str | None) -> Path | None:
    """Return the folder of the run that wrote a checkpoint, if it still lies where `best_and_last` put it."""
    folder = Path(checkpoint or "").parent
    return folder.parent if folder.name == CHECKPOINTS else None


def best_and_last(folder: Path, every_n_steps: int) -> list[Checkpoint]:
    """Keep `best.ckpt` (val/mIoU) and `last.ckpt`; a run that goes on in the same folder replaces them."""
    folder = folder / CHECKPOINTS
    best = ModelCheckpoint(folder, "best", monitor="val/mIoU", mode="max", enable_version_counter=False)
    return [best, LastCheckpoint(folder, every_n_steps)]


class ValidateAtEnd(Callback):
    """Validate after the last step too, wherever it falls between two validations: each run ends with a score."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Ask for a validation where training ends here."""
        epochs = trainer.max_epochs or -1  # -1: no limit
        last_batch = trainer.is_last_batch and trainer.current_epoch + 1 == epochs
        if (last_batch or trainer.global_step == trainer.max_steps) and trainer.check_val_every_n_epoch is not None:
            trainer.check_val_every_n_epoch = 1
            trainer.should_stop = True  # with it, Lightning validates in the middle of an epoch


@contextmanager
def preserve_metrics_csv(folder: Path) -> Iterator[None]:
    """Set the scores of an earlier run in the same folder aside, which the CSV logger would delete.

    They come back where no others have taken their place: a run that is refused, or `predict`.
    """
    scores = folder / "metrics.csv"
    if getattr(rank_zero_only, "rank", 0) or not scores.is_file():
        yield
        return
    aside = scores.replace(folder / f"metrics_{max(0, _last_number(folder, 'metrics_')) + 1}.csv")
    try:
        yield
    finally:
        if not scores.exists():
            aside.replace(scores)


def _last_number(folder: Path, prefix: str) -> int:
    """Return the highest N of what is named `prefixN` in a folder, -1 where there is none."""
    names = [path.name.removesuffix(".csv").removeprefix(prefix) for path in folder.glob(f"{prefix}*")]
    return max((int(name) for name in names if name.isdecimal()), default=-1)


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
