"""Measure the time that loggers and callbacks add to a training step.

    OMP_NUM_THREADS=1 python examples/benchmarks/observe.py --repeats 8 --steps 61

Measured are CSV, TensorBoard and W&B (offline) together, with the callbacks of `early-fusion-seg fit` that run in a
step. Their time does not depend on the network and is far below the variation of a real step. So it is measured with
steps that log the same and compute nothing, alternately with and without loggers, and compared with a real step.
Steps are timed in blocks of `log_every_n_steps`, so that each block logs once. Other work on the machine makes blocks
slower, never faster, so the fastest tenth is shown beside the median. Validation and its panels are not included.
"""

import argparse
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path
from statistics import quantiles

os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}

import torch
import wandb
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from torch.utils.data import DataLoader

from early_fusion_seg import ReverseHRNetSeg, SyntheticDataModule
from early_fusion_seg.callbacks import ClassIoU, PanelLogger, Throughput
from early_fusion_seg.cli.output import make_loggers

SIZE, BATCH_SIZE = (96, 128), 8
BLOCK = 10  # the command line's log_every_n_steps


class EmptySteps(ReverseHRNetSeg):
    """Log the same values as ReverseHRNetSeg in a step, and compute nothing."""

    def training_step(self, batch, batch_index):
        self.log("train/lr", float(self.optimizers().param_groups[0]["lr"]))
        return 0.0 * next(self.network.head.parameters()).sum()

    def on_before_optimizer_step(self, optimizer):
        self.log("train/loss", 0.0, on_step=True, on_epoch=False, prog_bar=True)


class Blocks(Callback):
    """Time and processor time per step, in seconds, of each block of steps after the first."""

    def on_train_start(self, trainer, pl_module):
        self.marks = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step and trainer.global_step % BLOCK == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append((time.perf_counter(), time.process_time()))

    def seconds(self):
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [[(b - a) / BLOCK for a, b in zip(first, second, strict=True)] for first, second in pairs]


def train(model, loader, steps: int, observed: bool) -> list[list[float]]:
    blocks = Blocks()
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [Throughput(), ClassIoU(), PanelLogger(), LearningRateMonitor("step")] if observed else []
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        loggers = make_loggers(["tensorboard", "wandb"], Path(folder)) if observed else False
        length = {"max_steps": steps, "max_epochs": -1, "log_every_n_steps": BLOCK}
        Trainer(logger=loggers, callbacks=[*callbacks, blocks], **length, **quiet).fit(model, loader)
        wandb.finish()
    return blocks.seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=101, help="real steps; ten times as many compute nothing")
    parser.add_argument("--repeats", type=int, default=6)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # advice on workers and loggers would break up the progress bar
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data = SyntheticDataModule(SIZE, 32 * BATCH_SIZE)
    scenes = data.dataset("train")
    loader = DataLoader([scenes[0, i] for i in range(len(scenes))], BATCH_SIZE)
    settings = {"class_names": data.class_names, "encoder": "resnet18", "encoder_weights": "random", "blocks": 1}
    real, empty = ReverseHRNetSeg(**settings), EmptySteps(**settings)
    seconds = {True: [], False: [], "real": train(real, loader, options.steps, False)}
    for i in range(options.repeats):
        for observed in (i % 2 == 0, i % 2 == 1):  # alternately, each as often first
            seconds[observed] += train(empty, loader, 10 * options.steps, observed)
    print(f"ms per step, of blocks of {BLOCK} steps, {torch.get_num_threads()} threads")
    for i, what in enumerate(("time", "processor time")):
        for name, tenth in (("fastest tenth", 0), ("median", 4)):
            blocks = [[block[i] for block in seconds[kind]] for kind in (False, True, "real")]
            bare, full, step = (1000 * quantiles(part, n=10)[tenth] for part in blocks)
            share = (full - bare) / step
            print(f"{what}, {name}: {full:.2f} with, {bare:.2f} without; {share:.2%} of a step of {step:.1f}")


if __name__ == "__main__":
    main()
