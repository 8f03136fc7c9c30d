"""`early-fusion-seg evaluate DATASET --predictions DIR`: score a folder of PNGs, from any network.

The rules are those of the official evaluator, so the score is the one that the benchmark's server would give.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import rich
import torch
from numpy.typing import NDArray
from rich.progress import track

from early_fusion_seg.callbacks import show_results
from early_fusion_seg.cli.datasets import dataset_parser, parse
from early_fusion_seg.cli.messages import say
from early_fusion_seg.data import FileSource, SegmentationDataModule, Split
from early_fusion_seg.data.listing import files_below
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.io.images import read_mask, size_text
from early_fusion_seg.labels import LabelSet
from early_fusion_seg.metrics import SegmentationMetrics
from early_fusion_seg.report import RunFacts, build_results, write_json

Ids = Literal["raw", "train"]


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: What follows `evaluate` on the command line.

    Returns:
        0.

    Raises:
        UserError: Files are missing, or their labels or sizes are wrong; the message names one.
    """
    description = "Score a folder of PNGs with the rules of the official evaluator."
    kind, parser, rest = dataset_parser("evaluate", description, args)
    parser.add_argument(
        "--predictions", type=str, required=True, help="folder of PNGs named like the images, or IMAGE_ANYTHING.png"
    )
    parser.add_argument(
        "--split",
        type=Literal["train", "val", "test"],
        default="val",
        help="split whose labels to score with (default: val)",
    )
    parser.add_argument(
        "--ids",
        type=Ids,
        default="raw",
        help="ids in the PNGs. raw: those of the data set's own masks, as servers take them; train: those that predict "
        "writes (default: raw)",
    )
    parser.add_argument("--output", type=str | None, help="results.json; default: none is written")
    data, options = parse(kind, parser, rest)
    metrics = score_folder(data, options.split, Path(options.predictions), options.ids)
    void = metrics.confusion[:, -1].sum() / max(1, int(metrics.confusion.sum()))
    if options.ids == "raw" and void > 0.5:
        say(f"{100 * void:.0f} % of the predictions are of ignored labels; if they are train ids, give --ids train")
    facts = RunFacts(
        data=type(data).__name__,
        split=options.split,
        images=int(metrics.images),
        partial=False,
        absent=data.absent,
        pred_void=data.pred_void,
        scale=1.0,
        checkpoint=None,
        predictions=str(options.predictions),
        encoder=None,
        seed=None,
        precision=None,
        config={},
    )
    results = build_results(metrics.compute(), data.class_names, facts)
    if options.output:
        write_json(results, Path(options.output))
    show_results(results, options.output)
    return 0


def score_folder(data: SegmentationDataModule, split: Split, folder: Path, ids: Ids = "raw") -> SegmentationMetrics:
    """Compare a folder of predictions with the truth, at the size of the truth.

    Args:
        data: The data set.
        split: Whose labels to score with.
        folder: PNGs of one channel, called as `find_predictions` says, or what `predict` wrote.
        ids: Whether they hold the data set's raw ids or train ids. Raw ids of ignored classes are void predictions.

    Returns:
        The metrics, with the data set's rules.

    Raises:
        UserError: A prediction is missing, is there twice, has another size or an unknown label.
    """
    source = data.source(split)
    if not isinstance(source, FileSource) or not source.labeled:
        raise UserError(f"{type(data).__name__}'s {split} split has no labels to score with")
    labels = data.label_set if ids == "raw" else data.label_set.of_train_ids()
    predictions = find_predictions(folder, [source.key(i) for i in range(len(source))])
    metrics = SegmentationMetrics(data.num_classes, data.ignore_index, *data.rules)
    for i in track(range(len(source)), "scoring", console=rich.get_console(), transient=True):
        truth, path = source.read_labels(i), predictions[source.key(i)]
        prediction = read_prediction(path, labels)
        if prediction.shape != truth.shape:
            raise UserError(
                f"{path} is {size_text(prediction)} pixels (width x height) and the truth {size_text(truth)}"
            )
        if (
            data.pred_void == "error"
            and (void := (prediction == data.ignore_index) & (truth != data.ignore_index)).any()
        ):
            raise UserError(f"{path} has {void.sum()} void pixels where the truth has classes; the rules refuse that")
        metrics.update(torch.from_numpy(prediction)[None], torch.from_numpy(truth)[None])
    return metrics


def find_predictions(folder: Path, keys: list[str]) -> dict[str, Path]:
    """Find the PNG of each image below a folder.

    It is called as its image, or that and _ANYTHING: with or without the image's own suffix, and below any folders.

    Args:
        folder: Where they are; of a folder that `predict` wrote, those in `masks`.
        keys: The images.

    Raises:
        MissingFileError: There is no such folder, or it lacks some.
        UserError: An image has several.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder of predictions")
    if (folder / "masks").is_dir() and (folder / "overlays").is_dir():
        folder = folder / "masks"
    known = {_without_suffix(key): key for key in keys} | {key: key for key in keys}
    found: dict[str, list[Path]] = {key: [] for key in keys}
    for name, file in files_below(folder, ".", ".png").items():
        key = next((known[form] for form in _forms(name) if form in known), None)
        if key is not None:
            found[key].append(Path(str(file)))
    for key, paths in found.items():
        if len(paths) > 1:
            raise UserError(f"{key} has {len(paths)} predictions, {paths[0]} and {paths[1]}; expected one")
    if lacking := [key for key, paths in found.items() if not paths]:
        example = f"{_without_suffix(lacking[0])}.png"
        raise MissingFileError(
            f"{folder} lacks the predictions of {len(lacking)} of {len(keys)} images, such as {example}"
        )
    return {key: paths[0] for key, paths in found.items()}


def _forms(name: str) -> Iterator[str]:
    """Yield the keys that a file may be meant for, the most exact first."""
    parts = name.split("/")
    tails = ["/".join(parts[i:]) for i in range(len(parts))]
    yield from tails
    yield from map(_without_suffix, tails)
    for tail in tails:
        while "_" in tail.rpartition("/")[2]:
            tail = tail.rpartition("_")[0]
            yield tail


def _without_suffix(name: str) -> str:
    return re.sub(r"\.(jpe?g|png|webp|tiff?|bmp)$", "", name, flags=re.IGNORECASE)


def read_prediction(path: Path, labels: LabelSet) -> NDArray[np.uint8]:
    """Read a prediction as train ids (h, w); ignored classes are void."""
    raw = read_mask(path)
    try:
        return labels.encode(raw, path)
    except UserError as error:
        other = "raw" if labels.name.endswith("_train_ids") else "train"
        raise UserError(f"{error}; if these are {other} ids, give --ids {other}") from None
