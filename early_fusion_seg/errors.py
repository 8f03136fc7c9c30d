"""Errors that the user can fix. Each message states what was found, what was expected, and what to do."""


class UserError(ValueError):
    """A wrong value, file or setting. The command line prints the message without a traceback."""


class MissingFileError(UserError, FileNotFoundError):
    """A required file or folder does not exist."""


def is_ctrl_c(error: BaseException) -> bool:
    """Return whether Ctrl-C ended a command; Lightning raises SystemExit for it."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )
