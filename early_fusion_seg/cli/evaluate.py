"""`early-fusion-seg evaluate DATASET --predictions DIR`: score PNG predictions of any network.

The rules are those of the official evaluator, so the score is what the benchmark's server would report.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import rich
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from early_fusion_seg.callbacks import show_results
from early_fusion_seg.cli.arguments import Ids
from early_fusion_seg.cli.datasets import dataset_parser, parse
from early_fusion_seg.cli.messages import echo
from early_fusion_seg.cli.output import output_folder
from early_fusion_seg.data import FileSource, SegmentationDataModule, Split
from early_fusion_seg.data.listing import composed, files_below
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.io.image_files import without_image_suffix
from early_fusion_seg.io.images import OUTPUT_MARK, read_mask, size_text
from early_fusion_seg.labels import LabelSet
from early_fusion_seg.metrics import SegmentationMetrics
from early_fusion_seg.report import RunFacts, build_results, write_json


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: Command line arguments after `evaluate`.

    Returns:
        0.

    Raises:
        UserError: A file is missing, or its labels or size are wrong.
    """
    kind, parser, rest = dataset_parser("evaluate", args)
    data, options = parse(kind, parser, rest)
    metrics = score_folder(data, options.split, Path(options.predictions), options.ids)
    void = metrics.confusion[:, -1].sum() / max(1, int(metrics.confusion.sum()))
    if options.ids != "train" and void > 0.5:
        echo(
            f"{100 * void:.0f} % of the predicted pixels have ignored labels; if these are train ids, give --ids train"
        )
    facts = RunFacts(
        data=type(data).__name__,
        split=options.split,
        images=int(metrics.images),
        partial=False,
        absent=data.absent,
        pred_void=data.pred_void,
        inference=None,
        plain=None,
        checkpoint=None,
        predictions=str(options.predictions),
        encoder=None,
        seed=None,
        precision=None,
        config={},
    )
    results = build_results(metrics.compute(), data.class_names, facts)
    if (path := output_folder(options.output)) is not None:
        path = path if path.suffix == ".json" else path / "results.json"
        write_json(results, path)
    show_results(results, path)
    return 0


def score_folder(data: SegmentationDataModule, split: Split, folder: Path, ids: Ids = "auto") -> SegmentationMetrics:
    """Score a folder of predictions at the size of the ground truth.

    Args:
        data: The data set.
        split: The split to score.
        folder: PNGs of one channel with names as in `find_predictions`, or the output folder of `predict`.
        ids: Whether the PNGs hold raw ids or train ids. Raw ids of ignored classes are void predictions. "auto": train
            ids if `predict` wrote the PNGs (a line says so), else raw ids.

    Returns:
        The metrics, by the data set's rules.

    Raises:
        UserError: A prediction is missing or duplicate, or has a wrong size or an unknown label.
    """
    source = data.source(split)
    if not isinstance(source, FileSource) or not source.labeled:
        raise UserError(f"{type(data).__name__}'s {split} split has no labels to score with")
    keys = [source.key(i) for i in range(len(source))]
    predictions = find_predictions(folder, keys, other_images(data, split))
    if ids == "auto" and predictions and holds_train_ids(next(iter(predictions.values())), data.label_set):
        echo(f"{folder} holds label maps of predict, so they are read as train ids; --ids raw reads them as raw ids")
        ids = "train"
    labels = data.label_set.of_train_ids() if ids == "train" else data.label_set
    metrics = SegmentationMetrics(data.num_classes, data.ignore_index, *data.rules)
    for i in track(range(len(source)), "scoring", console=rich.get_console(), transient=True):
        truth, path = source.read_labels(i), predictions[source.key(i)]
        prediction = read_prediction(path, labels)
        if prediction.shape != truth.shape:
            raise UserError(
                f"{path} is {size_text(prediction)} pixels (width x height); its ground truth is {size_text(truth)}"
            )
        if data.pred_void == "error" and (void := prediction == data.ignore_index).any():
            raise UserError(
                f"{path} has {void.sum()} void pixels; the official evaluator refuses such a file, also where the "
                "truth is void: predict a class for each pixel"
            )
        metrics.update(torch.from_numpy(prediction)[None], torch.from_numpy(truth)[None])
    return metrics


def find_predictions(folder: Path, keys: list[str], others: Iterable[str] = ()) -> dict[str, Path]:
    """Find the PNG of each image below a folder.

    A PNG is named like its image, optionally with _ANYTHING added. It may lack the image's own suffix, and may lie in
    any subfolder. A PNG of exactly that name is preferred to others. One that is named exactly like another image
    belongs to that image alone.

    Args:
        folder: The folder; in the output folder of `predict`, its `masks` are searched.
        keys: The images.
        others: Names of images whose predictions may lie in the same folder.

    Raises:
        MissingFileError: The folder does not exist, or an image has no prediction.
        UserError: An image has several predictions.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder; give the folder of the predictions")
    if _is_of_predict(folder / "masks"):
        folder = folder / "masks"
    known: dict[str, str | None] = {
        composed(form): None for name in others for form in (without_image_suffix(name), name)
    }
    known |= {composed(without_image_suffix(key)): key for key in keys} | {composed(key): key for key in keys}
    exact: dict[str, list[Path]] = {key: [] for key in keys}
    extended: dict[str, list[Path]] = {key: [] for key in keys}
    for name, file in files_below(folder, ".", ".png").items():
        for found, forms in ((exact, _exact_names(name)), (extended, _shortened_names(name))):
            form = next((form for form in forms if form in known), None)
            if form is not None:
                key = known[form]
                if key is not None:
                    found[key].append(Path(str(file)))
                break
    predictions = {key: exact[key] or extended[key] for key in keys}
    for key, paths in predictions.items():
        if len(paths) > 1:
            raise UserError(f"{key} has {len(paths)} predictions, {paths[0]} and {paths[1]}; expected one")
    if missing := [key for key, paths in predictions.items() if not paths]:
        example = f"{without_image_suffix(missing[0])}.png"
        raise MissingFileError(
            f"{folder} has no prediction for {len(missing)} of {len(keys)} images; expected, for example, {example}"
        )
    return {key: paths[0] for key, paths in predictions.items()}


def other_images(data: SegmentationDataModule, split: Split) -> Iterator[str]:
    """Yield the keys of the images of other splits, alone and with the split as a folder before them."""
    for other in get_args(Split):
        if other in (split, "predict"):
            continue
        try:
            source = data.source(other)
        except UserError:  # the data set may lack splits that are not scored
            continue
        for i in range(len(source)):
            yield from (source.key(i), f"{other}/{source.key(i)}")


def holds_train_ids(path: Path, labels: LabelSet) -> bool:
    """Return whether `predict` wrote a PNG: it lies in its folder, or train ids index the colors of its palette."""
    if any(_is_of_predict(folder) for folder in path.resolve().parents):
        return True
    try:
        with Image.open(path) as image:
            colors = image.getpalette() if image.mode == "P" else None
    except (OSError, SyntaxError, ValueError):  # `read_prediction` reports it
        return False
    if colors is None:
        return False
    palette = {i: tuple(colors[3 * i : 3 * i + 3]) for i in range(256)}
    raw_ids = {train_id: raw_id for raw_id, train_id in reversed(labels.raw_to_train)}
    by_train_id, by_raw_id = (
        all(palette.get(ids[i]) == color for i, color in enumerate(labels.palette))
        for ids in (range(labels.num_classes), raw_ids)
    )
    return by_train_id and not by_raw_id


def _is_of_predict(masks: Path) -> bool:
    """Return whether `predict` wrote a folder of masks: it is marked, or is `masks` with `overlays` beside it."""
    if (masks / OUTPUT_MARK).is_file():
        return True
    return masks.name == "masks" and masks.is_dir() and (masks.parent / "overlays").is_dir()


def _exact_names(name: str) -> Iterator[str]:
    """Yield the keys that a file name stands for, with its folders and without."""
    parts = name.split("/")
    tails = ["/".join(parts[i:]) for i in range(len(parts))]
    yield from tails
    yield from map(without_image_suffix, tails)


def _shortened_names(name: str) -> Iterator[str]:
    """Yield the keys that a file name IMAGE_ANYTHING can stand for, the longest first."""
    parts = name.split("/")
    for i in range(len(parts)):
        tail = "/".join(parts[i:])
        while "_" in tail.rpartition("/")[2]:
            tail = tail.rpartition("_")[0]
            yield tail


def read_prediction(path: Path, labels: LabelSet) -> NDArray[np.uint8]:
    """Read a prediction as train ids (h, w); ignored classes are void."""
    raw = read_mask(path)
    try:
        return labels.encode(raw, path)
    except UserError as error:
        other = "raw" if labels.name.endswith("_train_ids") else "train"
        raise UserError(f"{error}; if these are {other} ids, give --ids {other}") from None
