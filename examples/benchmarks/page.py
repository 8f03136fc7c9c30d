"""Write docs/benchmarks.md, one section for each script, and the sections of IN_PAGES, from the scripts' JSON.

python examples/benchmarks/page.py
"""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "benchmarks.md"
IN_PAGES = {"encoders": PAGE.with_name("encoders.md"), "freezing": PAGE.with_name("results.md")}
"""Scripts whose section is in another page, where its title is; the rest of that page is written by hand."""
SCRIPTS = (
    "heads", "train_step", "memory", "inference", "export", "evaluation", "data", "street_scenes", "from_scratch",
)  # fmt: skip
"""Those whose JSON, where there is one, is a section; in this order."""

HEAD = """\
# Benchmarks

Each section is made by one script of `examples/benchmarks` and shows its command, the machine and the date. "Ours" is
the default network; sections of November 25 and before were measured with the former default head (`width=[16, 32,
64, 128, 256]`, `hr_modules=[2, 0, 0, 0, 0]`, `blocks=[0, 0, 1, 1, 1]`). Its encoder is a frozen ResNet-50 with random
weights unless the section says otherwise. The peers are networks of segmentation-models-pytorch, torchvision and timm
with their defaults. `pip install -e ".[bench]"` installs what the scripts need.
"""


def write_page() -> None:
    """Write the pages from all records that are there."""
    texts = {PAGE: page()} | {path: with_section(path, script) for script, path in IN_PAGES.items()}
    for path, text in texts.items():
        path.write_text(text)
        print(f"written: {path}")


def page() -> str:
    """Return the page of benchmarks as Markdown."""
    paths = [HERE / f"{script}.json" for script in SCRIPTS]
    return "\n".join([HEAD, *(section(path.stem, json.loads(path.read_text())) for path in paths if path.exists())])


def with_section(path: Path, script: str) -> str:
    """Return a page with the section that a script makes, from its title up to the next one."""
    record, text = HERE / f"{script}.json", path.read_text()
    if not record.exists():
        return text
    made = json.loads(record.read_text())
    before, old = text.split(f"## {made['title']}\n")
    after = old.partition("\n## ")[2]
    return f"{before}{section(script, made)}\n## {after}"


def section(script: str, record: dict[str, Any]) -> str:
    """Return a script's tables as Markdown, with its picture where there is one."""
    lines = [f"## {record['title']}", "", record["text"], ""]
    lines += [f"`{record['command']}`; {record['machine']}, {record['date']}.", ""]
    picture = f"images/benchmark_{script}.png"
    if (PAGE.parent / picture).exists():
        lines += [f"![{record['title']}]({picture})", ""]
    for caption, rows in record["rows"].items():
        columns = ["---:" if isinstance(v, int | float) else "---" for v in rows[0].values()]
        lines += [f"{caption}:", "", f"| {' | '.join(rows[0])} |", f"|{'|'.join(columns)}|"]
        lines += [f"| {' | '.join(cells(row))} |" for row in rows] + [""]
    rows = [row for rows in record["rows"].values() for row in rows]
    return "\n".join([*lines, *([missed_goals(rows), ""] if any("met" in row for row in rows) else [])])


def missed_goals(rows: list[Row]) -> str:
    """List the rows that miss their goal and, of those without a goal, the ones in which the peer is faster."""
    missed = [name(row) for row in rows if row.get("met") is False]
    behind = [name(row) for row in rows if row.get("met") is None and row.get("cpu ratio", 1.0) < 1]
    sentences = [f"Goals missed: {'; '.join(missed) or 'none'}."]
    return " ".join([*sentences, *([f"Slower than the peer: {'; '.join(behind)}."] if behind else [])])


def name(row: Row) -> str:
    """Name a row by its first column, and its peer where it has one."""
    first = str(next(iter(row.values())))
    return f"{first} against {row['peer']}" if "peer" in row else first


def cells(row: Row) -> list[str]:
    """Format the values of a row."""
    return [cell(value) for value in row.values()]


def cell(value: Any) -> str:
    """Format a float with three digits or more, None as an empty cell, and a bool as yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    write_page()
