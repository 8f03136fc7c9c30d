"""Errors that the user can fix. Each message states what was found, what was expected, and what to do."""

from collections.abc import Iterable


class UserError(ValueError):
    """A wrong value, file or setting. The command line prints the message without a traceback."""


class MissingFileError(UserError, FileNotFoundError):
    """A required file or folder does not exist."""


def first_five(texts: Iterable[object], separator: str = ", ") -> str:
    """List the first five of several things for a message, and count the others.

    Example:
        >>> first_five("abcdefg")
        'a, b, c, d, e and 2 more'
    """
    listed = [str(text) for text in texts]
    return separator.join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def is_ctrl_c(error: BaseException) -> bool:
    """Return whether Ctrl-C ended a command; Lightning raises SystemExit for it."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )
