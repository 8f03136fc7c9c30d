"""`early-fusion-seg submit DATASET`: what the benchmark's test server takes, written or checked.

Cityscapes and Mapillary Vistas: gray PNGs of raw ids. PASCAL VOC: indexed PNGs with the palette, in the folders of
comp6. COCO-Stuff: one JSON of run-length encoded masks, category ids 92..182 for stuff and 183 for all things.
"""

import hashlib
import json
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rich
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from early_fusion_seg.commands.datasets import dataset_parser, parse
from early_fusion_seg.commands.evaluate import find_predictions
from early_fusion_seg.commands.loading import check_classes_match, load_model
from early_fusion_seg.commands.wording import say
from early_fusion_seg.data import CityscapesDataModule, COCODataModule, SegmentationDataModule
from early_fusion_seg.data.dataset import FileSource
from early_fusion_seg.errors import UserError
from early_fusion_seg.images import image_size, read_image, read_mask, write_indexed_png
from early_fusion_seg.writing import replace_file

HIGHEST_TRAIN_ID = 18  # of Cityscapes
FIRST_STUFF, THINGS = 92, 183  # COCO ids in a submission: stuff from here on, and what stands for everything else


@dataclass(frozen=True)
class Format:
    """What a server takes.

    Args:
        folder: Where the PNGs lie below the output folder.
        indexed: Whether they have the palette.
        archive: Name of the file to upload.
        server: Where to upload it.
    """

    folder: str
    indexed: bool
    archive: str
    server: str


FORMATS = {
    "cityscapes": Format("labels", False, "cityscapes.zip", "www.cityscapes-dataset.com/submit"),
    "coco": Format("labels", False, "stuff_results.json", "the COCO-Stuff challenge's server"),
    "mapillary": Format("labels", False, "mapillary.zip", "the Mapillary Vistas benchmark's server"),
    "voc": Format(
        "results/VOC2012/Segmentation/comp6_test_cls", True, "results.tgz", "host.robots.ox.ac.uk:8080 (comp6)"
    ),
}


def main(args: list[str]) -> int:
    """Run the command.

    Args:
        args: What follows `submit` on the command line.

    Returns:
        0; with `--check` 1 where something is wrong.

    Raises:
        UserError: There is no such server, data or checkpoint.
    """
    name, parser = dataset_parser("submit", "Write what the benchmark's test server takes, or check it.", args)
    parser.add_argument("--ckpt_path", type=str | None, help="checkpoint of the model")
    parser.add_argument("--encoder_weights", type=str | None, help="where the encoder's weights are now, if elsewhere")
    parser.add_argument("--output", type=str | None, help="folder to write to; images that are there already are kept")
    parser.add_argument("--check", type=str | None, help="folder or JSON to check instead; needs no checkpoint")
    parser.add_argument("--split", type=Literal["train", "val", "test"], default="test", help="images to segment")
    data, options = parse(parser, args)
    if name not in FORMATS:
        raise UserError(f"{name} has no test server; those that have one are {', '.join(FORMATS)}")
    if isinstance(data, COCODataModule) and data.labels != "stuff":
        raise UserError("the COCO server for semantic segmentation takes stuff: give --data.labels stuff")
    if isinstance(data, CityscapesDataModule) and data.labels != "labelIds":
        raise UserError("the server of Cityscapes takes labelIds: leave --data.labels out")
    source = data.source("predict" if options.split == "test" else options.split)
    assert isinstance(source, FileSource)  # all of these read files
    if options.check is not None:
        return report(list(problems(name, data, source, Path(options.check))), options.check)
    if options.ckpt_path is None or options.output is None:
        raise UserError("submit needs --ckpt_path FILE and --output FOLDER, or --check FOLDER")
    given = {"encoder_weights": options.encoder_weights} if options.encoder_weights else {}
    model = load_model(options.ckpt_path, given)
    check_classes_match(data.class_names, model.class_names, options.ckpt_path)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    output = Path(options.output)
    claim(output, Path(options.ckpt_path))
    kept = sum((output / FORMATS[name].folder / f"{source.key(i)}.png").exists() for i in range(len(source)))
    for i in track(range(len(source)), "segmenting", console=rich.get_console(), transient=True):
        path = output / FORMATS[name].folder / f"{source.key(i)}.png"
        if not path.exists():
            labels = model.predict(read_image(source.items[i].image))
            assert isinstance(labels, np.ndarray)  # one image gives one map
            write_labels(name, data, labels, path)
    if found := list(png_problems(name, data, source, output / FORMATS[name].folder)):
        return report([*found, "delete these and run the command again"], str(output))
    archive = pack(name, source, output)
    say(f"{len(source)} images, of which {kept} were there already")
    to_upload = f", to be uploaded to {FORMATS[name].server}" if options.split == "test" else ""
    say(f"written: {archive}{to_upload}")
    return 0


def claim(output: Path, checkpoint: Path) -> None:
    """Note in a folder from which checkpoint it is filled, so that no submission mixes two.

    Raises:
        UserError: It is filled from another, or was not filled by this command.
    """
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    note = output / "checkpoint.sha256"
    known = note.read_text(encoding="utf-8") if note.is_file() else ""
    if known != digest and output.is_dir() and any(output.iterdir()):
        whose = "another checkpoint" if known else "something else"
        raise UserError(f"{output} holds files of {whose}; give another --output, or delete it")
    output.mkdir(parents=True, exist_ok=True)
    note.write_text(digest, encoding="utf-8")


def write_labels(name: str, data: SegmentationDataModule, labels: NDArray[np.uint8], path: Path) -> None:
    """Write train ids (h, w) as the server's PNG."""
    raw = data.label_set.decode(labels)
    if FORMATS[name].indexed:
        replace_file(path, lambda part: write_indexed_png(part, raw, data.palette))
    else:
        replace_file(path, lambda part: Image.fromarray(raw).save(part, format="PNG"))


def pack(name: str, source: FileSource, output: Path) -> Path:
    """Put the PNGs of all images into the file to upload."""
    folder, target = output / FORMATS[name].folder, output / FORMATS[name].archive
    paths = [folder / f"{source.key(i)}.png" for i in range(len(source))]
    if name == "coco":
        replace_file(target, lambda part: _write_json(part, paths))
    elif target.suffix == ".zip":
        replace_file(target, lambda part: _write_zip(part, paths))
    else:
        replace_file(target, lambda part: _write_tar(part, paths, output))
    return target


def _write_zip(part: Path, paths: list[Path]) -> None:
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for path in paths:
            archive.write(path, path.name)


def _write_tar(part: Path, paths: list[Path], output: Path) -> None:
    with tarfile.open(part, "w:gz") as archive:
        for path in paths:
            archive.add(path, path.relative_to(output))


def _write_json(part: Path, paths: list[Path]) -> None:
    entries = [entry for path in paths for entry in stuff_entries(int(path.stem), read_mask(path))]
    part.write_text(json.dumps(entries), encoding="utf-8")


def stuff_entries(image_id: int, raw: NDArray[Any]) -> Iterator[dict[str, Any]]:
    """Encode the raw ids (h, w) of stuffthingmaps as COCO-Stuff's results: each pixel in one mask, things together."""
    coder = _mask_coder()
    coco_ids = np.where(raw.astype(int) + 1 < FIRST_STUFF, THINGS, raw.astype(int) + 1)
    for category in np.unique(coco_ids):
        encoded = coder.encode(np.asfortranarray(coco_ids == category, np.uint8))
        text = {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}
        yield {"image_id": image_id, "category_id": int(category), "segmentation": text}


def problems(name: str, data: SegmentationDataModule, source: FileSource, place: Path) -> Iterator[str]:
    """Yield what is wrong with a submission that anyone made: names, count, size, mode and ids."""
    if name == "coco":
        yield from _json_problems(source, place if place.suffix == ".json" else place / FORMATS[name].archive)
    else:
        yield from png_problems(name, data, source, place)


def png_problems(name: str, data: SegmentationDataModule, source: FileSource, place: Path) -> Iterator[str]:
    """Yield what is wrong with the PNGs below a folder."""
    mode_expected = "P" if FORMATS[name].indexed else "L"
    allowed = {raw for raw, train in data.label_set.raw_to_train if data.pred_void != "error" or train != 255}
    try:
        found = find_predictions(place, [source.key(i) for i in range(len(source))])
    except UserError as error:
        yield str(error)
        return
    highest = 0
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
            yield f"{path} holds the labels {', '.join(map(str, wrong[:5]))}, which the server does not know"
        highest = max(highest, *values)
    if name == "cityscapes" and highest <= HIGHEST_TRAIN_ID:
        yield f"{place} holds no label above {highest}: these look like train ids, and the server takes labelIds"


def _json_problems(source: FileSource, path: Path) -> Iterator[str]:
    coder = _mask_coder()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        areas: dict[int, int] = {}
        for entry in entries:
            if not FIRST_STUFF <= entry["category_id"] <= THINGS:
                yield f"{path}: image {entry['image_id']} has the category {entry['category_id']}; expected 92..183"
            areas[entry["image_id"]] = areas.get(entry["image_id"], 0) + int(coder.area(entry["segmentation"]))
        sizes = {entry["image_id"]: entry["segmentation"]["size"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{path} cannot be read as COCO-Stuff's results ({type(error).__name__}: {error})"
        return
    for item in source.items:
        width, height = image_size(item.image)
        number = int(item.key)
        if number not in areas:
            yield f"{path} lacks image {number}"
        elif list(sizes[number]) != [height, width]:
            yield f"{path}: image {number} has masks of {sizes[number]} (height, width); expected [{height}, {width}]"
        elif areas[number] != height * width:
            yield f"{path}: image {number} has masks of {areas[number]} pixels in all; expected {height * width}"


def report(found: list[str], place: str) -> int:
    """Print what was found; 1 where that is something."""
    for line in found[:20]:
        print(line)
    if len(found) > 20:
        print(f"and {len(found) - 20} more")
    print(f"{place}: {len(found)} problem(s)" if found else f"{place} is fit to be submitted")
    return 1 if found else 0


def _mask_coder() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("COCO's results are written with pycocotools: pip install pycocotools") from None
    return mask
