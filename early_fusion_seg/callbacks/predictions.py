"""PredictionWriter: write predictions as image files, with a legend and a summary.

Shapes: images of h x w pixels, K classes.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor

from early_fusion_seg.callbacks.image_files import to_pixels, write_image
from early_fusion_seg.data.dataset import SegmentationDataset
from early_fusion_seg.distributed import all_gather_object
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.atomic import replace_file
from early_fusion_seg.io.image_files import without_image_suffix
from early_fusion_seg.io.images import write_indexed_png
from early_fusion_seg.io.png import row_bands, write_png
from early_fusion_seg.visualize import PAPER, Pixels, draw_legend, overlay

Saved = Literal["labels", "overlay", "confidence", "probabilities"]
FOLDERS: dict[Saved, str] = {
    "labels": "masks",
    "overlay": "overlays",
    "confidence": "confidence",
    "probabilities": "probabilities",
}
LABELS, LEGEND, SUMMARY = "labels.csv", "legend.png", "summary.csv"
MAX_PROBABILITIES = 4e9  # bytes of the probabilities of one batch, which are in memory as a whole
LEGEND_TEXT, LEGEND_ROWS, LEGEND_WIDTH = 20, 30, 1000  # of legend.png: one column up to 30 classes; in pixels
SMALLEST_TEXT, LARGEST_TEXT = 14, 200  # in pixels, of the legend below an overlay; between them, a 60th of the width


class PredictionWriter(Callback):
    """Write predictions to a folder, each image before the next one is read.

    - `masks/NAME.png` (`labels`): train ids, indexed with the palette.
    - `overlays/NAME.png` (`overlay`): the image with the colors of its classes.
    - `confidence/NAME.png` (`confidence`): the probability of each pixel's label, gray, 255 for 1.
    - `probabilities/NAME.npz` (`probabilities`): the array `probabilities` (K, h, w) float16, and `class_names`.
    - `labels.csv`: the classes, as `FolderDataModule` reads them; `legend.png`: their colors.
    - `summary.csv`, at the end: size, mean confidence and share of each class of every image.

    NAME is the key of the image without its suffix, such as `street/a` for `street/a.jpg`; the suffix is kept where two
    names would be the same, and where the data is not a `SegmentationDataModule`. An image of any size is written a few
    rows at a time.

    Args:
        folder: Output folder.
        save: What is written for each image.
        classes: Names of the classes that overlays and legends show. Default: all.
        opacity: Opacity of the colors in overlays, 0..1.
        legend: Draw a legend of the classes that occur below each overlay.

    Attributes:
        unreadable: Error messages of the images that could not be read, or not be written; after prediction, those of
            all processes.

    Raises:
        UserError: A value is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        save: Sequence[Saved] = ("labels", "overlay"),
        classes: Sequence[str] | None = None,
        opacity: float = 0.5,
        legend: bool = False,
    ) -> None:
        if unknown := set(save) - set(get_args(Saved)):
            raise UserError(f"save has {unknown.pop()!r}; expected some of {', '.join(get_args(Saved))}")
        if not 0 <= opacity <= 1:
            raise UserError(f"opacity is {opacity}; expected a number in 0..1")
        self.folder = Path(folder)
        self.save, self.classes, self.opacity, self.legend = save, classes, opacity, legend
        self.unreadable: list[str] = []
        self._rows: list[list[str]] = []  # of the summary
        self._names: Mapping[str, str] = {}  # key -> NAME, if not equal

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Use the folder of rank 0 on all processes: each has chosen the next free folder independently."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the names of the files, and write the label table and the legend.

        Raises:
            UserError: A class is unknown, or the folder has the label table of other classes.
        """
        module = cast(Any, pl_module)
        shown = self._shown(module)
        self.unreadable, self._rows = [], []
        dataset = getattr(trainer.predict_dataloaders, "dataset", None)
        if isinstance(dataset, SegmentationDataset):
            self._names = output_names([dataset.source.key(i) for i in range(len(dataset))])
        labels = label_table(module.class_names, module.palette)
        check_same_labels(self.folder / LABELS, labels)  # by all processes, or the others would wait for the first one
        if trainer.is_global_zero:
            write_text(self.folder / LABELS, labels)
            entries = [(module.class_names[i], tuple(module.palette[i])) for i in shown]
            picture = draw_legend(entries, 0 if len(entries) <= LEGEND_ROWS else LEGEND_WIDTH, LEGEND_TEXT)
            replace_file(self.folder / LEGEND, partial(write_picture, picture=picture))

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: int) -> None:
        """Ask the model for class probabilities, unless they need too much memory."""
        if "probabilities" in self.save and "image" in batch:
            module = cast(Any, pl_module)
            module.predict_probabilities = _bytes(batch["image"], module) <= MAX_PROBABILITIES

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Write the files of a batch, or record the errors of images that could not be read."""
        if outputs is None or "prediction" not in outputs:
            self.unreadable += batch.get("error", [])  # the empty batch of a process without images has no error
            return
        for i, key in enumerate(batch["key"]):
            values = {
                name: outputs[name][i] for name in ("prediction", "confidence", "probabilities") if name in outputs
            }
            self._write(key, batch["image"][i], values, cast(Any, pl_module))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the error messages of all processes, and write the summary."""
        self.unreadable = [error for part in all_gather_object(self.unreadable) for error in part]
        rows = sorted(row for part in all_gather_object(self._rows) for row in part)
        if trainer.is_global_zero:
            head = ["image", "width", "height", "mean_confidence", *cast(Any, pl_module).class_names]
            write_text(self.folder / SUMMARY, table([head, *rows]))

    def _shown(self, module: Any) -> list[int]:
        """Return the train ids of the classes that overlays and legends show."""
        if self.classes is None:
            return list(range(len(module.palette)))
        if unknown := [name for name in self.classes if name not in module.class_names]:
            raise UserError(f"classes has {unknown[0]!r}; the classes of the model are {', '.join(module.class_names)}")
        return [i for i, name in enumerate(module.class_names) if name in self.classes]

    def _write(self, key: str, image: Tensor, values: Mapping[str, Tensor], module: Any) -> None:
        """Write the files of an image, add it to the summary, and record what cannot be written."""
        labels: Pixels = values["prediction"].cpu().numpy()
        counts, certain = count_labels(labels), ""
        works: dict[Saved, Callable[[Path], object]] = {
            "labels": partial(write_indexed_png, labels=labels, palette=module.palette),
            "overlay": partial(self._write_overlay, image=image, labels=labels, counts=counts, module=module),
        }
        if "confidence" in values:
            confidence: Pixels = values["confidence"].cpu().numpy()
            certain = f"{confidence.mean(dtype=np.float64) / 255:.4f}"
            works["confidence"] = partial(write_picture, picture=confidence)
        if "probabilities" in values:
            array = values["probabilities"].cpu().numpy()
            works["probabilities"] = partial(np.savez, probabilities=array, class_names=module.class_names)
        for kind in self.save:
            if kind not in works:
                self.unreadable.append(_missing(kind, key, image, module))
                continue
            name, suffix = self._names.get(key, key), ".npz" if kind == "probabilities" else ".png"
            if problem := write_image(self.folder / FOLDERS[kind], name, works[kind], suffix):
                self.unreadable.append(problem)
                return
        shares = (f"{count / labels.size:.6f}" for count in counts[: len(module.palette)])
        self._rows.append([key, str(labels.shape[1]), str(labels.shape[0]), certain, *shares])

    def _write_overlay(self, path: Path, image: Tensor, labels: Pixels, counts: NDArray[np.int64], module: Any) -> None:
        """Write an overlay, with the legend below."""
        shown, (height, width) = self._shown(module), labels.shape
        drawn = np.full(256, 255, np.uint8)  # train id -> train id, or 255 for what is not drawn
        drawn[shown] = shown
        below = np.empty((0, width, 3), np.uint8)
        if self.legend:
            entries = [(module.class_names[i], tuple(module.palette[i])) for i in shown if counts[i]]
            below = draw_legend(entries, width, min(max(SMALLEST_TEXT, width // 60), LARGEST_TEXT))
        beside = ((0, 0), (0, below.shape[1] - width), (0, 0))

        def bands() -> Iterator[Pixels]:
            for rows in row_bands(height, width):
                band = overlay(to_pixels(image[:, rows]), drawn[labels[rows]], module.palette, self.opacity)
                yield np.pad(band, beside, constant_values=PAPER[0]) if beside[1][1] else band
            if len(below):
                yield below

        write_png(path, height + len(below), bands())


def output_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the name of each image's files: the key, without its suffix unless two would have the same name.

    Upper and lower case are the same, as on some file systems.

    Example:
        >>> output_names(["a.jpg", "b.jpg", "b.png"])
        {'a.jpg': 'a', 'b.jpg': 'b.jpg', 'b.png': 'b.png'}
    """
    stems = {key: without_image_suffix(key) for key in keys}
    forms = Counter(form for key, stem in stems.items() for form in {key.casefold(), stem.casefold()})
    return {key: stem if forms[stem.casefold()] == 1 else key for key, stem in stems.items()}


def count_labels(labels: Pixels) -> NDArray[np.int64]:
    """Count the pixels of each label in a label map (h, w), as 256 numbers."""
    counts = np.zeros(256, np.int64)
    for rows in row_bands(*labels.shape):
        counts += np.bincount(labels[rows].ravel(), minlength=256)
    return counts


def write_picture(path: Path, picture: Pixels) -> None:
    """Write a picture (h, w, 3) or (h, w) as PNG."""
    write_png(path, len(picture), (picture[rows] for rows in row_bands(*picture.shape[:2])))


def label_table(class_names: Sequence[str], palette: Sequence[Sequence[int]]) -> str:
    """Return the label CSV of masks that hold train ids."""
    rows = [[str(i), str(i), name, "#{:02x}{:02x}{:02x}".format(*palette[i])] for i, name in enumerate(class_names)]
    return table([["raw_id", "train_id", "name", "color"], *rows])


def check_same_labels(path: Path, labels: str) -> None:
    """Check that an output folder has no label CSV of other classes.

    Raises:
        UserError: It has; label maps of two models would be mixed.
    """
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace") != labels:
        raise UserError(f"{path} has other classes than the model, or other raw ids; give another output folder")


def table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_text(path: Path, text: str) -> None:
    """Write a text file; names of image files in it may be no UTF-8."""
    data = text.encode(errors="surrogateescape")
    replace_file(path, lambda part: part.write_bytes(data))


def _bytes(images: Tensor, module: Any) -> int:
    """Return the size of the class probabilities of images (n, 3, h, w)."""
    return 2 * len(module.class_names) * images[:, 0].numel()


def _missing(kind: Saved, key: str, image: Tensor, module: Any) -> str:
    """Return why something cannot be saved: the model does not give it, or it is too large."""
    if kind == "confidence" or (size := _bytes(image[None], module)) <= MAX_PROBABILITIES:
        return f"{key}: predict_step of {type(module).__name__} returns no {kind}"
    return (
        f"{key}: its probabilities would take {size / 1e9:.1f} GB ({len(module.class_names)} classes, "
        f"{image.shape[2]}x{image.shape[1]} pixels), more than {MAX_PROBABILITIES / 1e9:g} GB; cut the image into "
        "tiles, or save confidence instead"
    )
