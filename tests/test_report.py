import html
import io
import json
import math
import platform
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from rich.console import Console

from early_fusion_seg.callbacks import show_results
from early_fusion_seg.report import (
    EncoderFacts,
    Results,
    RunFacts,
    build_results,
    caption,
    headline_rows,
    markdown,
    score_table,
    table_rows,
    write_json,
)

SCHEMA_DOC = Path(__file__).parents[1] / "docs" / "results-schema.md"


def facts(**changes: object) -> RunFacts:
    values = {
        "data": "CamVidDataModule",
        "split": "val",
        "images": 3,
        "partial": False,
        "absent": "zero",
        "pred_void": "fn",
        "inference": None,
        "plain": None,
        "checkpoint": "runs/best.ckpt",
        "predictions": None,
        "encoder": EncoderFacts(name="resnet18", weights="random", package=None, fingerprint="ab" * 32, license=None),
        "seed": 0,
        "precision": "32-true",
        "config": {"trainer": {"max_epochs": 2}},
    }
    return RunFacts(**(values | changes))


def results(**changes: object) -> Results:
    scores = {
        "miou": torch.tensor(0.5, dtype=torch.float64),
        "pixel_accuracy": torch.tensor(0.75),
        "mean_accuracy": 0.25,
        "fw_iou": torch.tensor(math.nan),
        "per_class": torch.tensor([0.5, math.nan, 0.25]),
    }
    return build_results(scores, ["road", "a|b", "sky"], facts(**changes))


def test_scores_become_plain_numbers_and_undefined_ones_none() -> None:
    r = results()
    assert r["miou"] == 0.5
    assert r["fw_iou"] is None
    assert r["per_class"] == {"road": 0.5, "a|b": None, "sky": 0.25}
    assert type(r["pixel_accuracy"]) is float


def test_names_and_scores_must_have_equal_length() -> None:
    scores = dict.fromkeys(("miou", "pixel_accuracy", "mean_accuracy", "fw_iou"), 0.0)
    with pytest.raises(ValueError, match="longer"):
        build_results(scores | {"per_class": torch.zeros(2)}, ["one"], facts())


def test_versions_of_installed_packages() -> None:
    found = results()["versions"]
    assert found["python"] == platform.python_version()
    assert found["torch"] == version("torch")
    assert set(found) == {"early_fusion_seg", "python", "torch", "lightning", "torchmetrics", "timm"}


def test_json_has_no_nan_at_any_depth_and_no_other_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    r = results(config={"a": [math.inf, (1.0, math.nan)], 3: {"b": -math.inf}})
    write_json(r, path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read["config"] == {"a": [None, [1.0, None]], "3": {"b": None}}
    assert read["per_class"] == {"road": 0.5, "a|b": None, "sky": 0.25}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_the_schema_document_explains_exactly_the_keys_that_are_written(tmp_path: Path) -> None:
    write_json(results(), tmp_path / "results.json")
    read = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    written = set(read) | {f"encoder.{key}" for key in read["encoder"]} | {f"versions.{k}" for k in read["versions"]}
    documented = re.findall(r"^\| `([\w.]+)` \|", SCHEMA_DOC.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert set(documented) == written


def test_tables_have_percentages() -> None:
    assert table_rows(results()) == [("road", "50.0"), ("a|b", "-"), ("sky", "25.0")]
    assert headline_rows(results())[0] == ("mIoU", "50.0")
    assert headline_rows(results())[-1] == ("frequency-weighted IoU", "-")


def test_the_caption_names_a_partial_split_and_the_inference_settings() -> None:
    assert caption(results()) == "CamVidDataModule val: 3 images"
    assert caption(results(partial=True, inference={"scale": 0.5, "scales": [1.0], "flip": False})) == (
        "CamVidDataModule val: 3 images (a part of the split), input scale 0.5"
    )
    many = {"scale": None, "short_side": 90, "scales": (0.5, 1.0), "flip": True}
    assert caption(results(inference=many)).endswith("3 images, shorter side 90, scales 0.5, 1, flip")
    assert caption(results(inference={"scale": 1.0})).endswith("3 images")


def test_the_table_shows_the_scores_of_one_pass_beside_those_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    plain = {"miou": 0.4, "pixel_accuracy": 0.9, "mean_accuracy": 0.125, "fw_iou": None}
    Console().print(score_table(results(plain=plain)))
    printed = capsys.readouterr().out
    assert "in one pass" in printed
    for value in ("40.0", "90.0", "12.5"):
        assert value in printed


def test_the_caption_is_one_line_whatever_the_width_of_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"miou": 0.5, "pixel_accuracy": 0.5, "mean_accuracy": 0.5, "fw_iou": 0.5, "per_class": [0.5]}
    named = build_results(scores, ["a"], facts(data="My[Data]" * 12))
    show_results(named, None)
    assert f"{'My[Data]' * 12} val: 3 images\n" in capsys.readouterr().out


def test_markdown_has_a_table_of_two_columns() -> None:
    lines = markdown(results()).splitlines()
    assert lines[2:4] == ["| class | IoU % |", "|---|---:|"]
    assert "| a\\|b | - |" in lines
    assert "| **mIoU** | **50.0** |" in lines
    assert all(len(re.split(r"(?<!\\)\|", line)) == 4 for line in lines[2:])


def test_the_terminal_table_has_every_class_and_score() -> None:
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(score_table(results()))
    text = console.export_text()
    assert all(word in text for word in ("road", "a|b", "sky", "50.0", "mIoU", "pixel accuracy"))


NAMES = ["sign [back]", "left/right [/both]", ":car:", "<void>", "a*b*_c_", r"back\slash"]


def test_class_names_are_no_markup_in_the_table_and_in_markdown() -> None:
    scores = {"miou": 0.5, "pixel_accuracy": 0.5, "mean_accuracy": 0.5, "fw_iou": 0.5, "per_class": [0.5] * len(NAMES)}
    named = build_results(scores, NAMES, facts(data="My[Data]"))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(score_table(named))
    text = console.export_text()
    assert all(name in text for name in NAMES)
    shown = MarkdownIt().enable("table").render(markdown(named))
    assert all(f"<td>{html.escape(name)}</td>" in shown for name in NAMES)
