"""quiet_lightning: hide the messages of Lightning that no user needs to act on."""

import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException

from early_fusion_seg.errors import UserError

LIGHTNING = Path(lightning.__file__).parent
LOGGERS = ("lightning.pytorch", "lightning.fabric")
UNHELPFUL = (
    r"Experiment logs directory .* exists and is not empty",  # metrics of earlier runs are kept
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning's use of torch
    r"Found \d+ module\(s\) in eval mode",  # the frozen encoder
    r".*does not have many workers",  # the number of workers is the user's choice
    r"The number of training batches .* is smaller than the logging interval",  # `Throughput` lowers the interval
    r"predict returned None",  # an unreadable file, which is reported at the end
    r"\s*Dump of a value that does not round-trip: a tuple",  # albumentations takes the list that is read back
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide Lightning's advice within the block, and raise what it refuses as UserError.

    Log levels, warning filters and the format of warnings are restored at the end.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    profilers = logging.getLogger("lightning.pytorch.profilers.profiler")  # their reports are what the user asked for
    format_before = warnings.formatwarning
    with warnings.catch_warnings():
        for message in UNHELPFUL:
            warnings.filterwarnings("ignore", message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)  # hides the seed, the devices found, and advertisements
        warnings.formatwarning = _format_warning
        profilers.setLevel(logging.INFO)
        try:
            yield
        except Exception as error:  # what is not about settings is raised again
            if not _is_about_settings(error):
                raise
            raise UserError(" ".join(str(error).split())) from error
        finally:
            warnings.formatwarning = format_before
            profilers.setLevel(logging.NOTSET)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning for users without the line of code, and one for developers (deprecations) with its place."""
    place = "" if issubclass(category, UserWarning) else f"{filename}:{lineno}: {category.__name__}: "
    return f"warning: {place}{message}\n"


def _is_about_settings(error: Exception) -> bool:
    """Return whether an error is about settings of the user: Lightning refuses them, or a module is not installed.

    Lightning has many types for what it refuses. Errors that it does not raise by a statement of its own, such as a
    TypeError in a call, are programming errors.
    """
    if isinstance(error, MisconfigurationException):
        return True
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return not error.name.startswith("early_fusion_seg")
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, ValueError | RuntimeError | ImportError | NotImplementedError)
        and not isinstance(error, UserError)
        and Path(frames[-1].filename).is_relative_to(LIGHTNING)
        and str(frames[-1].line).startswith("raise ")
    )
