"""Arguments of a tiny run on the command line, and functions that read its output."""

import csv
import io
import sys
from pathlib import Path

import torch

TINY_MODEL = ["--model.encoder=resnet18", "--model.encoder_weights=random", "--model.width=4", "--model.blocks=1"]
QUICK = ["--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--data.num_workers=0"]
QUIET = "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"
SIZE = (36, 48)


def fit_args(camvid: Path, output: Path, *more: str) -> list[str]:
    data = [f"--data.root={camvid}", "--data.crop_size=[32,32]", "--data.batch_size=2", f"--output={output}"]
    epochs = ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1"]
    return ["fit", "--config=camvid", *data, *epochs, *TINY_MODEL, *QUICK, *QUIET, *more]


def without_output(args: list[str]) -> list[str]:
    return [arg for arg in args if not arg.startswith("--output")]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "early_fusion_seg", *args]


def epochs_logged(run: Path) -> list[int]:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return sorted({int(row["epoch"]) for row in csv.DictReader(file) if row["val/mIoU"]})


def torch_epoch(path: Path) -> int:
    return int(torch.load(io.BytesIO(path.read_bytes()), weights_only=True)["epoch"])
