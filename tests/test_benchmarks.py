"""The scripts that compare with peers, in their quick form; nothing here depends on how fast a machine is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
PAGE = BENCHMARKS.parents[1] / "docs" / "benchmarks.md"


def quick(script: str, output: Path) -> dict[str, list[dict[str, object]]]:
    """Run a script; the tables of its JSON."""
    page = PAGE.read_text()
    words = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick", "--output", str(output)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert PAGE.read_text() == page
    with Image.open(output / f"benchmark_{script}.png") as picture:
        assert picture.width > 100
    record = json.loads((output / f"{script}.json").read_text())
    assert {"title", "text", "command", "machine", "date"} < set(record)
    return record["rows"]


@pytest.mark.slow
def test_inference(tmp_path):
    rows = quick("inference", tmp_path)
    assert [row["peer"] for row in rows["Prediction, each image"]] == ["torchvision fcn_resnet50"]
    encoder = {(row["what"], row["peer"]): row for row in rows["Encoder"]}
    assert encoder["encoder, float32", "timm"]["difference"] < 1e-4
    assert ("encoder, bfloat16", "timm") in encoder
    assert [row["images"] for row in rows["Memory over many images"]] == list(range(1, 11))


@pytest.mark.slow
def test_evaluation(tmp_path):
    rows = quick("evaluation", tmp_path)  # which ends with an error where the matrices differ
    cases = ["uint8", "uint8, deterministic", "int64", "int64, deterministic"]
    assert [row["what"] for row in rows["Memory of an update"]] == cases
    assert [r["what"] for r in rows["Time of an update"] if r["peer"] == "torchmetrics"] == cases
    (large,) = rows["Memory of one large image"]
    assert large["pixels that differ"] == 0
