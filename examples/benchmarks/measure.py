"""Shared parts of the benchmark scripts: options, interleaved timing, memory, tables and files.

Other work on a machine makes a call slower, never faster, and comes and goes. So ours and the peer are timed in turns,
ratios are of medians, and processor time, which does not grow while a process waits, decides whether a goal is met.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import rich
import torch
from page import cells, write_page
from pictures import ratio_bars
from rich.progress import Progress
from rich.table import Table

from early_fusion_seg.encoder.onednn_blocks import lacks_bfloat16

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "docs" / "images"
Row = dict[str, Any]


def options(
    description: str, peers: Sequence[str] = (), arguments: Sequence[str] | None = None, **others: Row
) -> argparse.Namespace:
    """Parse the common options and those of one script. With --quick nothing is written outside --output.

    Args:
        description: Shown by --help.
        peers: Names that --peers accepts; none: there is no such option.
        arguments: Default: those of the command line.
        **others: Name of a further option -> settings of `add_argument`.

    Returns:
        The options. `bf16` lists the precisions to measure: False for float32 and, where the device supports it, True.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    if peers:
        parser.add_argument("--peers", nargs="*", choices=peers, default=list(peers), help="default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repeat: tests the script")
    parser.add_argument("--output", type=Path, help="folder of the JSON and the picture; default: beside the script")
    for name, settings in others.items():
        parser.add_argument(f"--{name}", **settings)
    parsed = parser.parse_args(arguments)
    parsed.repeats = 1 if parsed.quick else parsed.repeats
    parsed.bf16 = [False] if parsed.device == "cpu" and lacks_bfloat16() else [False, True]
    return parsed


def in_turns(
    works: dict[str, Callable[[], Any]], repeats: int, device: str, progress: Progress, what: str
) -> dict[str, tuple[float, float]]:
    """Call all functions in turns, after one unmeasured round; return the medians of seconds and processor seconds."""
    return _in_turns({name: partial(_times, work, device) for name, work in works.items()}, repeats, progress, what)


def in_turns_apart(
    makers: dict[str, Callable[[], Callable[[], Any]]], repeats: int, device: str, progress: Progress, what: str
) -> dict[str, tuple[float, float]]:
    """Time like `in_turns`, with each function made and called in its own process, as in real use.

    In a shared process one network would reuse memory that another one has freed, and so avoid the page faults that it
    has when it runs alone.

    Args:
        makers: Name -> function that makes the timed function; pickled.
        repeats: Measured rounds.
        device: Such as cpu or cuda.
        progress: Progress bar.
        what: Its description.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        calls = {}
        for name, make in makers.items():
            pool = stack.enter_context(ProcessPoolExecutor(1, context, _keep, (make,)))
            calls[name] = partial(_result, pool, device)
        return _in_turns(calls, repeats, progress, what)


def timed(work: Callable[[], Any], device: str) -> tuple[Any, tuple[float, float]]:
    """Return the result of a call, its seconds and its processor seconds; on a GPU wall-clock time stands for both."""
    start = time.perf_counter(), time.process_time()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds, processor = time.perf_counter() - start[0], time.process_time() - start[1]
    return result, (seconds, processor if device == "cpu" else seconds)


def _times(work: Callable[[], Any], device: str) -> tuple[float, float]:
    return timed(work, device)[1]


def _in_turns(
    calls: dict[str, Callable[[], tuple[float, float]]], repeats: int, progress: Progress, what: str
) -> dict[str, tuple[float, float]]:
    """Call the functions, each of which returns its times, in turns; return the medians."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    task = progress.add_task(what, total=(repeats + 1) * len(calls))
    for _ in range(repeats + 1):
        for name, call in calls.items():
            seconds[name].append(call())
            progress.advance(task)
    return {
        name: tuple(statistics.median(column) for column in zip(*s[1:], strict=True)) for name, s in seconds.items()
    }


_kept: list[Callable[[], Any]] = []  # the function that this process times


def _keep(make: Callable[[], Callable[[], Any]]) -> None:
    _kept.append(make())


def _result(pool: ProcessPoolExecutor, device: str) -> tuple[float, float]:
    return pool.submit(_call, device).result()


def _call(device: str) -> tuple[float, float]:
    return _times(_kept[0], device)


def compared(what: str, times: dict[str, tuple[float, float]], goals: dict[str, float | None]) -> list[Row]:
    """Make a row for each peer of `goals`: its time over that of "ours", in wall-clock and in processor time.

    A goal is the least ratio of processor time that counts as met; None: no goal.
    """
    rows = []
    for peer, goal in goals.items():
        (ours, ours_cpu), (theirs, theirs_cpu) = times["ours"], times[peer]
        row = {"what": what, "peer": peer, "ours (ms)": 1000 * ours, "peer (ms)": 1000 * theirs}
        row |= {"ratio": theirs / ours, "cpu ratio": theirs_cpu / ours_cpu, "goal": goal}
        rows.append(row | {"met": None if goal is None else theirs_cpu / ours_cpu >= goal})
    return rows


FASTER = "Processor time of the peer / ours (above 1: ours is faster)"


def bars_of(rows: list[Row]) -> list[tuple[str, float]]:
    """Return name and ratio of processor time of each row of `compared`."""
    return [(f"{row['what']}: {row['peer']}", row["cpu ratio"]) for row in rows]


def add_exponents(rows: list[Row], key: str) -> None:
    """Add to each row the exponent with which its `key` grows with the pixels of the batch, from the first row on."""
    first = rows[0]
    for row in rows:
        pixels = row["batch"] * row["side"] ** 2 / (first["batch"] * first["side"] ** 2)
        row["exponent"] = math.log(row[key] / first[key], pixels) if pixels > 1 else None


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, where no memory that was freed before can be reused."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc returns freed memory at once, so that peaks are visible
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(work, arguments)
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


class Peak:
    """Peak resident memory (Linux) or peak allocated GPU memory since construction, in MiB."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        else:
            torch.cuda.reset_peak_memory_stats()
        self.start = resident() if device == "cpu" else torch.cuda.memory_allocated() / 2**20

    def extra(self) -> float:
        """Return the peak above the memory at construction."""
        peak = _status("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
        return peak - self.start


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def machine(device: str) -> str:
    """Name processor and GPU."""
    facts = Path("/proc/cpuinfo").read_text()
    (name,) = [line.split(": ")[1] for line in facts.splitlines() if line.startswith("model name")][:1]
    bf16 = " (avx512_bf16)" if "avx512_bf16" in facts else " (without bfloat16)" if lacks_bfloat16() else ""
    gpu = "no GPU" if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores of an {name}{bf16}, {gpu}, {torch.get_num_threads()} thread(s)"


def publish(
    script: str,
    title: str,
    text: str,
    tables: dict[str, list[Row]],
    bars: list[tuple[str, float]],
    ratio: str,
    chosen: argparse.Namespace,
) -> None:
    """Print the tables; write the JSON, a bar chart and, unless --output is given, the page.

    Args:
        script: Name of the script.
        title: Title of its section in the page.
        text: Description of what was measured.
        tables: Caption -> rows.
        bars: Name and ratio of each bar; empty: no chart.
        ratio: Title of the chart.
        chosen: The options.
    """
    tables = {caption: rows for caption, rows in tables.items() if rows}
    for caption, rows in tables.items():
        table = Table(*rows[0], title=caption)
        for row in rows:
            table.add_row(*cells(row))
        rich.get_console().print(table)
    if chosen.quick and chosen.output is None:
        return
    command = " ".join(["python", f"examples/benchmarks/{script}.py", *sys.argv[1:]])
    record = {
        "title": title,
        "text": text,
        "machine": machine(chosen.device),
        "date": str(date.today()),
        "command": command,
    }
    folder = chosen.output or HERE
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{script}.json").write_text(json.dumps(record | {"rows": tables}, indent=2) + "\n")
    if bars:
        path = (IMAGES if chosen.output is None else chosen.output) / f"benchmark_{script}.png"
        ratio_bars(bars, ratio, path)
    if chosen.output is None:
        write_page()
