"""`early-fusion-seg estimate`: measure the time, memory and disk space that `fit` needs with the same options.

A few real steps are run with the model, data, device, workers, precision and gradient accumulation of `fit`; nothing is
saved. If `fit` would use several processes, one is measured and the effect of the others is computed.
"""

import math
import os
import time
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch.utils.data import DataLoader

from early_fusion_seg.callbacks.last_checkpoint import LastCheckpoint
from early_fusion_seg.callbacks.step_timer import StepTimer, peak_memory
from early_fusion_seg.cli.estimate.figures import (
    Length,
    Rate,
    Saved,
    batches_and_steps,
    duration,
    largest_that_fits,
    limited,
    mebibytes,
    rate,
    validations,
)
from early_fusion_seg.cli.messages import echo
from early_fusion_seg.cli.output import RUNS
from early_fusion_seg.cli.quiet_lightning import quiet_lightning
from early_fusion_seg.cli.training_cli import TrainingCLI
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.run_folder import RunFolder

STEP_SETTINGS = (  # trainer settings that a step depends on; the others set the length of a run and what it writes
    "accelerator", "precision", "plugins", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm",
    "deterministic", "benchmark", "detect_anomaly", "inference_mode",
)  # fmt: skip
EPOCHS = 1000  # Lightning's default if neither epochs nor steps are limited
MAX_WAITING = 0.2  # share of the time spent waiting for data, above which advice is printed


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: Command line arguments after `estimate`.

    Returns:
        0.

    Raises:
        UserError: An option, a file or a setting is wrong.
    """
    with quiet_lightning(), TemporaryDirectory() as folder:  # for files that the data module stores in the run folder
        return EstimateCLI([*args, f"--trainer.default_root_dir={folder}"]).estimate()


class EstimateCLI(TrainingCLI):
    """Measure the time, memory and disk space that fit needs with the same options, by training a few steps."""

    output_help = "accepted as in fit; estimate writes nothing"

    def __init__(self, args: list[str]) -> None:
        super().__init__("estimate", args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the number of steps."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--steps", type=int, default=20, help="optimizer steps to time")
        parser.add_argument("--warmup", type=int, default=5, help="optimizer steps before those, not timed")

    def before_instantiate_classes(self) -> None:
        """Check the number of steps, and turn the loggers off."""
        super().before_instantiate_classes()
        for name, least in (("steps", 1), ("warmup", 0)):
            if self.config[name] < least:
                raise UserError(f"--{name} is {self.config[name]}; expected at least {least}")
        self.config["trainer"]["logger"] = False

    def make_folder(self) -> RunFolder:
        """Make none: nothing is saved."""
        folder = RunFolder(self.output, RUNS / self.command, writes=False)
        self.folder = folder.path
        return folder

    def instantiate_classes(self) -> None:
        """Make what fit makes; the trainer of fit gives the length of the run and never runs."""
        super().instantiate_classes()
        self.device = self.trainer.strategy.root_device
        self.checkpoints = [c for c in self.run_callbacks if isinstance(c, ModelCheckpoint | LastCheckpoint)]

    def estimate(self) -> int:
        """Measure and print."""
        self.check_resumable()
        if self.max_epochs() == -1 and self.trainer.max_steps == -1:
            raise UserError("the run has no end; set --trainer.max_epochs or --trainer.max_steps")
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        echo(f"timing {self.config['steps']} steps after {self.config['warmup']} warmup steps, on one device: {name}")
        validation = self.time_validation() if self.trainer.limit_val_batches != 0 else None
        validation_peak = peak_memory(self.device)
        training, saved = self.time_training()
        lines = {
            "training": [self.speed_text(training)],
            "waiting for data": [f"{training.waiting:.0%} of the time"],
            "peak memory": [self.memory_text(peak_memory(self.device), validation_peak)],
            "largest batch": [self.largest_batch()],
            "whole run": self.whole_run(training, validation, saved),
            "checkpoints": [self.disk_text(saved.size)],
        }
        for title, texts in lines.items():
            echo(f"{title:<18}" + f"\n{'':<18}".join(texts))
        if training.waiting > MAX_WAITING:
            now = f"now {self.datamodule.num_workers}; this machine has {os.cpu_count()} cores"
            echo(f"Data loading slows training down: raise --data.num_workers ({now}).")
        return 0

    def time_validation(self) -> Rate:
        """Time the validation of a few images."""
        timer = StepTimer()
        trainer = self.one_device_trainer(timer, limit_val_batches=self.config["warmup"] + self.config["steps"])
        try:
            trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
            raise UserError("validation does not fit into memory; lower --data.scale or --model.width") from error
        return rate(timer.timed, self.config["warmup"])

    def time_training(self) -> tuple[Rate, Saved]:
        """Time a few training steps, and the writing of a checkpoint."""
        timer = StepTimer()
        steps = self.config["warmup"] + self.config["steps"]
        trainer = self.one_device_trainer(timer, max_steps=steps, max_epochs=-1, limit_val_batches=0)
        try:
            trainer.fit(self.model, datamodule=self.datamodule)
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
            timer.timed.clear()
        if not timer.timed:  # outside of the handler, which would keep the tensors of the failed step alive
            self.raise_out_of_memory()
        with TemporaryDirectory() as folder:
            path, start = Path(folder, "one.ckpt"), time.perf_counter()
            trainer.save_checkpoint(path)
            saved = Saved(path.stat().st_size, time.perf_counter() - start)
        return rate(timer.timed, self.config["warmup"]), saved

    def one_device_trainer(self, *callbacks: Callback, **limits: Any) -> Trainer:
        """Make a trainer that runs the same steps on one device and writes nothing."""
        options = self.config_init["trainer"]
        return Trainer(
            **{name: options[name] for name in STEP_SETTINGS},
            devices=[self.trainer.device_ids[0]] if self.device.type == "cuda" else 1,
            callbacks=list(callbacks),
            default_root_dir=self.trainer.default_root_dir,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **limits,
        )

    def largest_batch(self) -> str:
        """Find the number of images that fit into the memory of a GPU."""
        if self.device.type != "cuda":
            return "not measured: needs a CUDA GPU"
        good, bad = largest_that_fits(self.fits, self.datamodule.batch_size)
        return f"{good} images per process" + (f" ({bad} do not fit)" if bad else " or more")

    def raise_out_of_memory(self) -> None:
        """Raise an error that names the largest batch that fits."""
        size = self.datamodule.batch_size
        if self.device.type != "cuda":
            raise UserError(f"a batch of {size} images does not fit into memory; lower --data.batch_size")
        good, _ = largest_that_fits(self.fits, max(1, size // 2), limit=size)
        advice = f"lower --data.batch_size to {good}" if good else "even one does not fit: lower --data.crop_size"
        raise UserError(f"a batch of {size} images does not fit into the memory of the GPU; {advice}")

    def fits(self, images: int) -> bool:
        """Return whether two steps with copies of one image fit into memory; the second has the optimizer's state.

        Args:
            images: Number of images in the batch.
        """
        garbage_collection_cuda()  # frees the tensors of the trial before
        loader = self.datamodule.train_dataloader()
        batch = loader.collate_fn([loader.dataset[0, 0]] * images)
        twice: DataLoader[Any] = DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]  # a list is a data set
        trainer = self.one_device_trainer(max_steps=2, max_epochs=-1, limit_val_batches=0)
        try:
            trainer.fit(self.model, twice, twice)  # Lightning warns if there is no validation loader
        except RuntimeError:  # out of memory, or a kernel that cannot take so large a tensor
            return False
        return True

    def whole_run(self, training: Rate, validation: Rate | None, saved: Saved) -> list[str]:
        """Return the time of the whole run, then that of its parts, then notes."""
        trainer = self.trainer
        self.datamodule.trainer = trainer  # it has the world size of fit
        length = self.length(limited(len(self.datamodule.train_dataloader()), trainer.limit_train_batches))
        accumulated = f" ({length.steps} steps)" if length.steps != length.batches else ""
        parts = {f"{length.batches} batches{accumulated}": length.batches * training.batch}
        if validation is not None and length.validations:
            scored = limited(len(self.datamodule.val_dataloader()), trainer.limit_val_batches)
            parts[f"{length.validations} validations of {scored} batches"] = (
                length.validations * scored * validation.batch
            )
        if self.checkpoints:
            # last.ckpt, also before each validation; and best.ckpt, if each validation improves the score
            saves = length.epochs + length.steps // self.config["save_every_n_steps"] + 2 * (length.validations or 0)
            parts[f"at most {saves} checkpoints written"] = saves * saved.seconds
        notes = {
            f"computed for {trainer.world_size} processes, not measured; their communication adds time": (
                trainer.world_size > 1
            ),
            "validations at intervals of time are not counted": length.validations is None,
            "trainer.callbacks are not measured": bool(self.config["trainer"]["callbacks"]),
            "trainer.max_time may end the run earlier": self.config["trainer"]["max_time"] is not None,
            "the whole run is counted, from its first step": self.config["ckpt_path"] is not None,
        }
        return [
            duration(sum(parts.values())),
            *(f"{what}: {duration(seconds)}" for what, seconds in parts.items()),
            *(note for note, applies in notes.items() if applies),
        ]

    def max_epochs(self) -> int:
        """Return the limit of epochs, -1 for none, by Lightning's rules."""
        epochs, unlimited = self.trainer.max_epochs, self.trainer.max_steps == -1
        if epochs is not None:
            return epochs
        return EPOCHS if unlimited and self.config["trainer"]["max_time"] is None else -1

    def length(self, epoch: int) -> Length:
        """Compute the length of the run.

        Args:
            epoch: Batches per epoch, in each process.
        """
        trainer, interval = self.trainer, self.config["trainer"]["val_check_interval"]
        accumulate = trainer.accumulate_grad_batches
        batches, steps = batches_and_steps(epoch, accumulate, self.max_epochs(), trainer.max_steps)
        epochs = math.ceil(batches / max(1, epoch))
        if isinstance(interval, str | dict | timedelta):
            return Length(batches, steps, epochs, None)
        count = validations(batches, max(1, epoch), trainer.check_val_every_n_epoch, trainer.val_check_interval)
        return Length(batches, steps, epochs, count if trainer.limit_val_batches != 0 else 0)

    def speed_text(self, training: Rate) -> str:
        """Format the training speed."""
        size = training.images * training.batch  # below batch_size if there are fewer images
        return f"{training.images:.3g} images/s, {duration(training.batch)} per batch of {size:.3g}"

    def memory_text(self, training: int, validation: int) -> str:
        """Format the peak memory of training and validation."""
        if self.device.type == "cuda":
            return f"{mebibytes(training)} on the GPU in training, {mebibytes(validation)} in validation"
        workers = self.datamodule.num_workers
        more = f"; {workers} data loading worker(s) need more" if workers else ""
        return f"{mebibytes(training)} of resident memory, the whole process{more}" if training else "unknown"

    def disk_text(self, size: int) -> str:
        """Format the disk space of the checkpoints."""
        names = " and ".join(str(callback.filename) for callback in self.checkpoints)
        return f"{names}: {len(self.checkpoints)} x {mebibytes(size)}" if self.checkpoints else "none"
