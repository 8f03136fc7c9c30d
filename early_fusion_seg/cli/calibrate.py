"""`early-fusion-seg calibrate DATASET`: fit the temperature of a model's probabilities on val, and store it.

Every second image of val fits the temperature, the others score it. Random pixels of the former are kept, the same
number of each image, so the logits in memory are bounded and each image passes the network once.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import rich
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from early_fusion_seg.cli.datasets import dataset_parser, parse
from early_fusion_seg.cli.load_model import check_classes_match, find_checkpoint, load_model
from early_fusion_seg.cli.messages import echo
from early_fusion_seg.cli.output import RUNS, output_folder
from early_fusion_seg.data import SegmentationDataModule, Source
from early_fusion_seg.errors import UserError
from early_fusion_seg.inference import CalibrationMetrics, Predictor, score_pixels
from early_fusion_seg.inference.calibration import fit_temperature, sample_logits
from early_fusion_seg.inference.image_tensor import image_tensor
from early_fusion_seg.io.atomic import AtomicCheckpointIO
from early_fusion_seg.io.run_folder import RunFolder
from early_fusion_seg.logits import LazyLogits
from early_fusion_seg.report import finite, percent, versions, write_json

SCHEMA = 1
MAX_LOGITS = 2**24
"""Number of logits that are kept to fit the temperature: 64 MiB in float32."""

Scores = dict[str, float | None]


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: Command line arguments after `calibrate`.

    Returns:
        0.

    Raises:
        UserError: Data or checkpoint are wrong, or no temperature fits.
    """
    kind, parser, rest = dataset_parser("calibrate", args)
    data, options = parse(kind, parser, rest)
    path = str(find_checkpoint(options.ckpt_path))
    model = load_model(path, {"encoder_weights": options.encoder_weights} if options.encoder_weights else {})
    check_classes_match(data.class_names, model.class_names, path)
    source = labeled_val(data)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    predictor = model.plain_predictor()
    with RunFolder(output_folder(options.output), RUNS / "calibrate") as run:
        logits, labels, fitted = draw_pixels(source, predictor, model.num_classes, data.ignore_index)
        temperature = fit_temperature(logits, labels)
        before, after, scored = score(source, predictor, temperature, data.ignore_index)
        store_temperature(path, temperature)
        results = {
            "schema": SCHEMA,
            "temperature": temperature,
            "before": before,
            "after": after,
            "data": type(data).__name__,
            "split": "val",
            "images_fitted": fitted,
            "pixels_fitted": len(labels),
            "images_scored": scored,
            "inference": asdict(predictor.settings),
            "checkpoint": path,
            "versions": versions(),
        }
        write_json(results, run.path / "calibration.json")
    show(temperature, before, after)
    echo(f"fitted on {fitted} images of val, scored on {scored} others")
    echo(f"temperature stored in {path}; written: {run.path / 'calibration.json'}")
    return 0


def labeled_val(data: SegmentationDataModule) -> Source:
    """Return the images of val.

    Raises:
        UserError: They have no labels, or there are fewer than two.
    """
    source = data.source("val")
    if not source.labeled or len(source) < 2:
        raise UserError(
            f"{type(data).__name__}'s val split below {data.root} has {len(source)} images"
            f"{'' if source.labeled else ' without labels'}; expected at least two with labels, as one half fits the "
            "temperature and the other half scores it"
        )
    return source


def whole_images(source: Source, first: int, predictor: Predictor, text: str) -> Iterator[tuple[LazyLogits, Tensor]]:
    """Yield lazy logits and masks (1, H, W) of every second image, except those that pass in windows.

    Raises:
        UserError: There are none.
    """
    skipped, positions = 0, range(first, len(source), 2)
    for i in track(positions, text, console=rich.get_console(), transient=True):
        image, mask = source.read(i)
        assert mask is not None  # the source is labeled
        if predictor.settings.windows((mask.shape[0], mask.shape[1])) is None:
            yield predictor.lazy_logits(image_tensor(image)[None]), torch.from_numpy(mask)[None].to(predictor.device)
        else:
            skipped += 1
    if skipped == len(positions):
        raise UserError(
            f"all {skipped} images of val for {text} pass in windows, whose probabilities are blended; expected some "
            "that pass whole: cut the images of val to 2048x2048 pixels or less"
        )


@torch.no_grad()
def draw_pixels(
    source: Source, predictor: Predictor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, int]:
    """Return the logits (P, K) and labels (P,) of random pixels, and the number of images that they come from."""
    count = max(1, MAX_LOGITS // num_classes // -(-len(source) // 2))
    generator = torch.Generator().manual_seed(0)
    parts = [
        sample_logits(logits, mask, count, generator, ignore_index)
        for logits, mask in whole_images(source, 0, predictor, "fitting")
    ]
    labels = torch.cat([label for _, label in parts])
    if not len(labels):
        raise UserError(f"{len(parts)} images of val have no labeled pixel to fit the temperature to; check the masks")
    return torch.cat([rows for rows, _ in parts]), labels, len(parts)


@torch.no_grad()
def score(source: Source, predictor: Predictor, temperature: float, ignore_index: int) -> tuple[Scores, Scores, int]:
    """Return the scores of the other images at the temperature 1 and at the given one, and the number of images."""
    metrics = {value: CalibrationMetrics() for value in (1.0, temperature)}
    images = 0
    for logits, mask in whole_images(source, 1, predictor, "scoring"):
        images += 1
        for value, metric in metrics.items():
            _, counts, nll = score_pixels(logits, mask, value, ignore_index)
            metric.update(counts.cpu(), nll.cpu())
    before, after = ({k: finite(v) for k, v in metrics[value].compute().items()} for value in (1.0, temperature))
    return before, after, images


def store_temperature(path: str, temperature: float) -> None:
    """Write the temperature to a checkpoint, and nothing else, so that the old or the new file is intact."""
    checkpoint = torch.load(Path(path), map_location="cpu", weights_only=True)
    AtomicCheckpointIO().save_checkpoint(checkpoint | {"temperature": temperature}, path)


def show(temperature: float, before: Scores, after: Scores) -> None:
    """Print temperature and scores before and after."""
    table = Table()
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("temperature", "1.000", f"{temperature:.3f}")
    table.add_row("calibration error (ECE) %", percent(before["ece"]), percent(after["ece"]))
    table.add_row("negative log-likelihood", *(f"{x['nll'] or 0:.4f}" for x in (before, after)))
    rich.get_console().print(table)
