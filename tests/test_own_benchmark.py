"""A data set from outside the package, by its class path, in every command that takes data."""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from cli_runs import QUICK, QUIET, TINY_MODEL
from PIL import Image

from early_fusion_seg.__main__ import main
from early_fusion_seg.data.replica import block_scene, save_pixels

COLORS = np.array([[0, 0, 0], [0, 160, 0], [180, 90, 20], [250, 250, 250]], np.uint8)
CLASS = "own_benchmark.LeavesDataModule"

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    monkeypatch.delitem(sys.modules, "own_benchmark", raising=False)
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for number in range(3):
            image, labels = block_scene(rng, (40, 52), COLORS)
            save_pixels(tmp_path / "leaves/photos" / split / f"{number}.jpg", image)
            if split != "test":
                save_pixels(tmp_path / "leaves/labels" / split / f"{number}.png", np.where(labels == 3, 9, labels))
    return tmp_path / "leaves"


def test_every_command_takes_it(leaves: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", CLASS, "--data.root", str(leaves)]
    assert main(["doctor", *data]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == f"{leaves}: Leaves"
    assert "usable: fit can start" in printed
    small = ["--data.crop_size=32", "--data.batch_size=2", "--trainer.max_epochs=1", "--output=run"]
    assert main(["fit", *data, *small, *TINY_MODEL, *QUICK, *QUIET]) == 0
    checkpoint = "run/checkpoints/best.ckpt"
    assert main(["validate", *data, f"--ckpt_path={checkpoint}", "--output=val", *QUICK, QUIET[0]]) == 0
    results = json.loads(Path("val/results.json").read_text())
    assert (results["data"], results["absent"], results["images"]) == ("LeavesDataModule", "gt-only", 3)
    assert list(results["per_class"]) == ["background", "healthy", "rust"]
    assert main(["submit", *data, "--ckpt_path", checkpoint, "--output", "out"]) == 0
    assert "leaves.example.org" in capsys.readouterr().out
    with zipfile.ZipFile("out/leaves.zip") as archive:
        assert sorted(archive.namelist()) == ["0.png", "1.png", "2.png"]
        with archive.open("0.png") as file:
            assert set(np.unique(Image.open(file)).tolist()) <= {0, 1, 2}
    assert main(["evaluate", *data, "--predictions", str(leaves / "labels/val"), "--output", "truth.json"]) == 0
    assert json.loads(Path("truth.json").read_text())["miou"] == 1.0


def test_doctor_names_its_own_fix(leaves: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = leaves / "labels/train/1.png"
    mask.write_bytes(mask.read_bytes()[:40])
    assert main(["doctor", f"--data={CLASS}", "--data.root", str(leaves)]) == 1
    assert "to fix: ask for the labels again" in capsys.readouterr().out


@pytest.mark.parametrize(("path", "message"), [
    ("own_benchmark.Nope", "--data own_benchmark.Nope cannot be imported ("),
    ("nowhere.Nope", "--data nowhere.Nope cannot be imported ("),
    ("Nope", "--data Nope cannot be imported ("),
    ("own_benchmark.LEAVES", "is not a subclass of early_fusion_seg.data.SegmentationDataModule"),
])  # fmt: skip
def test_a_class_that_cannot_be_used_is_an_error(
    path: str, message: str, leaves: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--data", path, "--data.root", str(leaves)]) == 2
    assert message in capsys.readouterr().err
