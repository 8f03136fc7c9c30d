"""The steps of CONTRIBUTING.md for a loss and for a benchmark, followed literally in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import QUICK, QUIET, TINY_MODEL

ROOT = Path(__file__).parents[1]
STEP = re.compile(r"^(New file|Append to) `([^`]+)`(?:, [\w ]+)?:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return text


def follow(title: str, copy: Path) -> list[str]:
    """Apply the steps of a section to a copy of the package and its tests; the files that were touched."""
    for folder in ("early_fusion_seg", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    steps = STEP.findall(section(title))
    for kind, name, content in steps:
        path = copy / name
        assert path.exists() == (kind == "Append to"), name
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        gap = "\n\n" if old and name.endswith(".py") else ""
        path.write_text(old + gap + content, encoding="utf-8")
    return [name for _, name, _ in steps]


def run(copy: Path, *args: str) -> str:
    env = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *args], cwd=copy, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_add_a_loss(camvid: Path, tmp_path: Path) -> None:
    touched = follow("Add a loss", tmp_path / "copy")
    assert touched == ["early_fusion_seg/losses.py", "tests/test_losses.py"]
    assert "1 passed" in run(tmp_path / "copy", "pytest", "-q", "tests/test_losses.py", "-k", "focal")
    data = ["--config=camvid", f"--data.root={camvid}", "--data.crop_size=32", "--data.batch_size=2"]
    options = ["--trainer.max_steps=1", f"--output={tmp_path / 'run'}", '--model.loss={"focal": 1.0}']
    out = run(tmp_path / "copy", "early_fusion_seg", "fit", *data, *options, *TINY_MODEL, *QUICK, *QUIET)
    assert "best val/mIoU" in out
    assert "focal: 1.0" in (tmp_path / "run/config.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_add_a_benchmark(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    touched = follow("Add a benchmark", copy)
    new = [f"early_fusion_seg/{name}" for name in ("data/leaves.py", "labels/leaves.csv", "recipes/leaves.yaml")]
    assert touched == [*new, "early_fusion_seg/__init__.pyi"]
    seg = ("early_fusion_seg",)
    assert "fit --config leaves" in run(copy, *seg, "fake-data", "leaves", "LEAVES", "--images", "3")
    assert "usable: fit can start" in run(copy, *seg, "doctor", "leaves", "--data.root", "LEAVES")
    small = ["--data.batch_size=2", "--trainer.max_epochs=1", "--output=run", *TINY_MODEL, *QUICK, *QUIET]
    assert "best val/mIoU" in run(copy, *seg, "fit", "--config", "leaves", "--data.root", "LEAVES", *small)
    options = ["--predictions", "LEAVES/labels/val", "--output", "results.json"]
    run(copy, *seg, "evaluate", "leaves", "--data.root", "LEAVES", *options)
    assert json.loads((copy / "results.json").read_text(encoding="utf-8"))["miou"] == 1.0


def test_the_other_answers_name_places_that_exist() -> None:
    titles = ["Add a loss", "Add a benchmark", "Add a command", "Add a callback", "Add an export format"]
    for title in (*titles, "Add test-time augmentation"):
        named = re.findall(r"`(early_fusion_seg/[\w/]+(?:\.pyi?)?)`?", section(title))
        assert named, title
        for name in named:
            planned = {"NAME", "FORMAT", "leaves"} & set(re.split(r"[/.]", name))
            assert planned or (ROOT / name).exists(), name
