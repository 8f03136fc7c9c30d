"""Launchers of several processes: examples/slurm.sbatch with fake SLURM commands, and torchrun."""

import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from early_fusion_seg.cli.devices import distributed_settings
from early_fusion_seg.errors import UserError

ROOT = Path(__file__).parents[1]
BATCH_FILE = ROOT / "examples" / "slurm.sbatch"
DOCS = ROOT / "docs" / "scaling.md"
OPTIONS = [
    "--data", "SyntheticDataModule", "--data.size", "[64,96]", "--data.train_scenes", "42", "--data.val_scenes", "5",
    "--data.batch_size", "2", "--data.num_workers", "0", "--data.crop_size", "[48,64]",
    "--model.encoder", "resnet18", "--model.encoder_weights", "random", "--model.width", "4", "--model.blocks", "1",
    "--trainer.max_epochs", "6", "--trainer.check_val_every_n_epoch", "3", "--trainer.accelerator", "cpu",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--save_every_n_steps", "3",
]  # fmt: skip
STEPS = 6 * 10  # 42 scenes are 10 whole batches of 2 for each of 2 processes
RECORD_ONLY = """\
printf '%s\\n' "$MASTER_ADDR" "$@" > srun.txt
exit "${SRUN_STATUS:-0}"
"""
START_TASKS = """\
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_NUM_TASKS="$SLURM_NTASKS"
pids=()
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_NODEID=$((rank / SLURM_NTASKS_PER_NODE)) SLURM_LOCALID=$((rank % SLURM_NTASKS_PER_NODE)) \\
        "$@" &
    pids+=($!)
done
echo "${pids[@]}" > tasks.txt
highest=0
for pid in "${pids[@]}"; do
    status=0
    wait "$pid" || status=$?
    ((status > highest)) && highest=$status
done
exit "$highest"
"""
SCONTROL = """\
case "$1" in
    show) printf '127.0.0.1\\n%s\\n' "$3" ;;
    requeue) echo "$2" >> requeued.txt ;;
esac
"""


STARTED: list[subprocess.Popen[str]] = []


def start(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    STARTED.append(
        subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    )  # fmt: skip
    return STARTED[-1]


@pytest.fixture(autouse=True)
def kill_remaining_processes() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def batch_options() -> dict[str, str]:
    """Return the options of the #SBATCH lines, which must precede the first command."""
    head = BATCH_FILE.read_text().split("\nset ")[0]
    return {name: value for name, _, value in re.findall(r"^#SBATCH --([a-z-]+)(=(\S+))?$", head, flags=re.MULTILINE)}


def submit(folder: Path, srun: str, *args: str, **options: str) -> subprocess.Popen[str]:
    """Run the file as sbatch does, with the environment variables for its #SBATCH lines or for other options."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    fit = f'exec {sys.executable} -m early_fusion_seg "$@"'
    for name, text in (("srun", srun), ("scontrol", SCONTROL), ("early-fusion-seg", fit)):
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (commands / name).chmod(0o755)
    given = {name.replace("-", "_"): value for name, value in batch_options().items()} | options
    slurm = {
        "JOB_ID": "417", "JOB_NAME": given["job_name"], "JOB_NODELIST": "gpu[07-08]", "NNODES": given["nodes"],
        "JOB_NUM_NODES": given["nodes"], "NTASKS_PER_NODE": given["ntasks_per_node"],
        "CPUS_PER_TASK": given["cpus_per_task"],
        "NTASKS": str(int(given["nodes"]) * int(given["ntasks_per_node"])),
    }  # fmt: skip
    environment = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
    environment |= {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "MASTER_PORT": str(free_port())}
    environment |= {name: value for name, value in options.items() if name.isupper()}
    return start(["bash", str(BATCH_FILE), *args], folder, environment)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == status, output
    return output


def test_the_batch_file_requests_the_devices_of_the_trainer(tmp_path):
    subprocess.run(["bash", "-n", str(BATCH_FILE)], check=True)
    options = batch_options()
    assert len(options) == BATCH_FILE.read_text().count("\n#SBATCH ")  # all lines were parsed
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert re.fullmatch(r"TERM@[1-9][0-9]+", options["signal"])  # B: would send it to the shell alone
    assert {"requeue", "open-mode"} <= set(options)
    assert options["job-name"] not in ("bash", "interactive")  # with these names, Lightning ignores SLURM

    finish(submit(tmp_path, RECORD_ONLY, "--config", "a b"))
    address, *command = (tmp_path / "srun.txt").read_text().splitlines()
    assert address == "127.0.0.1"
    assert f"--cpus-per-task={options['cpus-per-task']}" in command
    arguments = dict(pairwise(command))
    assert arguments["--trainer.num_nodes"] == options["nodes"]
    assert arguments["--trainer.devices"] == options["ntasks-per-node"]
    assert arguments["--trainer.accelerator"] == "gpu"
    assert arguments["--config"] == "a b"
    assert arguments["--output"] == "runs/slurm-417"
    assert "--ckpt_path" not in command


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (143, True)])
def test_the_job_is_requeued_only_after_sigterm(tmp_path, status, requeued):
    finish(submit(tmp_path, RECORD_ONLY, SRUN_STATUS=str(status)), status)
    assert (tmp_path / "requeued.txt").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued.txt").read_text() == "417\n"


def test_a_requeued_job_resumes_from_last_ckpt(tmp_path):
    last = tmp_path / "my run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    finish(submit(tmp_path, RECORD_ONLY, RUN="my run"))
    command = (tmp_path / "srun.txt").read_text().splitlines()
    assert command[command.index("--ckpt_path") + 1] == "my run/checkpoints/last.ckpt"


def run_in_slurm(folder: Path) -> subprocess.Popen[str]:
    return submit(folder, START_TASKS, *OPTIONS, nodes="2", ntasks_per_node="1", RUN="run")


@pytest.mark.slow
def test_a_slurm_job_stopped_by_sigterm_resumes_and_ends_with_the_same_weights(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    finish(run_in_slurm(whole))
    assert not (whole / "requeued.txt").exists()

    last = parts / "run" / "checkpoints" / "last.ckpt"
    process = run_in_slurm(parts)
    while not last.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    for pid in (parts / "tasks.txt").read_text().split():  # like SLURM: each task, at slightly different times
        os.kill(int(pid), signal.SIGTERM)
        time.sleep(0.03)
    finish(process, 143)
    assert (parts / "requeued.txt").read_text() == "417\n"
    assert 3 <= torch.load(last, weights_only=True)["global_step"] < STEPS

    finish(run_in_slurm(parts))
    first, second = (torch.load(f / "run/checkpoints/last.ckpt", weights_only=True) for f in (whole, parts))
    assert first["global_step"] == second["global_step"] == STEPS
    assert all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())


@pytest.mark.slow
def test_two_machines_with_torchrun_make_one_run(tmp_path):
    text = DOCS.read_text()
    (block,) = re.findall(r"^```bash\n(torchrun.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    words = shlex.split(block.replace("\\\n", ""))
    own = {"HOST0": "127.0.0.1", "29500": str(free_port()), "4": "1"}
    words = [own.get(word, word) for word in words if word not in ("--config", "cityscapes", "--data.root", "PATH")]
    rank = words.index("--node_rank") + 1
    common = [sys.executable, "-m", "torch.distributed.run", *words[1:rank]]
    processes = [start([*common, machine, *words[rank + 1 :], *OPTIONS], tmp_path) for machine in "01"]
    outputs = [finish(process) for process in processes]
    assert sum("best val/mIoU" in output for output in outputs) == 1  # only one process prints and writes
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two_machines"]
    last = torch.load(tmp_path / "runs/two_machines/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == STEPS


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_that_would_train_separately_are_refused(variable, monkeypatch):
    if variable == "WORLD_SIZE":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv(variable, "2")
    one = {"accelerator": "cpu", "strategy": "auto", "devices": 1, "num_nodes": 1}
    with pytest.raises(UserError, match=r"^2 processes were started, but .*devices 1 and .*num_nodes 1 make 1;"):
        distributed_settings(one)
    both = one | {"num_nodes": 2, "accumulate_grad_batches": 1, "sync_batchnorm": False}
    assert "strategy" in distributed_settings(both)


def test_the_predicted_scaling_in_the_docs_equals_the_output_of_the_script():
    computed = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "scaling.py"))["tables"]()
    tables = computed.split("\n\n")
    assert len(tables) == 3
    assert all(f"\n\n{table.strip()}\n\n" in DOCS.read_text() for table in tables)
