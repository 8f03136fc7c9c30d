"""Runs that are killed or stopped, and resumed from last.ckpt, end with the weights of an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

EPOCHS = 12
ARGS = [
    "fit", "--data", "SyntheticDataModule", "--data.size", "[64,96]", "--data.train_scenes", "42",
    "--data.val_scenes", "4", "--data.batch_size", "2", "--data.num_workers", "1", "--data.crop_size", "[48,64]",
    "--model.encoder", "resnet18", "--model.encoder_weights", "random", "--model.width", "8",
    "--trainer.max_epochs", str(EPOCHS), "--trainer.check_val_every_n_epoch", "3", "--trainer.accelerator", "cpu",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--trainer.accumulate_grad_batches", "2", "--save_every_n_steps", "3",
]  # fmt: skip


def start(run: Path, *more: str) -> subprocess.Popen[str]:
    """Start a run, or resume it if it has a checkpoint."""
    last = run / "checkpoints" / "last.ckpt"
    resume = ["--ckpt_path", str(last)] if last.exists() else []
    command = [sys.executable, "-m", "early_fusion_seg", *ARGS, "--output", str(run), *resume, *more]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored if the tests run in the background
    )


def finish(run: Path) -> dict[str, object]:
    """Run or resume to the end, and return the last checkpoint."""
    process = start(run)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(a: dict[str, object], b: dict[str, object]) -> None:
    assert a["global_step"] == b["global_step"] == EPOCHS * 11  # 21 batches per epoch, two per step
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    for index, moments in a["optimizer_states"][0]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["optimizer_states"][0]["state"][index][name]), (index, name)
    assert a["lr_schedulers"] == b["lr_schedulers"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return finish(tmp_path_factory.mktemp("uninterrupted"))


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a file is written or replaced."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


@pytest.mark.slow
def test_a_run_killed_ten_times_at_random_ends_with_the_same_weights(uninterrupted, tmp_path):
    moments = random.Random(0)
    last = tmp_path / "checkpoints" / "last.ckpt"
    steps = [0]
    for _ in range(10):
        process = start(tmp_path)
        wait_for(last, process)  # so that each process makes progress
        time.sleep(moments.uniform(0, 1.5))  # during a step, a validation or a checkpoint
        process.send_signal(signal.SIGKILL)
        process.communicate()
        steps.append(torch.load(last, weights_only=True)["global_step"])  # always a complete file
    assert steps == sorted(steps)
    assert len(set(steps)) > 5
    assert_same(finish(tmp_path), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_a_checkpoint_and_prints_its_path(number, uninterrupted, tmp_path):
    last = tmp_path / "checkpoints" / "last.ckpt"
    process = start(tmp_path)
    wait_for(last, process)
    step = torch.load(last, weights_only=True)["global_step"]
    time.sleep(0.5)  # some batches after the checkpoint
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to the worker of the loader too
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + number, output
    assert output.strip().splitlines()[-1] == f"stopped by {number.name}; resume with --ckpt_path {last}"
    assert torch.load(last, weights_only=True)["global_step"] > step
    assert_same(finish(tmp_path), uninterrupted)


@pytest.mark.slow
def test_sigterm_without_checkpoints_prints_no_path(tmp_path):
    process = start(tmp_path, "--trainer.enable_checkpointing", "false", "--trainer.max_epochs", "1000")
    while not (tmp_path / "metrics.csv").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert output.strip().splitlines()[-1] == "stopped by SIGTERM; no checkpoint was saved yet"
