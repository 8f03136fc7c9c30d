"""Errors that the user can fix. Each message states what was found, what was expected, and what to do."""


class UserError(ValueError):
    """A wrong value, file or setting. The command line prints the message without a traceback."""


class MissingFileError(UserError, FileNotFoundError):
    """A required file or folder does not exist."""
