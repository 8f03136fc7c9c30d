"""Files that are written whole or not at all."""

from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name first, so that an interruption leaves no half file under its own.

    Raises:
        OSError: The operating system's, with the name of the file, which that of a full disk lacks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".part-{path.name}")
        write(part)
        part.replace(path)
    except OSError as error:
        if error.errno is not None:  # the others are not the operating system's
            error.filename = str(path)
        raise
