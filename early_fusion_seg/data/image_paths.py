"""Find images on disk: in a folder, or by what `predict` takes instead of one."""

import os
import re
from collections.abc import Iterable
from glob import glob
from pathlib import Path

from early_fusion_seg.data.listing import composed, walk
from early_fusion_seg.errors import MissingFileError, UserError

IN_A_RUN = re.compile(r"(^|/)(runs/[a-z]+|lightning_logs)/version_\d+/")  # below the default output folders
COMPANIONS = (  # ends of the names of files that tools put beside images, in lower case
    *(".json", ".txt", ".xml", ".csv", ".yaml", ".yml", ".xmp", ".aae", ".ini", ".db", ".md", ".log", ".cache"),
    *(".html", ".lnk", ".url", ":zone.identifier", ".jgw", ".pgw", ".tfw", ".wld", ".prj", ".geojson"),
)
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts"}
ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)  # a Path has lost one slash; a drive has one letter
MAGIC = re.compile(r"[*?[]")  # characters of a pattern
EXPECTED = (
    "expected a folder of images, an image, a pattern such as 'photos/*.jpg', or a .txt file with one path per line"
)


def images_to_predict(place: Path) -> dict[str, Path]:
    """List the images that `predict` segments.

    Args:
        place: A folder; an image; a pattern, with `**` for any folders; or a text file (.txt) with one path per line,
            absolute or relative to the folder of that file.

    Returns:
        Key -> path, sorted by key: the path below the folder, or below the lowest folder that contains all images.

    Raises:
        UserError: There is no such place, it lists nothing, or it is a web address or a video.
    """
    if ADDRESS.match(str(place)):
        address = str(place).replace(":/", "://", 1)
        raise UserError(f"{address} is a web address; download the images and give their folder")
    if place.is_dir():
        return visible_files(place, written=False)
    if place.suffix.lower() in VIDEO_SUFFIXES:
        raise UserError(
            f"{place} is a video; extract its frames, such as with `ffmpeg -i {place.name} frames/%06d.png`, and give "
            "their folder"
        )
    if place.is_file():
        return _below_common_folder(_listed(place) if place.suffix.lower() == ".txt" else [place])
    if MAGIC.search(str(place)) and (found := _matching(place)):
        return _below_common_folder(found)
    raise MissingFileError(f"there are no images at {place}; {EXPECTED}")


def _listed(file: Path) -> list[Path]:
    """Return the paths in a text file."""
    lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    if paths := [file.parent / line.strip() for line in lines if line.strip()]:
        return paths
    raise UserError(f"{file} is empty; expected one path of an image per line")


def _matching(pattern: Path) -> list[Path]:
    """Return the files of a pattern that may be images; `**` leaves out what earlier runs have written."""
    names = glob(str(pattern), recursive=True)  # noqa: PTH207  # Path.glob would list hidden files too
    found = {Path(name) for name in names if not name.lower().endswith(COMPANIONS)}
    if "**" in pattern.parts:
        found &= set(visible_files(Path(*pattern.parts[: pattern.parts.index("**")]), written=False).values())
    return [path for path in found if not path.is_dir()]


def _below_common_folder(paths: Iterable[Path]) -> dict[str, Path]:
    """Return the paths by their keys below the lowest folder that contains all of them."""
    absolute = {os.path.abspath(path) for path in paths}  # noqa: PTH100  # also removes "..", and keeps links
    folder = os.path.commonpath([os.path.dirname(path) for path in absolute])  # noqa: PTH120  # of strings
    return _by_key(Path(folder), (os.path.relpath(path, folder).replace(os.sep, "/") for path in absolute))


def visible_files(folder: Path, skipped: Iterable[Path] = (), written: bool = True) -> dict[str, Path]:
    """List the files below a folder that may be images.

    Hidden files, and those that systems and tools put beside images, are left out. Folders and links that cannot be
    read are listed too, so that reading them raises an error.

    Args:
        folder: The folder.
        skipped: Folders directly below it that are left out.
        written: Whether to list what earlier runs have written, such as predictions and panels.

    Returns:
        Key -> path, sorted by key: the path below the folder, with slashes, in the composed Unicode form.
    """
    outside = tuple(f"{path.name}/" for path in skipped)
    names = {name for name in walk(str(folder), skip_outputs=not written) if not name.startswith(outside)}
    if not written:
        names -= {name for name in names if IN_A_RUN.search(name)}
        names -= {f"{name[:-12]}confusion.png" for name in names if name.endswith("results.json")}
        names -= {f"{name[:-10]}legend.png" for name in names if name.endswith("labels.csv")}
    files = [name for name in names if not name.lower().endswith(COMPANIONS)]
    return _by_key(folder, files)


def _by_key(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Return the paths of files below a folder by their keys, sorted."""
    names = set(names)
    # of names that differ only in the Unicode form, one keeps the name on the disk as its key
    keys = {name if composed(name) in names else composed(name): folder / name for name in sorted(names)}
    return {key: keys[key] for key in sorted(keys)}
