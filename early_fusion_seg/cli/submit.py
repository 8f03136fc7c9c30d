"""`early-fusion-seg submit DATASET`: write, or check, the upload for a benchmark's test server.

The format of each server is the attribute `submission` of its data module.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import rich
import torch
from PIL import Image
from rich.progress import track

from early_fusion_seg.cli.datasets import dataset_name, dataset_parser, datasets, parse
from early_fusion_seg.cli.evaluate import find_predictions, other_images
from early_fusion_seg.cli.load_model import check_classes_match, load_model
from early_fusion_seg.cli.messages import echo
from early_fusion_seg.cli.output import output_folder
from early_fusion_seg.data import FileSource, SegmentationDataModule, SubmissionFormat
from early_fusion_seg.errors import UserError
from early_fusion_seg.inference import InferenceSettings
from early_fusion_seg.io.images import image_size, read_image, read_mask


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: Command line arguments after `submit`.

    Returns:
        0; 1 if the submission has problems.

    Raises:
        UserError: The data set has no test server, or data or checkpoint are wrong.
    """
    kind, parser, rest = dataset_parser("submit", args)
    parser.add_class_arguments(InferenceSettings, "inference")
    data, options = parse(kind, parser, rest)
    form = data.submission
    if form is None:
        known = ", ".join(name for name, other in datasets().items() if _has_server(other))
        raise UserError(f"{dataset_name(kind)} has no test server; the data sets that have one are {known}")
    source = data.source("predict" if options.split == "test" else options.split)
    assert isinstance(source, FileSource)  # data sets with a server read files
    if options.check is not None:
        others = other_images(data, options.split)
        return report(list(problems(form, data, source, Path(options.check), others)), options.check)
    output = output_folder(options.output)
    if options.ckpt_path is None or output is None:
        raise UserError("submit needs --ckpt_path FILE and --output FOLDER, or --check FOLDER")
    given = {"encoder_weights": options.encoder_weights} if options.encoder_weights else {}
    model = load_model(options.ckpt_path, given)
    model.inference = InferenceSettings(**options.inference.as_dict())
    check_classes_match(data.class_names, model.class_names, options.ckpt_path)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    record_checkpoint(output, Path(options.ckpt_path))
    keys = [item.key for item in source.items]
    kept = sum(form.path(output, key).exists() for key in keys)
    for item in track(source.items, "segmenting", console=rich.get_console(), transient=True):
        path = form.path(output, item.key)
        if not path.exists():
            labels = model.predict(read_image(item.image))
            assert isinstance(labels, np.ndarray)  # one image gives one label map
            form.write(path, labels, data.label_set)
    if found := list(png_problems(form, data, source, output / form.folder)):
        return report([*found, "delete these files and run the command again"], str(output))
    archive = form.write_archive(output, keys)
    echo(f"{len(source)} images, {kept} of them from an earlier run")
    to_upload = f"; upload it to {form.server}" if options.split == "test" else ""
    echo(f"written: {archive}{to_upload}")
    return 0


def _has_server(kind: type[SegmentationDataModule]) -> bool:
    return kind.submission is not SegmentationDataModule.submission


def record_checkpoint(output: Path, checkpoint: Path) -> None:
    """Record the hash of the checkpoint in the output folder, so that no submission mixes two checkpoints.

    Raises:
        UserError: The folder has files of another checkpoint, or unknown files.
    """
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = output / "checkpoint.sha256"
    known = record.read_text(encoding="utf-8") if record.is_file() else ""
    if known != digest and output.is_dir() and any(output.iterdir()):
        found = "files of another checkpoint" if known else "files that submit did not write"
        raise UserError(f"{output} holds {found}; give another --output, or delete the folder")
    output.mkdir(parents=True, exist_ok=True)
    record.write_text(digest, encoding="utf-8")


def problems(
    form: SubmissionFormat, data: SegmentationDataModule, source: FileSource, place: Path, others: Iterable[str] = ()
) -> Iterator[str]:
    """Yield the problems of a submission: names, count, sizes, modes and ids; for `others` see `find_predictions`."""
    if form.check_archive is not None:
        yield from form.check_archive(source, place if place.is_file() else place / form.archive)
    else:
        yield from png_problems(form, data, source, place, others)


def png_problems(
    form: SubmissionFormat, data: SegmentationDataModule, source: FileSource, place: Path, others: Iterable[str] = ()
) -> Iterator[str]:
    """Yield the problems of the PNGs below a folder."""
    mode_expected = "P" if form.indexed else "L"
    allowed = {raw for raw, train in data.label_set.raw_to_train if data.pred_void != "error" or train != 255}
    try:
        found = find_predictions(place, [item.key for item in source.items], others)
    except UserError as error:
        yield str(error)
        return
    occurring: set[int] = set()
    for item in track(source.items, "checking", console=rich.get_console(), transient=True):
        path = found[item.key]
        try:
            values = np.flatnonzero(np.bincount(read_mask(path).ravel())).tolist()
            with Image.open(path) as image:
                mode, size = image.mode, image.size
        except UserError as error:
            yield str(error)
            continue
        expected = image_size(item.image)
        if size != expected:
            yield f"{path} is {size[0]}x{size[1]} pixels (width x height); its image is {expected[0]}x{expected[1]}"
        if mode != mode_expected:
            kind = "indexed" if mode_expected == "P" else "gray"
            yield f"{path} has the mode {mode}; expected {mode_expected} ({kind})"
        if wrong := [value for value in values if value not in allowed]:
            yield f"{path} holds the labels {', '.join(map(str, wrong[:5]))}, which the server does not accept"
        occurring.update(values)
    if form.check_raw_ids is not None and (wrong_ids := form.check_raw_ids(occurring)):
        yield f"{place}: {wrong_ids}"


def report(found: list[str], place: str) -> int:
    """Print the problems and return the exit code: 1 if there are any, else 0."""
    for line in found[:20]:
        print(line)
    if len(found) > 20:
        print(f"and {len(found) - 20} more")
    print(f"{place}: {len(found)} problem(s)" if found else f"{place} is ready to submit")
    return 1 if found else 0
