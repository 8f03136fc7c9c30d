"""What a benchmark's test server takes: PNGs of raw ids, packed into one file."""

import tarfile
import zipfile
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from early_fusion_seg.data.dataset import FileSource
from early_fusion_seg.io.atomic import replace_file
from early_fusion_seg.io.images import write_indexed_png
from early_fusion_seg.labels import LabelSet


@dataclass(frozen=True)
class SubmissionFormat:
    """The format of one test server.

    Args:
        archive: Name of the file to upload; `.zip` and `.tgz` are packed here.
        server: Where to upload it.
        folder: Folder of the PNGs below the output folder.
        indexed: Whether the PNGs have a palette; else they are gray.
        pack: For other archives: called with the path to write and the PNGs.
        check_archive: For other archives: yields what is wrong with one, given the images and its path.
        check_raw_ids: Returns what is wrong with the raw ids of all PNGs together, or None.
    """

    archive: str
    server: str
    folder: str = "labels"
    indexed: bool = False
    pack: Callable[[Path, list[Path]], None] | None = None
    check_archive: Callable[[FileSource, Path], Iterator[str]] | None = None
    check_raw_ids: Callable[[Set[int]], str | None] | None = None

    def path(self, output: Path, key: str) -> Path:
        """Return the PNG of an image below an output folder."""
        return output / self.folder / f"{key}.png"

    def write(self, path: Path, labels: NDArray[np.uint8], label_set: LabelSet) -> None:
        """Write train ids (h, w) as the PNG of raw ids."""
        raw = label_set.decode(labels)
        if self.indexed:
            replace_file(path, lambda part: write_indexed_png(part, raw, label_set.palette))
        else:
            replace_file(path, lambda part: Image.fromarray(raw).save(part, format="PNG"))

    def write_archive(self, output: Path, keys: list[str]) -> Path:
        """Pack the PNGs of all images below an output folder into the file to upload, and return its path."""
        target, paths = output / self.archive, [self.path(output, key) for key in keys]
        if self.pack is not None:
            pack = self.pack
            replace_file(target, lambda part: pack(part, paths))
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
