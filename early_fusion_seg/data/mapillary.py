"""Mapillary Vistas: 25,000 street photographs from all continents (Neuhold et al., ICCV 2017).

Versions 1.0 and 1.1 have 66 labels, of which 65 are evaluated; 2.0 has 124. Layout and rule are those of
github.com/mapillary/mapillary_vistas.
"""

import json
import os
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from early_fusion_seg.data.base import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import FileSource, Item, Source
from early_fusion_seg.data.files import files_below, matched
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.labels import IGNORE_INDEX, LabelRow, LabelSet, load_label_set

Version = Literal["v1.1", "v1.2", "v2.0"]

FOLDERS: dict[str, str] = {"train": "training", "val": "validation", "test": "testing"}
CONFIGS: dict[Version, tuple[str, ...]] = {
    "v1.1": ("config.json", "config_v1.1.json"),
    "v1.2": ("config_v1.2.json", "config.json"),
    "v2.0": ("config_v2.0.json",),
}
TREE = """  {training,validation}/images/KEY.jpg and testing/images/KEY.jpg
  {training,validation}/v2.0/labels/KEY.png and config_v2.0.json, or the same with v1.2 (the download of version 2.0)
  {training,validation}/labels/KEY.png and config.json (the download of versions 1.0 and 1.1)"""
WHERE = """Mapillary Vistas needs an e-mail address, so it cannot be fetched from here. Ask for the research edition at
  www.mapillary.com/dataset/vistas
and unpack the zip file of the link that comes by mail."""


class MapillaryVistasDataModule(SegmentationDataModule):
    """Mapillary Vistas: 18,000 images to train, 2,000 to validate; `predict` takes the 5,000 of testing.

    Classes, colors and which of them are evaluated come from the config file shipped with the data. The masks' numbers
    are positions in it. Where it is lacking, the package's own table is taken, with a warning: of version 2.0 no
    published list says which 8 labels are not evaluated.

    The official evaluator leaves out pixels predicted as a label that is not evaluated (`pred_void` "drop").

    Args:
        root: Folder with training/, validation/ and testing/.
        version: "v1.1" (labels/ directly below the split; also 1.0), "v1.2" or "v2.0" (both are in the download of
            2.0). None: the newest that is there.
        kwargs: Those of SegmentationDataModule, from batch_size to eval_transform.
    """

    pred_void = "drop"
    license = "Mapillary Vistas Research Edition: non-commercial use."

    def __init__(self, root: str | os.PathLike[str], version: Version | None = None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        if version is not None and version not in get_args(Version):
            raise UserError(f"version is {version!r}; expected one of {', '.join(get_args(Version))}")
        self.version = version

    @cached_property
    def found_version(self) -> Version:
        """Return the version asked for, or the newest that is there."""
        if self.version is not None:
            return self.version
        for version in reversed(get_args(Version)):
            if any((self.root / self._labels(folder, version)).is_dir() for folder in ("training", "validation")):
                found: Version = version
                return found
        raise self._missing("training and validation")

    @cached_property
    def label_set(self) -> LabelSet:
        """Read the classes from the config file, at the first use."""
        version = self.found_version
        for name in CONFIGS[version]:
            if (self.root / name).is_file():
                return read_config(self.root / name, f"mapillary_{version}")
        packaged = load_label_set("mapillary_v2.0" if version == "v2.0" else "mapillary_v1.2")
        warnings.warn(
            f"{self.root} has no {CONFIGS[version][0]}, which says which labels are evaluated; taking the package's "
            f"table {packaged.name}" + (", in which that is a guess for 7 labels" if version == "v2.0" else ""),
            stacklevel=2,
        )
        return packaged

    @property
    def published_sizes(self) -> dict[str, int]:
        """Return the number of images that each split should have."""
        return {"train": 18000, "val": 2000, "test": 5000}

    def source(self, split: Split) -> Source:
        """Return the images of a split; "test" and "predict" are the same, without labels."""
        folder = FOLDERS["test" if split == "predict" else split]
        images = files_below(self.root, f"{folder}/images", ".jpg")
        if not images:
            raise self._missing(folder)
        if folder == "testing":
            return FileSource([Item(key, image) for key, image in images.items()])
        labels = self._labels(folder, self.found_version)
        masks = files_below(self.root, labels, ".png")
        expected = f"{self.root / labels}/*.png; unpack or download the zip file again"
        return FileSource([Item(*i) for i in matched(images, masks, expected)], self.label_set)

    def _missing(self, what: str) -> MissingFileError:
        return MissingFileError(f"{self.root} does not hold Mapillary Vistas' {what}. Expected there:\n{TREE}\n{WHERE}")

    @staticmethod
    def _labels(folder: str, version: Version) -> str:
        return f"{folder}/labels" if version == "v1.1" else f"{folder}/{version}/labels"


def read_config(path: Path, name: str) -> LabelSet:
    """Read the label set of a config file of Mapillary Vistas.

    Args:
        path: JSON with `labels`: a list of `readable`, `color`, `evaluate`; a mask's number is the position in it.
        name: What to call the label set.

    Raises:
        UserError: The file is damaged or of another form.
    """
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
        rows, train_id = [], 0
        for raw_id, label in enumerate(labels):
            evaluated = label["evaluate"] is True
            red, green, blue = label["color"]
            rows.append(
                LabelRow(raw_id, train_id if evaluated else IGNORE_INDEX, label["readable"], (red, green, blue))
            )
            train_id += evaluated
        return LabelSet.from_rows(name, rows, str(path))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a config file of Mapillary Vistas ({type(error).__name__}: {error}); "
            "unpack or download the zip file again"
        ) from None
