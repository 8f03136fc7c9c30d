"""metrics.csv: a resumed run continues the file of its folder; another run sets it aside."""

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only

from early_fusion_seg.io.atomic import replace_file
from early_fusion_seg.io.run_folder import last_number


@contextlib.contextmanager
def preserve_metrics_csv(folder: Path) -> Iterator[None]:
    """Rename the metrics.csv of another run in the same folder, which the CSV logger would delete.

    The file gets its name back if no new one was written: after an early error, or by `predict`.
    """
    metrics = folder / "metrics.csv"
    if getattr(rank_zero_only, "rank", 0) or not metrics.is_file():
        yield
        return
    earlier = metrics.replace(folder / f"metrics_{max(0, last_number(folder, 'metrics_')) + 1}.csv")
    try:
        yield
    finally:
        if not metrics.exists():
            earlier.replace(metrics)


@contextlib.contextmanager
def continue_metrics_csv(folder: Path, loggers: list[Logger]) -> Iterator[None]:
    """Let the CSV logger continue the metrics.csv of the run that is resumed.

    Steps after the checkpoint are trained again and logged again; at the end, each row is in the file once.
    """
    metrics = folder / "metrics.csv"
    logger = next((logger for logger in loggers if isinstance(logger, CSVLogger)), None)
    if getattr(rank_zero_only, "rank", 0) or logger is None or not metrics.is_file():
        yield
        return
    with preserve_metrics_csv(folder):
        experiment = logger.experiment  # deletes the file, if there is one
    with metrics.open(encoding="utf-8", newline="") as file:
        experiment.metrics_keys = list(csv.DictReader(file).fieldnames or ())
    try:
        yield
    finally:
        _remove_repeated_rows(metrics)


def _remove_repeated_rows(metrics: Path) -> None:
    """Keep the last one of the rows with equal step, epoch and names of values."""
    with metrics.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows: dict[tuple[str | None, ...], dict[str, str]] = {}
        for row in reader:
            key = (row["step"], row.get("epoch"), *(name for name, value in row.items() if value))
            rows.pop(key, None)
            rows[key] = row
        names = list(reader.fieldnames or ())
        repeated = reader.line_num - 1 > len(rows)
    if repeated:
        replace_file(metrics, lambda part: _write(part, names, list(rows.values())))


def _write(path: Path, names: list[str], rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
