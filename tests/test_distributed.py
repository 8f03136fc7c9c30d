import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddp_run import STEPS

from early_fusion_seg.distributed import check_equal_across_ranks
from early_fusion_seg.errors import UserError
from early_fusion_seg.step_loss import StepLoss

RUNS: dict[int, list[dict[str, Any]]] = {}


def run(processes: int) -> list[dict[str, Any]]:
    """Run ddp_run.py, once for all tests: what each process measured."""
    if processes not in RUNS:
        script = str(Path(__file__).with_name("ddp_run.py"))
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, script, str(processes), folder]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        assert len(lines) == 1, done.stdout + done.stderr  # a second one would be a second writer
        RUNS[processes] = json.loads(lines[0].removeprefix("RESULT"))
        assert len(RUNS[processes]) == processes
    return RUNS[processes]


pytestmark = pytest.mark.xdist_group("processes")  # they share the runs


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_train_as_one_with_the_batches_of_all(processes):
    (one,), several = run(1), run(processes)
    assert len(one["fit"]["losses"]) == STEPS
    for rank in several:
        np.testing.assert_allclose(rank["fit"]["losses"], one["fit"]["losses"], atol=1e-4)
        assert rank["fit"]["scores"] == pytest.approx(one["fit"]["scores"], abs=1e-3)
    for step, keys in enumerate(one["fit"]["keys"]):
        assert sorted(key for rank in several for key in rank["fit"]["keys"][step]) == sorted(keys)
    naive = [rank["fit"]["losses"][0] for rank in several]
    assert len(set(naive)) == 1  # the loss that is logged is that of all


def test_accumulated_batches_train_as_one_batch():
    (one,) = run(1)
    np.testing.assert_allclose(one["accumulated"]["losses"], one["fit"]["losses"], atol=1e-4)


@pytest.mark.parametrize("images", ["five", "two"])
@pytest.mark.parametrize("processes", [2, 3])
def test_each_image_is_scored_once_whatever_the_number_of_processes(processes, images):
    (one,), several = run(1), run(processes)
    assert one[images]["images"] == {"five": 5, "two": 2}[images]
    for rank in several:  # with three processes, one gets no image of two
        assert rank[images]["confusion"] == one[images]["confusion"]
        assert rank[images]["images"] == one[images]["images"]
        assert rank[images]["scores"] == pytest.approx(one[images]["scores"], abs=1e-7)


@pytest.mark.parametrize("processes", [2, 3])
def test_panels_are_those_of_the_first_images_whatever_the_number_of_processes(processes):
    (one,), several = run(1), run(processes)
    assert list(one["five"]["panels"]) == [f"image-{i}.png" for i in range(4)]
    for images in ("five", "two"):
        assert several[0][images]["panels"] == one[images]["panels"]


@pytest.mark.parametrize("processes", [2, 3])
def test_the_frozen_encoder_is_not_sent_and_each_gradient_once(processes):
    for rank in run(processes):
        assert rank["fit"]["bytes"] == [rank["fit"]["gradients"]] * STEPS
        assert rank["fit"]["sent"] == []


def test_processes_agree_on_the_statistics_of_norms_and_on_scores():
    first, second = run(2)
    assert first["moving"]["statistics"] == second["moving"]["statistics"]
    assert first["moving"]["scores"] == second["moving"]["scores"]


@pytest.mark.parametrize("processes", [2, 3])
def test_all_end_after_the_same_step_where_one_is_told_to(processes):
    for rank in run(processes):  # in mid-epoch, at the end of an epoch, and where the run is over anyway
        assert rank["told"] == [[True, 1], [True, 2], [False, 4]]


def test_shares_of_a_step_are_mended_to_the_loss_of_all_its_pixels():
    parameter = torch.nn.Parameter(torch.ones(()))
    losses, weights = torch.tensor([2.0, 5.0, 11.0]), torch.tensor([1.0, 0.0, 3.0])
    step = StepLoss(shared=True, batches=3)
    for loss, weight in zip(losses, weights, strict=True):
        (step.add(loss * parameter, weight, ["a"]) / 3).backward()  # as an engine that averages over 3
    assert step.finish([parameter], 0).item() == pytest.approx((2 * 1 + 11 * 3) / 4)
    assert parameter.grad.item() == pytest.approx((2 * 1 + 11 * 3) / 4)


def test_a_step_without_labeled_pixels_moves_nothing():
    parameter = torch.nn.Parameter(torch.ones(()))
    step = StepLoss(shared=True, batches=2)
    step.add(0.0 * parameter, torch.tensor(0.0), ["a"]).backward()
    assert step.finish([parameter], 0).item() == 0
    assert parameter.grad.item() == 0


def test_a_loss_that_is_not_finite_names_the_images_of_its_batch_alone():
    step = StepLoss(shared=True, batches=2)
    step.add(torch.tensor(1.0), torch.tensor(1.0), ["good"])
    step.add(torch.tensor(torch.nan), torch.tensor(1.0), ["bad", "worse"])
    with pytest.raises(UserError, match="loss is nan at step 7, on the images bad, worse;"):
        step.finish([], 7)


def test_processes_with_different_encoders_are_refused(monkeypatch):
    def gather(values: list[str], own: str) -> None:
        values[:] = [own, "0" * 64]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(UserError, match=r"different encoders: .*0000"):
        check_equal_across_ranks("1" * 64, "encoders")
