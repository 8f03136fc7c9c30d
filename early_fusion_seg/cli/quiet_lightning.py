"""quiet_lightning: hide the messages of Lightning that no user needs to act on."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException

from early_fusion_seg.errors import UserError

LOGGERS = ("lightning.pytorch", "lightning.fabric")
UNHELPFUL = (
    r"Experiment logs directory .* exists and is not empty",  # metrics of earlier runs are kept
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning's use of torch
    r"Found \d+ module\(s\) in eval mode",  # the frozen encoder
    r".*does not have many workers",  # the number of workers is the user's choice
    r"predict returned None",  # an unreadable file, which is reported at the end
    r"\s*Dump of a value that does not round-trip: a tuple",  # albumentations takes the list that is read back
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide Lightning's advice within the block, and raise its MisconfigurationException as UserError.

    Log levels and warning filters are restored at the end.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in UNHELPFUL:
            warnings.filterwarnings("ignore", message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)  # hides the seed, the devices found, and advertisements
        try:
            yield
        except MisconfigurationException as error:
            raise UserError(str(error)) from error
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
