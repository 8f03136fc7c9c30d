"""`early-fusion-seg export`: write a trained model as a file that runs without this package, and check it."""

import json
from collections.abc import Iterator
from pathlib import Path

import rich
from rich.progress import track
from rich.table import Table

from early_fusion_seg.cli.arguments import export_parser
from early_fusion_seg.cli.load_model import find_checkpoint, load_model
from early_fusion_seg.cli.output import RUNS, output_folder
from early_fusion_seg.errors import UserError
from early_fusion_seg.export.graph import ImageToLabels, trace
from early_fusion_seg.export.metadata import build_metadata, read_results
from early_fusion_seg.export.onnx import check_packages, load_onnx, write_onnx
from early_fusion_seg.export.parity import MARGIN, SIZES, Comparison, Run, compare, sample_images
from early_fusion_seg.export.program import load_program, write_program
from early_fusion_seg.inference import InferenceSettings, Predictor
from early_fusion_seg.io.run_folder import RunFolder
from early_fusion_seg.segmenter import ReverseHRNetSeg, predictor_of_heads


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: Command line arguments after `export`.

    Returns:
        0; 1 if the file differs from the model.

    Raises:
        UserError: An option, the checkpoint or a package is wrong or missing.
    """
    options = export_parser().parse_args(args)
    if options.format == "onnx":
        check_packages()
    path = find_checkpoint(options.ckpt_path)
    assert path is not None
    model = load_model(path, {"encoder_weights": options.encoder_weights} if options.encoder_weights else {})
    scale = fixed_scale(model, options.scale)
    results = read_results(options.results, Path(path))
    metadata = build_metadata(
        model.network.encoder, model.class_names, model.palette, scale, model.temperature, results
    )
    with RunFolder(output_folder(options.output), RUNS / "export") as run:
        file = run.path / f"model.{options.format}"
        program = trace(ImageToLabels(model.network, scale, model.temperature, options.scores))
        (write_onnx if options.format == "onnx" else write_program)(program, file, metadata)
        load = load_onnx if options.format == "onnx" else load_program
        predictor = predictor_of_heads([model], InferenceSettings(scale=scale, window=None))
        comparisons = list(compared(predictor, load(file)))
    show(file, metadata, comparisons, options.scores)
    return 0 if all(comparison.equal for comparison in comparisons) else 1


def fixed_scale(model: ReverseHRNetSeg, given: float | None) -> float:
    """Return the resize factor that the file holds: the one given, or that of training.

    Raises:
        UserError: Training resized each image by a factor of its own.
    """
    settings = InferenceSettings(scale=given).at_size(model.trained_at)
    if settings.short_side is not None:
        raise UserError(
            f"the model was trained at short_side {settings.short_side}, and a file holds one resize factor for all "
            "images; give --scale X, and images whose shorter side is short_side / X, or --scale 1 and resized images"
        )
    return settings.factor((1, 1))


def compared(predictor: Predictor, run: Run) -> Iterator[Comparison]:
    """Compare a file with its model on images of all sizes."""
    images = track(sample_images(SIZES), "comparing", len(SIZES), console=rich.get_console(), transient=True)
    return (compare(predictor, run, batch) for batch in images)


def show(file: Path, metadata: dict[str, str], comparisons: list[Comparison], scores: bool) -> None:
    """Print the comparison, inputs and outputs of the file, and the license."""
    table = Table(title=f"{file.name} against the model", title_justify="left")
    for column in ("images", "wrong", "undecided", *(["largest difference"] if scores else [])):
        table.add_column(column, justify="right")
    for c in comparisons:
        cells = ["{} x {}x{}".format(*c.shape), str(c.wrong), str(c.undecided)]
        table.add_row(*cells, *([f"{c.difference:.1e}"] if c.difference is not None else []))
    rich.get_console().print(table)
    pixels = sum(c.pixels for c in comparisons)
    wrong, undecided = (sum(getattr(c, name) for c in comparisons) for name in ("wrong", "undecided"))
    print(
        f"labels that differ, of {pixels:,} pixels: {wrong} where the two highest logits differ by more than {MARGIN}; "
        f"{100 * undecided / pixels:.4f} % where they do not"
    )
    if not all(c.equal for c in comparisons):
        print("the file is NOT equal to the model: do not use it without a check on your own images")
    classes = len(json.loads(metadata["class_names"]))
    outputs = f"labels uint8 (n, h, w){f', probabilities float32 (n, {classes}, h, w)' if scores else ''}"
    print(f"image uint8 (n, 3, h, w) -> {outputs}; n, h and w are free")
    print(f"license of the encoder's weights: {metadata['encoder_license']} ({metadata['encoder']})")
    print(f"written: {file} ({file.stat().st_size / 1e6:.1f} MB)")
