"""Evaluation results as a dictionary, as JSON, as Markdown and as a table for the terminal.

Scores are fractions 0..1 in the dictionary and in JSON, and percentages in the terminal and in Markdown. An undefined
score (of a class that never occurs) is None, `null` in JSON. docs/results-schema.md explains every key.
"""

import html
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, SupportsFloat, TypedDict

from rich.table import Table

from early_fusion_seg.io.atomic import replace_file
from early_fusion_seg.io.terminal import plain

SCHEMA = 2
HEADLINES = {
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "fw_iou": "frequency-weighted IoU",
}


class EncoderFacts(TypedDict):
    """Name of the encoder, and source, package, fingerprint and license of its weights."""

    name: str
    weights: str
    package: str | None
    fingerprint: str
    license: str | None


class RunFacts(TypedDict):
    """Data, settings and model of an evaluation: everything in `results.json` that is not a score."""

    data: str
    split: str
    images: int
    partial: bool
    absent: str
    pred_void: str
    inference: dict[str, Any] | None
    plain: dict[str, float | None] | None
    checkpoint: str | list[str] | None
    predictions: str | None
    encoder: EncoderFacts | None
    seed: int | None
    precision: str | None
    config: dict[str, Any]


class Results(RunFacts):
    """All contents of `results.json`."""

    schema: int
    miou: float | None
    pixel_accuracy: float | None
    mean_accuracy: float | None
    fw_iou: float | None
    ece: float | None
    nll: float | None
    per_class: dict[str, float | None]
    versions: dict[str, str]


def finite(value: SupportsFloat) -> float | None:
    """Return the value as a float, or None if it is nan or infinite.

    Example:
        >>> finite(0.5), finite(float("nan"))
        (0.5, None)
    """
    number = float(value)
    return number if math.isfinite(number) else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that scores depend on."""
    packages = {"early_fusion_seg": "early-fusion-seg"} | {
        name: name for name in ("torch", "lightning", "torchmetrics", "timm")
    }
    return {key: version(name) for key, name in packages.items()} | {"python": platform.python_version()}


def build_results(scores: Mapping[str, Any], class_names: Sequence[str], facts: RunFacts) -> Results:
    """Combine the scores of `SegmentationMetrics.compute()` with the facts of the run.

    Args:
        scores: Scalars `miou`, `pixel_accuracy`, `mean_accuracy`, `fw_iou` and `per_class` (K,), fractions 0..1,
            nan if undefined. Networks also have `ece` and `nll`.
        class_names: The K names, in train-id order.
        facts: Everything that is not a score.

    Returns:
        Plain Python values without nan, in the order of the file.
    """
    per_class = zip(class_names, scores["per_class"], strict=True)
    return Results(
        schema=SCHEMA,
        miou=finite(scores["miou"]),
        pixel_accuracy=finite(scores["pixel_accuracy"]),
        mean_accuracy=finite(scores["mean_accuracy"]),
        fw_iou=finite(scores["fw_iou"]),
        ece=finite(scores.get("ece", math.nan)),
        nll=finite(scores.get("nll", math.nan)),
        per_class={name: finite(value) for name, value in per_class},
        versions=versions(),
        **facts,
    )


def write_json(results: Mapping[str, Any], path: Path) -> None:
    """Write results as strict JSON, replacing the file atomically.

    Args:
        results: Plain values; nan and infinite numbers become null.
        path: Output file; missing folders are created.
    """
    text = json.dumps(_without_nan(results), indent=2, allow_nan=False) + "\n"
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def _without_nan(value: Any) -> Any:
    """Replace nan and infinite floats by None, at any depth."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def percent(value: float | None) -> str:
    """Format a fraction as a percentage.

    Example:
        >>> percent(0.4567), percent(None)
        ('45.7', '-')
    """
    return "-" if value is None else f"{100 * value:.1f}"


def table_rows(results: Results) -> list[tuple[str, str]]:
    """Return (class name, IoU as a percentage) for each class, in train-id order."""
    return [(name, percent(value)) for name, value in results["per_class"].items()]


def headline_rows(results: Results) -> list[tuple[str, str]]:
    """Return (name, percentage) for each score over all classes, mIoU first."""
    values: Mapping[str, Any] = results
    return [(title, percent(values[key])) for key, title in HEADLINES.items()]


def caption(results: Results) -> str:
    """Describe in one line what was scored: data, split, number of images, and inference settings."""
    part = " (a part of the split)" if results["partial"] else ""
    return f"{results['data']} {results['split']}: {results['images']} images{part}{inference_text(results)}"


def inference_text(results: Results) -> str:
    """Return the inference settings that differ from one pass of the whole image at its size, after a comma."""
    given = results["inference"] or {}
    parts = [f"input scale {given['scale']:g}"] if given.get("scale") not in (None, 1.0) else []
    if given.get("short_side") is not None:
        parts.append(f"shorter side {given['short_side']}")
    if given.get("scales", [1.0]) != [1.0]:
        parts.append(f"scales {', '.join(f'{factor:g}' for factor in given['scales'])}")
    if given.get("flip"):
        parts.append("flip")
    if given.get("ensemble", 1) > 1:
        parts.append(f"ensemble of {given['ensemble']}")
    return "".join(f", {part}" for part in parts)


def markdown(results: Results) -> str:
    """Return the scores as a Markdown table below a caption."""
    rows = [(_markdown_text(name), value) for name, value in table_rows(results)]
    rows += [(f"**{name}**", f"**{value}**") for name, value in headline_rows(results)]
    table = ["| class | IoU % |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join([_markdown_text(caption(results)), "", *table]) + "\n"


def _markdown_text(text: str) -> str:
    """Escape what Markdown reads as markup: characters of its own, and tags of HTML."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(text, quote=False))


def score_table(results: Results) -> Table:
    """Return the scores as a rich table for the terminal, without the caption."""
    table = Table()
    table.add_column("class")
    table.add_column("IoU %", justify="right")
    one_pass = results["plain"]
    if one_pass is not None:
        alone = (results["inference"] or {}).get("ensemble", 1) == 1
        table.add_column("in one pass" if alone else "first alone, in one pass", justify="right")
    for name, value in table_rows(results):
        table.add_row(plain(name), value)
    table.add_section()
    for (name, value), key in zip(headline_rows(results), HEADLINES, strict=True):
        table.add_row(name, value, *([] if one_pass is None else [percent(one_pass[key])]), style="bold")
    return table
