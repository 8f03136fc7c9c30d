"""`early-fusion-seg estimate`: what `fit` would cost with the same options, from a few real steps; nothing is kept.

The model, the data and the device are those of `fit`, and so are workers, precision, accumulation and optimizer steps.
Where `fit` would use several processes one is measured, and what the others do is computed.
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
from early_fusion_seg.cli.messages import say
from early_fusion_seg.cli.quiet_lightning import quiet_lightning
from early_fusion_seg.cli.training_cli import TrainingCLI
from early_fusion_seg.errors import UserError

SHAPES_A_STEP = (  # the trainer's settings that a step depends on; the others say how long a run is and what it writes
    "accelerator", "precision", "plugins", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm",
    "deterministic", "benchmark", "detect_anomaly", "inference_mode",
)  # fmt: skip
EPOCHS = 1000  # Lightning's, where neither epochs nor steps are limited
MUCH_WAITING = 0.2


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: What follows `estimate` on the command line.

    Returns:
        0.

    Raises:
        UserError: Anything that the user can mend.
    """
    with quiet_lightning(), TemporaryDirectory() as folder:  # for what the data module keeps in the folder of a run
        return EstimateCLI([*args, f"--trainer.default_root_dir={folder}"]).estimate()


class EstimateCLI(TrainingCLI):
    """Say what fit would take with the same options: time, memory, disk. A few steps are trained, nothing is kept."""

    def __init__(self, args: list[str]) -> None:
        super().__init__("estimate", args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add how many steps are timed."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--steps", type=int, default=20, help="optimizer steps that are timed")
        parser.add_argument("--warmup", type=int, default=5, help="optimizer steps before them")

    def before_instantiate_classes(self) -> None:
        """Leave out the loggers, which write."""
        super().before_instantiate_classes()
        for name, least in (("steps", 1), ("warmup", 0)):
            if self.config[name] < least:
                raise UserError(f"--{name} is {self.config[name]}; expected at least {least}")
        self.config["trainer"]["logger"] = False

    def instantiate_classes(self) -> None:
        """Make what fit would make; its trainer says how long the run is, and never runs."""
        super().instantiate_classes()
        self.device = self.trainer.strategy.root_device
        self.kept = [c for c in self.run_callbacks if isinstance(c, ModelCheckpoint | LastCheckpoint)]

    def estimate(self) -> int:
        """Measure and print."""
        self.check_resumable()
        if self.max_epochs() == -1 and self.trainer.max_steps == -1:
            raise UserError("the run has no end: set the trainer's max_epochs or max_steps")
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        say(f"timing {self.config['steps']} steps after {self.config['warmup']} to warm up, on one device: {name}")
        validation = self.time_validation() if self.trainer.limit_val_batches != 0 else None
        validation_peak = peak_memory(self.device)
        training, saved = self.time_training()
        lines = {
            "training": [self.speed_text(training)],
            "waiting for data": [f"{training.waiting:.0%} of that time"],
            "peak memory": [self.memory_text(peak_memory(self.device), validation_peak)],
            "largest batch": [self.largest_batch()],
            "whole run": self.whole_run(training, validation, saved),
            "checkpoints": [self.disk_text(saved.size)],
        }
        for title, texts in lines.items():
            say(f"{title:<18}" + f"\n{'':<18}".join(texts))
        if training.waiting > MUCH_WAITING:
            now = f"which is {self.datamodule.num_workers} ({os.cpu_count()} cores here)"
            say(f"The network waits for its data: raise --data.num_workers, {now}.")
        return 0

    def time_validation(self) -> Rate:
        """Score a few images."""
        timer = StepTimer()
        trainer = self.one_device(timer, limit_val_batches=self.config["warmup"] + self.config["steps"])
        try:
            trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
            raise UserError("validation takes more memory than there is; lower data.scale or model.width") from error
        return rate(timer.timed, self.config["warmup"])

    def time_training(self) -> tuple[Rate, Saved]:
        """Train a few steps, and save a checkpoint."""
        timer = StepTimer()
        steps = self.config["warmup"] + self.config["steps"]
        trainer = self.one_device(timer, max_steps=steps, max_epochs=-1, limit_val_batches=0)
        try:
            trainer.fit(self.model, datamodule=self.datamodule)
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
            timer.timed.clear()
        if not timer.timed:  # outside of the handler, where the failed step's tensors are not held any more
            self.refuse_batch()
        with TemporaryDirectory() as folder:
            path, start = Path(folder, "one.ckpt"), time.perf_counter()
            trainer.save_checkpoint(path)
            saved = Saved(path.stat().st_size, time.perf_counter() - start)
        return rate(timer.timed, self.config["warmup"]), saved

    def one_device(self, *callbacks: Callback, **limits: Any) -> Trainer:
        """Make a trainer with the configured one's steps, but one device and no traces."""
        given = self.config_init["trainer"]
        return Trainer(
            **{name: given[name] for name in SHAPES_A_STEP},
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
        """Say how many images fit into the memory of a GPU."""
        if self.device.type != "cuda":
            return "not searched: only on a CUDA GPU"
        good, bad = largest_that_fits(self.fits, self.datamodule.batch_size)
        return f"{good} images a process" + (f" ({bad} do not fit)" if bad else " or more")

    def refuse_batch(self) -> None:
        """Say that the batch does not fit, and what would."""
        size = self.datamodule.batch_size
        if self.device.type != "cuda":
            raise UserError(f"a batch of {size} images takes more memory than there is; lower data.batch_size")
        good, _ = largest_that_fits(self.fits, max(1, size // 2), limit=size)
        advice = f"the largest that fits has {good}" if good else "one image does not either: lower data.crop_size"
        raise UserError(f"a batch of {size} images does not fit into the memory of the GPU; {advice}")

    def fits(self, images: int) -> bool:
        """Tell whether two steps with so many copies of an image fit into memory; the second has the optimizer's state.

        Args:
            images: Images of the batch.
        """
        garbage_collection_cuda()  # of what was tried before
        loader = self.datamodule.train_dataloader()
        batch = loader.collate_fn([loader.dataset[0, 0]] * images)
        twice: DataLoader[Any] = DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]  # a list is a data set
        trainer = self.one_device(max_steps=2, max_epochs=-1, limit_val_batches=0)
        try:
            trainer.fit(self.model, twice, twice)  # Lightning warns where there is nothing to validate on
        except RuntimeError:  # of memory, or of a kernel that cannot take so large a tensor
            return False
        return True

    def whole_run(self, training: Rate, validation: Rate | None, saved: Saved) -> list[str]:
        """Say how long the run takes, and what of it takes how long."""
        trainer = self.trainer
        self.datamodule.trainer = trainer  # its world size is that of fit
        length = self.length(limited(len(self.datamodule.train_dataloader()), trainer.limit_train_batches))
        accumulated = f" ({length.steps} steps)" if length.steps != length.batches else ""
        parts = {f"{length.batches} batches{accumulated}": length.batches * training.batch}
        if validation is not None and length.validations:
            scored = limited(len(self.datamodule.val_dataloader()), trainer.limit_val_batches)
            parts[f"{length.validations} validations of {scored} batches"] = (
                length.validations * scored * validation.batch
            )
        if self.kept:
            # the last one, also before each validation; and, if each is better, the best one
            saves = length.epochs + length.steps // self.config["save_every_n_steps"] + 2 * (length.validations or 0)
            parts[f"at most {saves} checkpoints written"] = saves * saved.seconds
        notes = {
            f"computed for {trainer.world_size} processes, not measured; what they exchange takes time too": (
                trainer.world_size > 1
            ),
            "validations by the clock are not counted": length.validations is None,
            "trainer.callbacks are left out": bool(self.config["trainer"]["callbacks"]),
            "trainer.max_time may end it earlier": self.config["trainer"]["max_time"] is not None,
            "counted from the first step": self.config["ckpt_path"] is not None,
        }
        return [
            duration(sum(parts.values())),
            *(f"{what}: {duration(seconds)}" for what, seconds in parts.items()),
            *(note for note, applies in notes.items() if applies),
        ]

    def max_epochs(self) -> int:
        """Return the epochs after which the run ends, -1 for no limit, as Lightning decides it."""
        epochs, unlimited = self.trainer.max_epochs, self.trainer.max_steps == -1
        if epochs is not None:
            return epochs
        return EPOCHS if unlimited and self.config["trainer"]["max_time"] is None else -1

    def length(self, epoch: int) -> Length:
        """Compute the length of the run.

        Args:
            epoch: Batches of an epoch, in each process.
        """
        trainer, interval = self.trainer, self.config["trainer"]["val_check_interval"]
        accumulate = trainer.accumulate_grad_batches
        batches, steps = batches_and_steps(epoch, accumulate, self.max_epochs(), trainer.max_steps)
        begun = math.ceil(batches / max(1, epoch))
        if isinstance(interval, str | dict | timedelta):
            return Length(batches, steps, begun, None)
        count = validations(batches, max(1, epoch), trainer.check_val_every_n_epoch, trainer.val_check_interval)
        return Length(batches, steps, begun, count if trainer.limit_val_batches != 0 else 0)

    def speed_text(self, training: Rate) -> str:
        """Say how fast it trains."""
        size = training.images * training.batch  # fewer than batch_size where there are not so many images
        return f"{training.images:.3g} images/s, {duration(training.batch)} a batch of {size:.3g}"

    def memory_text(self, training: int, validation: int) -> str:
        """Say what the memory is that was in use."""
        if self.device.type == "cuda":
            return f"{mebibytes(training)} on the GPU in training, {mebibytes(validation)} in validation"
        workers = self.datamodule.num_workers
        beside = f"; its workers ({workers}) take more" if workers else ""
        return f"{mebibytes(training)} of resident memory, the whole process{beside}" if training else "unknown"

    def disk_text(self, size: int) -> str:
        """Say what the checkpoints of the run take."""
        names = " and ".join(str(callback.filename) for callback in self.kept)
        return f"{names}: {len(self.kept)} x {mebibytes(size)}" if self.kept else "none"
