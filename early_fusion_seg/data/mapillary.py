"""Mapillary Vistas: 25,000 street photographs from all continents (Neuhold et al., ICCV 2017).

Versions 1.0 and 1.1 have 66 labels, of which 65 are evaluated; version 2.0 has 124 labels. Layout and evaluation rules
are those of github.com/mapillary/mapillary_vistas.
"""

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from early_fusion_seg.data.datamodule import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import FileSource, Item, Source
from early_fusion_seg.data.layout import Layout
from early_fusion_seg.data.listing import files_below, matched
from early_fusion_seg.data.replica import Replica, Size, block_scene, row_colors, save_json, save_pixels
from early_fusion_seg.data.submission import SubmissionFormat
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.io.images import write_indexed_png
from early_fusion_seg.labels import IGNORE_INDEX, LabelRow, LabelSet, load_label_set, packaged_rows

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
WHERE = """Mapillary Vistas needs an e-mail address, so there is no automatic download. Request the research edition at
  www.mapillary.com/dataset/vistas
and unpack the zip file that the e-mail links to."""

NAMES: dict[Version, str] = {"v2.0": "v2.0", "v1.2": "v1.2", "v1.1": "1.0 or 1.1"}


def _labels_folder(folder: str, version: Version) -> str:
    return f"{folder}/labels" if version == "v1.1" else f"{folder}/{version}/labels"


class MapillaryVistasDataModule(SegmentationDataModule):
    """Mapillary Vistas: 18,000 training and 2,000 validation images. `predict` uses the 5,000 test images.

    The names and colors of the classes, and which labels are evaluated, come from the config file of the download. The
    raw ids in the masks are positions in its list. If the file is missing, a table of this package is used, with a
    warning: there is no published list of the 8 labels of version 2.0 that are not evaluated.

    The official evaluator skips pixels predicted as a label that is not evaluated (`pred_void` "drop").

    Args:
        root: Folder with training/, validation/ and testing/.
        version: Version of the labels: "v1.1" (the download of 1.0 or 1.1, with labels/ directly below training/),
            "v1.2" or "v2.0" (both in the download of 2.0). Default (None): the newest version found.
        kwargs: Arguments of SegmentationDataModule, from batch_size to eval_transform.
    """

    pred_void = "drop"
    license = "Mapillary Vistas Research Edition: non-commercial use."
    layouts = tuple(
        Layout(
            f"Mapillary Vistas {name}",
            tuple(_labels_folder(folder, version) for folder in ("training", "validation")),
            {"version": version},
        )
        for version, name in NAMES.items()
    )
    fixes: ClassVar[Mapping[str, str]] = {"": "unpack or download the zip file of Mapillary Vistas again"}
    masks_match_images = True

    def __init__(self, root: str | Path, version: Version | None = None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        if version is not None and version not in get_args(Version):
            raise UserError(f"version is {version!r}; expected one of {', '.join(get_args(Version))}")
        self.version = version

    @cached_property
    def found_version(self) -> Version:
        """Return the version that was set, or the newest version found."""
        if self.version is not None:
            return self.version
        for version in reversed(get_args(Version)):
            if any((self.root / _labels_folder(folder, version)).is_dir() for folder in ("training", "validation")):
                found: Version = version
                return found
        raise self._missing_error("training and validation")

    @cached_property
    def label_set(self) -> LabelSet:
        """Return the classes; the config file is read at the first use."""
        version = self.found_version
        for name in CONFIGS[version]:
            if (self.root / name).is_file():
                return read_config(self.root / name, f"mapillary_{version}")
        packaged = load_label_set("mapillary_v2.0" if version == "v2.0" else "mapillary_v1.2")
        warnings.warn(
            f"{self.root} has no {CONFIGS[version][0]}, which defines which labels are evaluated; using the table "
            f"{packaged.name} of this package" + (", a guess for 7 of the labels" if version == "v2.0" else ""),
            stacklevel=2,
        )
        return packaged

    @property
    def published_sizes(self) -> dict[str, int]:
        """Return the number of images that each split should have."""
        return {"train": 18000, "val": 2000, "test": 5000}

    def source(self, split: Split) -> Source:
        """Return the images of a split; "test" and "predict" are the same images, without labels."""
        folder = FOLDERS["test" if split == "predict" else split]
        images = files_below(self.root, f"{folder}/images", ".jpg")
        if not images:
            raise self._missing_error(folder)
        if folder == "testing":
            return FileSource([Item(key, image) for key, image in images.items()])
        labels = _labels_folder(folder, self.found_version)
        masks = files_below(self.root, labels, ".png")
        expected = f"{self.root / labels}/*.png; unpack or download the zip file again"
        return FileSource([Item(*i) for i in matched(images, masks, expected)], self.label_set)

    def _missing_error(self, what: str) -> MissingFileError:
        return MissingFileError(f"{self.root} does not hold Mapillary Vistas' {what}. Expected there:\n{TREE}\n{WHERE}")

    @property
    def submission(self) -> SubmissionFormat:
        """Return the format of the test server: gray PNGs of raw ids in a zip file."""
        return SubmissionFormat("mapillary.zip", "the server of the Mapillary Vistas benchmark")

    @classmethod
    def replicas(cls) -> dict[str, Replica]:
        """Return the fake replicas of the download of version 2.0 and of that of version 1.1."""
        return {"": Replica(fake_mapillary), "v1.1": Replica(partial(fake_mapillary, version="v1.1"))}

    def diagnose_raw_ids(self, raw_ids: Counter[int], fix: str) -> str | None:
        """Detect masks of version 2.0 in the folders of version 1."""
        unknown = self.label_set.unknown_ids(raw_ids)
        if self.found_version == "v2.0" or not unknown or unknown[0] <= 65:
            return None
        return (
            f"the masks are of version 2.0 (version 1 has the labels 0..65, not {unknown[0]}): {fix}, "
            "or move them to training/v2.0/labels and validation/v2.0/labels"
        )


def read_config(path: Path, name: str) -> LabelSet:
    """Read the label set from a config file of Mapillary Vistas.

    Args:
        path: JSON file with the list `labels` of objects with `readable`, `color` and `evaluate`. The position in the
            list is the raw id.
        name: Name of the label set.

    Raises:
        UserError: The file is damaged or is not such a config file.
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


def fake_mapillary(
    root: str | Path, images: int = 3, size: Size = (60, 80), seed: int = 0, version: str = "v2.0"
) -> Path:
    """Write a fake replica.

    Args:
        root: Folder to write to.
        images: Number of images in each split.
        size: Height and width in pixels.
        seed: Seed of the pixels.
        version: "v1.1" for the download of version 1.1; anything else for that of 2.0, which contains v1.2 and v2.0.

    Returns:
        The root.
    """
    root, rng = Path(root), np.random.default_rng(seed)
    versions = {"": "mapillary_v1.2"} if version == "v1.1" else {f"{v}/": f"mapillary_{v}" for v in ("v1.2", "v2.0")}
    for place, table in versions.items():
        labels = [
            {
                "name": row.name.lower().replace(" ", "-"),
                "readable": row.name,
                "color": row.color,
                "evaluate": row.train_id < 255,
            }
            for row in packaged_rows(table)
        ]
        name = f"config_{place[:-1]}.json" if place else "config.json"
        save_json(root / name, {"version": place[1:-1] or "1.1", "mapping": "public", "labels": labels})
    colors = row_colors(packaged_rows("mapillary_v1.2"))
    for split in FOLDERS.values():
        for number in range(images):
            key = f"{split[:2]}{number:020}"
            image, raw = block_scene(rng, size, colors)
            save_pixels(root / split / "images" / f"{key}.jpg", image)
            for place in versions if split != "testing" else ():
                shift = 58 if place == "v2.0/" else 0  # so that the highest label of v2.0, 123, occurs
                write_indexed_png(root / split / f"{place}labels" / f"{key}.png", raw + np.uint8(shift), colors)
    return root
