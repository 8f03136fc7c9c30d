"""Layouts: the folders and files by which a data set is recognized on disk."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Layout(NamedTuple):
    """One way in which a data set can be laid out.

    Attributes:
        name: Name for messages.
        patterns: Glob patterns below the root; the layout is present if one of them matches.
        options: Arguments of the data module that reads it; None if it cannot be used by itself.
    """

    name: str
    patterns: tuple[str, ...]
    options: dict[str, Any] | None

    def is_in(self, root: Path) -> bool:
        """Return whether a folder holds this layout."""
        return any(next(root.glob(pattern), None) is not None for pattern in self.patterns)


def layouts_in(root: Path, layouts: Iterable[Layout]) -> list[Layout]:
    """Return the layouts that a folder holds."""
    return [layout for layout in layouts if layout.is_in(root)]
