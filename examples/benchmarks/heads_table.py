"""Write docs/benchmarks.md from what heads.py, data.py and the comparisons with peers have measured."""

import json
import statistics
from operator import itemgetter
from pathlib import Path
from typing import Any

from pictures import points

Records = list[dict[str, Any]]
TARGET = Path(__file__).parents[2] / "docs" / "benchmarks.md"
READING = """\
`python examples/benchmarks/data.py`: one training sample with the recipe's augmentation, in one worker, against bare
decoding of its image (OpenCV) and mask (Pillow), on generated files of real size; medians of the processor's time, the
ratio of the sums and the median ratio;"""
HERE = Path(__file__).parent
RESULTS, DATA = HERE / "heads.jsonl", HERE / "data.json"
CODES = {"streams": "now", "streams at once": "upsampled at once", "streams down": "and with all paths down"}
"""Stage of heads.jsonl -> which code made it."""

LAST_DOWN = "2026-11-23"
"""The last day on which streams also got what finer ones gave them where no later module took it."""
COMPARED = ("train_step", "memory", "inference", "evaluation", "street_scenes", "from_scratch")
"""Scripts whose JSON is a section of its own, see `section`."""
SMALL_CLASSES = {"Pole": 2, "SignSymbol": 6, "Pedestrian": 9, "Bicyclist": 10}
"""Train ids of CamVid's 11 classes."""
HEAD = """\
# Heads compared on one frozen encoder

CamVid at 240x180 (11 classes), ResNet-50, the same batches, budget, seeds and augmentation for every head:
`python examples/benchmarks/heads.py run|cost|table`, whose head describes the procedure. The peers are the decoders and
segmentation heads of segmentation-models-pytorch with its defaults, on the same maps of the same encoder object. No
encoder here has ImageNet weights: "random" is a random frozen ResNet-50, "camvid" one trained on CamVid's train
without sequence 0001TP, with a plain FCN head, and then frozen. Figures of val are never comparable with published
ones of the test split.
"""


def read_results() -> Records:
    """Read what heads.py has measured so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def write_table(records: Records) -> None:
    """Write the page."""
    parts, costs = [HEAD], [r for r in records if r["stage"] == "cost"]
    earlier = [r for r in costs if r["date"] <= LAST_DOWN]
    for encoder in ("random", "camvid"):
        screened = [r for r in records if r["stage"] == "screen" and r["encoder"] == encoder]
        finals = [r for r in records if r["stage"] == "final" and r["encoder"] == encoder]
        if screened:
            parts.append(screening(encoder, screened))
        if finals:
            parts.append(final(encoder, finals, earlier))
        if not screened or not finals:
            parts.append(f"Encoder {encoder}: {'finals ' if screened else ''}not measured yet.\n")
    if choices := [r for r in records if r["stage"] == "choice"]:
        parts.append(choice(choices))
    if larger := [r for r in records if r["stage"] == "large"]:
        parts.append(large(larger, earlier))
    if any(r["stage"] == "streams" for r in records):
        parts.append(streams({name: [r for r in records if r["stage"] == name] for name in CODES}, costs))
    if repeated := [r for r in records if r["stage"] == "again"]:
        parts.append(again(repeated, [r for r in records if r["stage"] == "final"]))
    parts.append(cost(costs) if costs else "Costs: not measured yet.\n")
    if DATA.exists():
        parts.append(loading(json.loads(DATA.read_text())))
    measured = [script for script in COMPARED if (HERE / f"{script}.json").exists()]
    parts += [section(script, json.loads((HERE / f"{script}.json").read_text())) for script in measured]
    TARGET.write_text("\n".join(parts))
    print(f"written: {TARGET}")


def screening(encoder: str, records: Records) -> str:
    """One row for each head: mIoU on the held-out sequence at each learning rate."""
    rates = sorted({r["lr"] for r in records})
    dates = sorted({r["date"] for r in records if "date" in r})
    lines = [f"## Screening, encoder {encoder}", ""]
    lines += [
        f"mIoU (%) on sequence 0001TP, held out of train; one seed, {records[0]['epochs']} epochs; {span(dates)}.",
        "",
    ]
    lines += ["| head | " + " | ".join(f"lr {r:g}" for r in rates) + " |", "|---|" + "---|" * len(rates)]
    best = {name: max(r["miou"] for r in records if r["head"] == name) for name in {r["head"] for r in records}}
    for name in sorted(best, key=lambda n: -best[n]):
        cells = {r["lr"]: f"{100 * r['miou']:.1f}" for r in records if r["head"] == name}
        lines.append(f"| {name} | " + " | ".join(cells.get(rate, "") for rate in rates) + " |")
    return "\n".join([*lines, ""])


def final(encoder: str, records: Records, costs: Records) -> str:
    """One row for each finalist: mean and spread over the seeds on val, and what it costs."""
    dates = sorted({r["date"] for r in records if "date" in r})
    lines = [f"## Finals, encoder {encoder}", ""]
    lines += [
        f"mIoU (%) on val, trained on all of train, {records[0]['epochs']} epochs; {span(dates)}. Costs",
        f"as below, but of the code of {LAST_DOWN}, when the last HR module had paths down too.",
        "The code of 2026-11-23 adds votes in float32 under bf16 too; what that makes out for two heads stands below.",
        "",
    ]
    lines += ["| head | trained | lr | seeds | mean | lowest to highest | M parameters | GFLOPs | MiB | time / Unet |"]
    lines += ["|---|---|---:|---:|---:|---|---:|---:|---:|---:|"]
    rows = {name: [r for r in records if r["head"] == name] for name in {r["head"] for r in records}}
    latest = {r["head"]: r for r in costs}
    drawn = []
    for name, runs in sorted(rows.items(), key=lambda item: -statistics.mean(r["miou"] for r in item[1])):
        scores = [100 * r["miou"] for r in runs]
        spread = f"{min(scores):.1f} to {max(scores):.1f}"
        numbers = figures(latest[name]) if name in latest else " | | |"
        facts = [name, runs[0]["date"], f"{runs[0]['lr']:g}", len(runs), f"{statistics.mean(scores):.1f}", spread]
        lines.append(f"| {' | '.join(map(str, facts))} | {numbers} |")
        if name in latest:
            drawn.append((name, latest[name]["saved_mib"], statistics.mean(scores)))
    if drawn:
        picture = TARGET.parent / "images" / f"benchmark_finals_{encoder}.png"
        points(drawn, ("saved activations (MiB)", "val mIoU (%)"), picture)
        lines += ["", f"![Memory and mIoU of the finals, encoder {encoder}](images/{picture.name})"]
    return "\n".join([*lines, ""])


def choice(records: Records) -> str:
    """One row for each head of round 3."""
    lines = ["## Choice on the held-out sequence", "", "mIoU (%) on sequence 0001TP, held out of train, of each seed;"]
    lines += [f"{records[0]['epochs']} epochs; {span(sorted({r['date'] for r in records}))}.", ""]
    lines += ["| head | random encoder | encoder camvid | mean |", "|---|---|---|---:|"]
    rows = {name: [r for r in records if r["head"] == name] for name in {r["head"] for r in records}}
    for name, runs in sorted(rows.items(), key=lambda item: -statistics.mean(r["miou"] for r in item[1])):
        cells = [
            listed([100 * r["miou"] for r in sorted(runs, key=itemgetter("seed")) if r["encoder"] == encoder])
            for encoder in ("random", "camvid")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * statistics.mean(r['miou'] for r in runs):.1f} |")
    return "\n".join([*lines, ""])


def large(records: Records, costs: Records) -> str:
    """One row for each head at 480x360: mIoU of each seed, the IoU of thin and small classes, memory."""
    lines = ["## The extra stream at 480x360", ""]
    lines += [f"mIoU (%) on val of each seed, encoder {records[0]['encoder']}, trained on all of train at 480x360,"]
    lines += [f"{records[0]['epochs']} epochs, and the mean IoU (%) of classes that are thin or small; MiB as in the"]
    lines += [f"finals, of the code of {LAST_DOWN};"]
    lines += [f"{span(sorted({r['date'] for r in records}))}.", ""]
    lines += [f"| head | mIoU | mean | {' | '.join(SMALL_CLASSES)} | MiB |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    saved = {r["head"]: f"{r['saved_mib']:.0f}" for r in costs}
    for head in dict.fromkeys(r["head"] for r in records):
        runs = sorted((r for r in records if r["head"] == head), key=itemgetter("seed"))
        scores = [100 * r["miou"] for r in runs]
        small = [statistics.mean(100 * r["per_class"][i] for r in runs) for i in SMALL_CLASSES.values()]
        cells = [listed(scores), *(f"{x:.1f}" for x in (statistics.mean(scores), *small))]
        lines.append(f"| {head} | {' | '.join(cells)} | {saved.get(head, '')} |")
    return "\n".join([*lines, ""])


def streams(of_code: dict[str, Records], costs: Records) -> str:
    """One row for each head and encoder: mIoU of each seed with the present code, and with earlier ones."""
    every = [r for records in of_code.values() for r in records]
    lines = ["## With and without the extra stream", ""]
    lines += [
        f'mIoU (%) on val of each seed, as in the finals; {span(sorted({r["date"] for r in every}))}. "At once": until',
        'what coarse streams give fine ones was upsampled from stream to stream. "All paths down": until nothing went',
        "down where no later module takes it. All on the same encoders and batches; the encoder trained on CamVid is",
        "not the one of the finals, but one trained once more. MiB and time as below.",
        "",
    ]
    lines += [f"| head | encoder | {' | mean | '.join(CODES.values())} | mean | MiB | time / Unet |"]
    lines += ["|---|---|" + "---|---:|" * len(CODES) + "---:|---:|"]
    latest = {r["head"]: r for r in costs}
    for encoder, head in sorted({(r["encoder"], r["head"]) for r in every}):
        cells = []
        for records in of_code.values():
            runs = sorted((r for r in records if (r["encoder"], r["head"]) == (encoder, head)), key=itemgetter("seed"))
            scores = [100 * r["miou"] for r in runs]
            cells += [listed(scores), f"{statistics.mean(scores):.1f}" if scores else ""]
        price = f"{latest[head]['saved_mib']:.0f} | {latest[head]['time_ratio']:.2f}"
        lines.append(f"| {head} | {encoder} | {' | '.join(cells)} | {price} |")
    records = of_code["streams"]
    scores_of = {h: [100 * r["miou"] for r in records if r["head"] == h] for h in {r["head"] for r in records}}
    drawn = [(head, latest[head]["saved_mib"], statistics.mean(scores)) for head, scores in sorted(scores_of.items())]
    picture = TARGET.parent / "images" / "benchmark_streams.png"
    points(drawn, ("saved activations (MiB)", "val mIoU (%), mean of both encoders"), picture)
    lines += ["", f"![Memory and mIoU with and without the extra stream](images/{picture.name})"]
    return "\n".join([*lines, ""])


def again(repeated: Records, finals: Records) -> str:
    """One row for each encoder and head: scores with earlier code and with the present one."""
    lines = ["## The same training with earlier and present code", ""]
    lines += [
        "Whether making the code smaller and faster has cost accuracy: heads of the finals trained once more,",
        f"val mIoU (%) of the same seeds; {span(sorted({r['date'] for r in repeated}))}.",
        "",
        "| encoder | head | before | after | mean difference |",
        "|---|---|---|---|---:|",
    ]
    key = itemgetter("encoder", "head", "lr", "seed")
    first = {key(r): 100 * r["miou"] for r in finals}
    for encoder, head in sorted({(r["encoder"], r["head"]) for r in repeated}):
        runs = sorted((r for r in repeated if (r["encoder"], r["head"]) == (encoder, head)), key=itemgetter("seed"))
        before, after = [first[key(r)] for r in runs], [100 * r["miou"] for r in runs]
        cells = [listed(scores) for scores in (before, after)]
        difference = statistics.mean(after) - statistics.mean(before)
        lines.append(f"| {encoder} | {head} | {cells[0]} | {cells[1]} | {difference:+.1f} |")
    return "\n".join([*lines, ""])


def cost(records: Records) -> str:
    """One row for each head: what it costs, the latest measurement of each."""
    latest = {r["head"]: r for r in records}
    dates = sorted({r["date"] for r in records if "date" in r})
    lines = ["## Cost", ""]
    lines += ["Per image of 512x512, float32: forward GFLOPs of the head, and bytes alive when the loss is there."]
    lines += ["Time of a training step of 8 crops, encoder included, bf16: the processor's on one thread, median of 7,"]
    lines += ["as a ratio to Unet's in the same run;"]
    lines += [f"{span(dates)}."]
    lines += ["", "| head | parameters (M) | GFLOPs | saved activations (MiB) | time / Unet |", "|---|---|---|---|---|"]
    for name, r in latest.items():
        lines.append(f"| {name} | {figures(r)} |")
    return "\n".join([*lines, ""])


def figures(record: dict[str, Any]) -> str:
    """Give the four costs of a head as cells of a table."""
    sizes = f"{record['parameters'] / 1e6:.2f} | {record['gflops']:.1f} | {record['saved_mib']:.0f}"
    return f"{sizes} | {record['time_ratio']:.2f}"


def loading(records: dict[str, Any]) -> str:
    """One row for each data set: what a training sample costs."""
    lines = ["## Reading data", "", READING, f"{span([records['date']])}.", ""]
    lines += ["| data set | sample (ms) | decoding (ms) | ratio | median ratio |", "|---|---:|---:|---:|---:|"]
    for name, r in records["samples"].items():
        numbers = f"{r['sample_ms']:.1f} | {r['decode_ms']:.1f} | {r['mean_ratio']:.2f} | {r['ratio']:.2f}"
        lines.append(f"| {name} | {numbers} |")
    lines += ["", f"Listing a tree of 100,000 images with their masks (COCO's layout): {records['scan_s']:.2f} s."]
    return "\n".join([*lines, ""])


def section(script: str, record: dict[str, Any]) -> str:
    """Tables of a script that compares with peers, and its picture where there is one."""
    lines = [f"## {record['title']}", "", record["text"], ""]
    lines += [f"`{record['command']}`; {record['machine']}, {record['date']}.", ""]
    picture = f"images/benchmark_{script}.png"
    if (TARGET.parent / picture).exists():
        lines += [f"![{record['title']}]({picture})", ""]
    for caption, rows in record["rows"].items():
        columns = ["---:" if isinstance(v, int | float) else "---" for v in rows[0].values()]
        lines += [f"{caption}:", "", f"| {' | '.join(rows[0])} |", f"|{'|'.join(columns)}|"]
        lines += [f"| {' | '.join(cells(row))} |" for row in rows] + [""]
    rows = [row for rows in record["rows"].values() for row in rows]
    return "\n".join([*lines, *([shortcomings(rows), ""] if any("met" in row for row in rows) else [])])


def shortcomings(rows: Records) -> str:
    """Say which goals are missed and, where there is none, which peers are ahead: from `met` and `cpu ratio`."""
    missed = [name(row) for row in rows if row.get("met") is False]
    behind = [name(row) for row in rows if row.get("met") is None and row.get("cpu ratio", 1.0) < 1]
    sentences = [f"Goals missed: {'; '.join(missed) or 'none'}."]
    return " ".join([*sentences, *([f"Slower than the peer: {'; '.join(behind)}."] if behind else [])])


def name(row: dict[str, Any]) -> str:
    """Name a row by its first column, and its peer where it has one."""
    first = str(next(iter(row.values())))
    return f"{first} against {row['peer']}" if "peer" in row else first


def listed(scores: list[float]) -> str:
    """Write the scores of several seeds in one cell."""
    return ", ".join(f"{x:.1f}" for x in scores)


def cells(row: dict[str, Any]) -> list[str]:
    """Write the values of a row as people read them."""
    return [cell(value) for value in row.values()]


def cell(value: Any) -> str:
    """Write a number with three digits or more, no value as nothing, and truth as yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def span(dates: list[str]) -> str:
    """Say when and where it was measured."""
    when = "" if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"2 cores of an AMD EPYC (avx512_bf16), no GPU{', ' + when if when else ''}"
