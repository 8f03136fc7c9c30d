"""LabelSet: the classes of a data set, with names, colors, and the map from numbers in masks to train ids.

A raw id is a number stored in a mask. A train id is a class of the network, 0..K-1, or 255 for ignored pixels. Several
raw ids may have the same train id. Label sets are CSV files with the columns `raw_id,train_id,name,color`.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from early_fusion_seg.errors import MissingFileError, UserError, first_five

IGNORE_INDEX = 255
UNKNOWN = 254  # marks raw ids that are not in the table; used only if no class has this train id
RAW_IDS = 65536  # number of values of a 16-bit mask
COLUMNS = ("raw_id", "train_id", "name", "color")
EXAMPLE = "raw_id,train_id,name,color\n0,0,road,#804080\n1,1,car,#00008e\n255,255,void,#000000"

Color = tuple[int, int, int]


class LabelRow(NamedTuple):
    """One line of a label CSV."""

    raw_id: int
    train_id: int
    name: str
    color: Color


@dataclass(frozen=True, slots=True)
class LabelSet:
    """The classes of a data set.

    Args:
        name: Name of the label set in results and messages.
        class_names: K names in the order of the train ids.
        palette: K colors, RGB 0..255.
        raw_to_train: Pairs (raw id, train id); train id 255 is ignored.
        ignore_index: The train id of ignored pixels.
        file: The user's CSV file that it was read from; None for a label set of this package or of a data set.
        colors: The color of each raw id, in the order of `raw_to_train`, to read masks in colors; empty if unknown.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    raw_to_train: tuple[tuple[int, int], ...]
    ignore_index: int = IGNORE_INDEX
    file: str | None = None
    colors: tuple[Color, ...] = ()

    @property
    def num_classes(self) -> int:
        """Return K, the number of classes without the ignored one."""
        return len(self.class_names)

    def encode(self, raw: NDArray[Any], file: str | Path) -> NDArray[np.uint8]:
        """Convert raw ids to train ids.

        Args:
            raw: Raw ids, integers of any shape.
            file: The mask file, for the message.

        Returns:
            Train ids of the same shape.

        Raises:
            UserError: A raw id is not in the table.
        """
        if raw.size and raw.dtype == np.uint8 and self.num_classes < UNKNOWN:  # the usual case, several times faster
            fast = cv2.LUT(np.ascontiguousarray(raw), _lookup_table_8_bit(self.raw_to_train)).reshape(raw.shape)
            if not (fast == UNKNOWN).any():
                return np.asarray(fast, np.uint8)
        if raw.size and (int(raw.min()) < 0 or int(raw.max()) >= RAW_IDS):
            raise self._unknown_ids_error(raw, file)
        train = _lookup_table(self.raw_to_train)[raw]
        if train.size and int(train.min()) < 0:
            raise self._unknown_ids_error(raw, file)
        encoded: NDArray[np.uint8] = train.astype(np.uint8)
        return encoded

    def decode(self, train: NDArray[Any]) -> NDArray[Any]:
        """Convert train ids to raw ids.

        If several raw ids have the same train id, the first one in the table is used.

        Args:
            train: Train ids of any shape, 0..K-1 or 255.

        Returns:
            Raw ids of the same shape: uint8, or uint16 if the table has a raw id above 255.
        """
        first = {train_id: raw_id for raw_id, train_id in reversed(self.raw_to_train)}
        table = np.full(256, first.get(self.ignore_index, self.ignore_index), np.uint16)
        for train_id, raw_id in first.items():
            table[train_id] = raw_id
        wide = max(first.values(), default=0) > 255
        decoded: NDArray[Any] = table.astype(np.uint16 if wide else np.uint8)[train]
        return decoded

    def of_train_ids(self) -> "LabelSet":
        """Return a label set of the same classes for masks that contain train ids."""
        same = (*((i, i) for i in range(self.num_classes)), (self.ignore_index, self.ignore_index))
        return replace(self, name=f"{self.name}_train_ids", raw_to_train=same, colors=())

    def has_class(self, raw_ids: Iterable[int]) -> bool:
        """Return whether any of the raw ids belongs to a class, and is not ignored."""
        to_train = dict(self.raw_to_train)
        return any(to_train.get(raw_id, self.ignore_index) != self.ignore_index for raw_id in raw_ids)

    def unknown_ids(self, raw_ids: Iterable[int]) -> list[int]:
        """Return the raw ids that are not in the table, sorted."""
        return sorted(set(raw_ids) - {raw_id for raw_id, _ in self.raw_to_train})

    @classmethod
    def from_csv(cls, path: str | Path) -> "LabelSet":
        """Read a label CSV.

        Raises:
            UserError: The file is missing or invalid; the message names the file and line.
        """
        path = Path(path)
        return replace(cls.from_rows(path.stem, read_rows(path), str(path)), file=str(path))

    @classmethod
    def from_rows(cls, name: str, rows: Iterable[LabelRow], where: str) -> "LabelSet":
        """Create a label set from rows; the first row of a class defines its name and color.

        Args:
            name: Name of the label set.
            rows: One row for each raw id.
            where: File or name of the table, for messages.

        Raises:
            UserError: A raw id or a name is a duplicate, or the train ids are not 0, 1, 2, ...
        """
        raw_to_train: dict[int, int] = {}
        classes: dict[int, LabelRow] = {}
        rows = list(rows)
        for row in rows:
            if row.raw_id in raw_to_train:
                raise UserError(f"{where}: duplicate raw_id {row.raw_id}; give each raw_id one line")
            raw_to_train[row.raw_id] = row.train_id
            if row.train_id != IGNORE_INDEX:
                classes.setdefault(row.train_id, row)
        if not classes or set(classes) != set(range(len(classes))):
            raise UserError(
                f"{where}: the train ids are {sorted(classes)}; expected 0, 1, 2, ... without a gap, or 255"
            )
        ordered = [classes[train_id] for train_id in range(len(classes))]
        names = [row.name for row in ordered]
        if len(set(names)) < len(names):
            duplicates = sorted({n for n in names if names.count(n) > 1})
            raise UserError(f"{where}: two train ids have the same name ({', '.join(duplicates)})")
        palette, colors = (tuple(row.color for row in some) for some in (ordered, rows))
        return cls(name, tuple(names), palette, tuple(raw_to_train.items()), colors=colors)

    def _unknown_ids_error(self, raw: NDArray[Any], file: str | Path) -> UserError:
        ids, counts = np.unique(raw, return_counts=True)
        known = dict(self.raw_to_train)
        pixels = {i: n for i, n in zip(ids.tolist(), counts.tolist(), strict=True) if i not in known}
        if len(pixels) == 1:
            ((raw_id, count),) = pixels.items()
            which = f"the label {raw_id}, which the label set '{self.name}' does not have, in {count} pixel(s)"
        else:
            listed = first_five(f"{raw_id} in {count} pixel(s)" for raw_id, count in pixels.items())
            which = f"{len(pixels)} labels that the label set '{self.name}' does not have: {listed}"
        found = f"{file} holds {which} (it has {in_ranges(known)})"
        if wrong := [raw_id for raw_id in pixels if not 0 <= raw_id < RAW_IDS]:
            return UserError(
                f"{found}. A label is a number 0..{RAW_IDS - 1}: if {wrong[0]} is the number of an object or a "
                "color, convert the mask to numbers of classes."
            )
        if self.file is None:
            return UserError(found)
        line = f"{min(pixels)},{self.ignore_index},void,#000000"
        advice = f"the line '{line}'" if len(pixels) == 1 else f"a line such as '{line}' for each"
        return UserError(f"{found}. Correct the mask, or add {advice} to {self.file} to ignore its pixels.")


def in_ranges(numbers: Iterable[int]) -> str:
    """Format whole numbers as a list of ranges.

    Example:
        >>> in_ranges([7, 0, 1, 2])
        '0..2, 7'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)


@lru_cache(maxsize=16)  # data modules load their label set at each use
def load_label_set(name: str) -> LabelSet:
    """Load a label set of this package, such as "camvid_11"."""
    return LabelSet.from_rows(name, packaged_rows(name), name)


def packaged_rows(name: str, train_column: str = "train_id") -> list[LabelRow]:
    """Read the rows of a label CSV of this package.

    Args:
        name: Name of the file without `.csv`.
        train_column: Column of the train ids; some files have several groupings of classes.
    """
    folder = resources.files(__package__)
    with resources.as_file(folder / f"{name}.csv") as path:
        if not path.is_file():
            names = sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".csv"))
            raise UserError(f"there is no label set '{name}' in the package; it has {', '.join(names)}")
        return read_rows(path, train_column)


def read_rows(path: Path, train_column: str = "train_id") -> list[LabelRow]:
    """Read the rows of a label CSV and check each row.

    Raises:
        UserError: The file is missing, not text, or a row is invalid.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no label CSV {path}. It lists the classes, for example:\n{EXAMPLE}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from None
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    missing = {*COLUMNS, train_column} - set(reader.fieldnames or ())
    if missing:
        raise UserError(f"{path} lacks the column(s) {', '.join(sorted(missing))}. Expected, for example:\n{EXAMPLE}")
    return [_parse_row(line, train_column, f"{path}, line {reader.line_num}") for line in reader]


def _parse_row(line: dict[str, str], train_column: str, where: str) -> LabelRow:
    raw_id = _parse_integer(line["raw_id"], RAW_IDS - 1, f"{where}: raw_id")
    train_id = _parse_integer(line[train_column], IGNORE_INDEX, f"{where}: {train_column}")
    name = (line["name"] or "").strip()
    if not name:
        raise UserError(f"{where}: the name is empty")
    return LabelRow(raw_id, train_id, name, _parse_color(line["color"], where))


def _parse_integer(text: str | None, highest: int, where: str) -> int:
    value = (text or "").strip()
    if not (value.isascii() and value.isdigit() and int(value) <= highest):
        raise UserError(f"{where} is '{value}'; expected a whole number 0..{highest}")
    return int(value)


def _parse_color(text: str | None, where: str) -> Color:
    value = (text or "").strip()
    digits = value.removeprefix("#")
    if len(value) != 7 or len(digits) != 6 or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
        raise UserError(f"{where}: the color is '{value}'; expected red, green and blue as in #804080")
    red, green, blue = bytes.fromhex(digits)
    return red, green, blue


@lru_cache(maxsize=16)
def _lookup_table_8_bit(raw_to_train: tuple[tuple[int, int], ...]) -> NDArray[np.uint8]:
    """Return the train id of every 8-bit raw id; UNKNOWN for raw ids that are not in the table."""
    table = _lookup_table(raw_to_train)[:256]
    return np.where(table < 0, UNKNOWN, table).astype(np.uint8)


@lru_cache(maxsize=16)
def _lookup_table(raw_to_train: tuple[tuple[int, int], ...]) -> NDArray[np.int16]:
    """Return the train id of every raw id; -1 for raw ids that are not in the table."""
    table = np.full(RAW_IDS, -1, np.int16)
    for raw_id, train_id in raw_to_train:
        table[raw_id] = train_id
    return table
