"""SubmissionFormat: the files that a benchmark's test server expects, PNGs of raw ids packed into one archive."""

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
    """The submission format of one test server.

    Args:
        archive: Name of the file to upload. `.zip` and `.tgz` files are packed by this class.
        server: Where to upload it.
        folder: Folder of the PNGs below the output folder.
        indexed: Write PNGs with a palette; otherwise gray PNGs.
        pack: Function that writes another kind of archive, called with its path and the paths of the PNGs.
        check_archive: Function that checks another kind of archive, called with the images and its path. It yields the
            problems found.
        check_raw_ids: Function that checks the set of raw ids of all PNGs. It returns a problem, or None.
    """

    archive: str
    server: str
    folder: str = "labels"
    indexed: bool = False
    pack: Callable[[Path, list[Path]], None] | None = None
    check_archive: Callable[[FileSource, Path], Iterator[str]] | None = None
    check_raw_ids: Callable[[Set[int]], str | None] | None = None

    def path(self, output: Path, key: str) -> Path:
        """Return the path of the PNG of an image."""
        return output / self.folder / f"{key}.png"

    def write(self, path: Path, labels: NDArray[np.uint8], label_set: LabelSet) -> None:
        """Write train ids (h, w) as a PNG of raw ids."""
        raw = label_set.decode(labels)
        if self.indexed:
            replace_file(path, lambda part: write_indexed_png(part, raw, label_set.palette))
        else:
            replace_file(path, lambda part: Image.fromarray(raw).save(part, format="PNG"))

    def write_archive(self, output: Path, keys: list[str]) -> Path:
        """Pack the PNGs of all images into the file to upload.

        Args:
            output: Output folder, which contains the folder of the PNGs.
            keys: Keys of the images.

        Returns:
            The path of the archive.
        """
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
