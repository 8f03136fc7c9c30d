import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddp_run import STEPS, VIT_STEPS

from early_fusion_seg.distributed import check_equal_across_ranks
from early_fusion_seg.errors import UserError

RUNS: dict[int, list[dict[str, Any]]] = {}


def run(processes: int) -> list[dict[str, Any]]:
    """Run ddp_run.py once for all tests, and return the results of each process."""
    if processes not in RUNS:
        script = str(Path(__file__).with_name("ddp_run.py"))
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, script, str(processes), folder]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        assert len(lines) == 1, done.stdout + done.stderr  # only one process may print
        RUNS[processes] = json.loads(lines[0].removeprefix("RESULT"))
        assert len(RUNS[processes]) == processes
    return RUNS[processes]


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_train_like_one_with_all_batches(processes):
    (one,), several = run(1), run(processes)
    for run_name, steps in (("fit", STEPS), ("vit", VIT_STEPS)):
        assert len(one[run_name]["losses"]) == steps
        for rank in several:
            np.testing.assert_allclose(rank[run_name]["losses"], one[run_name]["losses"], atol=1e-4)
            assert rank[run_name]["scores"] == pytest.approx(one[run_name]["scores"], abs=1e-3)
    for step, keys in enumerate(one["fit"]["keys"]):
        assert sorted(key for rank in several for key in rank["fit"]["keys"][step]) == sorted(keys)
    logged = [rank["fit"]["losses"][0] for rank in several]
    assert len(set(logged)) == 1  # the loss over all processes


def test_accumulated_batches_train_like_one_batch():
    (one,) = run(1)
    np.testing.assert_allclose(one["accumulated"]["losses"], one["fit"]["losses"], atol=1e-4)


@pytest.mark.parametrize("images", ["five", "two"])
@pytest.mark.parametrize("processes", [2, 3])
def test_each_image_is_scored_once_for_any_number_of_processes(processes, images):
    (one,), several = run(1), run(processes)
    assert one[images]["images"] == {"five": 5, "two": 2}[images]
    for rank in several:  # with three processes and two images, one process has none
        assert rank[images]["confusion"] == one[images]["confusion"]
        assert rank[images]["images"] == one[images]["images"]
        assert rank[images]["scores"] == pytest.approx(one[images]["scores"], abs=1e-7)


@pytest.mark.parametrize("processes", [2, 3])
def test_panels_show_the_first_images_for_any_number_of_processes(processes):
    (one,), several = run(1), run(processes)
    assert list(one["five"]["panels"]) == [f"image-{i}.png" for i in range(4)]
    for images in ("five", "two"):
        assert several[0][images]["panels"] == one[images]["panels"]


@pytest.mark.parametrize("processes", [2, 3])
def test_the_frozen_encoder_is_not_synchronized_and_each_gradient_once(processes):
    for rank in run(processes):
        for run_name, steps in (("fit", STEPS), ("vit", VIT_STEPS)):
            assert rank[run_name]["bytes"] == [rank[run_name]["gradients"]] * steps
            assert rank[run_name]["synchronized"] == []


def test_all_processes_have_equal_batch_norm_statistics_and_scores():
    first, second = run(2)
    assert first["train_norms"]["statistics"] == second["train_norms"]["statistics"]
    assert first["train_norms"]["scores"] == second["train_norms"]["scores"]


@pytest.mark.parametrize("processes", [2, 3])
def test_sigterm_to_one_process_stops_all_after_the_same_step(processes):
    for rank in run(processes):  # SIGTERM within an epoch, at the end of an epoch, and after the last step
        assert rank["sigterm"] == [[True, 1], [True, 2], [False, 4]]


def test_processes_with_different_encoders_are_refused(monkeypatch):
    def gather(values: list[str], own: str) -> None:
        values[:] = [own, "0" * 64]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(UserError, match=r"different encoders: .*0000"):
        check_equal_across_ranks("1" * 64, "encoders")
