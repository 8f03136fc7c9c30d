"""Layout: the folders and files by which a data set is recognized on disk."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Layout(NamedTuple):
    """One arrangement of a data set's folders and files.

    Attributes:
        name: Name for messages.
        patterns: Glob patterns below the root; the layout is present if one of them matches.
        options: Arguments of the data module that reads this layout; None if the layout is not usable by itself.
    """

    name: str
    patterns: tuple[str, ...]
    options: dict[str, Any] | None

    def is_in(self, root: Path) -> bool:
        """Return whether a folder contains this layout."""
        return any(next(root.glob(pattern), None) is not None for pattern in self.patterns)


def layouts_in(root: Path, layouts: Iterable[Layout]) -> list[Layout]:
    """Return the layouts that a folder contains."""
    return [layout for layout in layouts if layout.is_in(root)]
