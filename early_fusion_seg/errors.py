"""Errors that a user can mend: the message says what was found, what was expected and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A wrong value, file or setting. The command line prints it as one sentence, without a traceback."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that should exist and does not."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the operating system's errors the name of the file that is written: that of a full disk has none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # the others are not the operating system's
            error.filename = str(path)
        raise
