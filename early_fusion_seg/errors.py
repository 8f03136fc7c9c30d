"""Errors that a user can mend: the message says what was found, what was expected and what to do."""


class UserError(ValueError):
    """A wrong value, file or setting. The command line prints it as one sentence, without a traceback."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that should exist and does not."""
