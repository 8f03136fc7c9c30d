"""The arithmetic of `estimate`: rates of timed batches, length of a run, search for the largest batch."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from early_fusion_seg.callbacks.step_timer import TimedBatch

LARGEST = 4096  # images; the search for the largest batch stops here


class Rate(NamedTuple):
    """Speed of some batches.

    Attributes:
        images: Images per second.
        batch: Seconds per batch.
        waiting: Share of the time spent waiting for data, in 0..1.
    """

    images: float
    batch: float
    waiting: float


class Length(NamedTuple):
    """Length of a run, in each of its processes.

    Attributes:
        batches: Training batches.
        steps: Optimizer steps.
        epochs: Epochs that are begun.
        validations: Validations; None if they are due at intervals of time.
    """

    batches: int
    steps: int
    epochs: int
    validations: int | None


class Saved(NamedTuple):
    """Cost of one checkpoint.

    Attributes:
        size: Bytes.
        seconds: Time to write it.
    """

    size: int
    seconds: float


def rate(timed: Sequence[TimedBatch], warmup: int) -> Rate:
    """Compute the speed after warmup.

    Args:
        timed: The batches, at least one.
        warmup: Number of first steps to leave out; the last step always counts.

    Example:
        >>> rate([TimedBatch(0, 4, 8.0, 9.0), TimedBatch(1, 4, 0.5, 2.0), TimedBatch(2, 4, 0.5, 2.0)], warmup=1)
        Rate(images=2.0, batch=2.0, waiting=0.25)
    """
    counted = [batch for batch in timed if batch.step >= min(warmup, timed[-1].step)]
    seconds = sum(batch.seconds for batch in counted)
    images = sum(batch.images for batch in counted)
    return Rate(images / seconds, seconds / len(counted), sum(batch.waited for batch in counted) / seconds)


def limited(batches: int, limit: float | None) -> int:
    """Apply the trainer's `limit_train_batches` or `limit_val_batches`: a number of batches, or a fraction.

    Example:
        >>> limited(7, 3), limited(7, 1.0), limited(7, 0.5), limited(7, None)
        (3, 7, 3, 7)
    """
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def batches_and_steps(epoch: int, accumulate: int, max_epochs: int, max_steps: int) -> tuple[int, int]:
    """Compute the batches and optimizer steps of a run, which ends at the limit that it reaches first.

    Args:
        epoch: Batches per epoch.
        accumulate: Batches per step; the last step of an epoch may have fewer.
        max_epochs: Limit of epochs; -1: none.
        max_steps: Limit of steps; -1: none. At least one of the two limits is needed.

    Example:
        >>> batches_and_steps(epoch=10, accumulate=4, max_epochs=-1, max_steps=7)
        (24, 7)
    """
    steps_of_epoch = math.ceil(epoch / accumulate)
    limits = [limit for limit in (max_epochs * steps_of_epoch, max_steps) if limit >= 0]
    steps = min(limits) if steps_of_epoch else 0
    epochs, rest = divmod(steps, max(1, steps_of_epoch))
    return epochs * epoch + rest * accumulate, steps


def validations(batches: int, epoch: int, every_epochs: int | None, interval: float) -> int:
    """Count the validations of a run, including the one at its end.

    Args:
        batches: Batches of the run.
        epoch: Batches per epoch.
        every_epochs: The trainer's `check_val_every_n_epoch`; None: `interval` counts batches over all epochs.
        interval: The trainer's `val_check_interval`: a number of batches, or a fraction of an epoch.

    Example:
        >>> validations(batches=45, epoch=10, every_epochs=2, interval=1.0)  # after epochs 2 and 4, and at the end
        3
    """
    every = interval if isinstance(interval, int) else max(1, int(epoch * interval))
    if every_epochs is None:
        return batches // every
    ends = [epoch] * (batches // epoch) + [batches % epoch] * (batches % epoch > 0)  # batches done in each epoch
    counts = [done // every if i % every_epochs == 0 else 0 for i, done in enumerate(ends, 1)]
    at_end = bool(ends) and len(ends) % every_epochs == 0 and ends[-1] % every == 0
    return sum(counts) + (bool(ends) and not at_end)


def largest_that_fits(fits: Callable[[int], bool], start: int, limit: int = LARGEST) -> tuple[int, int | None]:
    """Find the largest batch that fits into memory, by doubling and bisection, to one image in sixteen.

    Args:
        fits: Returns whether a batch of that many images fits.
        start: First number of images to try.
        limit: Highest number of images to try.

    Returns:
        The largest number of images that fits, 0 if none does, and the smallest that does not, None if all fit.

    Example:
        >>> largest_that_fits(lambda images: images <= 11, start=2)
        (11, 12)
    """
    good, bad, size = 0, None, start
    while bad is None and good < limit:
        if fits(size):
            good, size = size, min(2 * size, max(limit, size))
        else:
            bad = size
    while bad is not None and bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good, bad


def duration(seconds: float) -> str:
    """Format a duration in its two largest units.

    Example:
        >>> duration(0.4), duration(125), duration(5000), duration(200_000)
        ('0.4 s', '2 min 5 s', '1 h 23 min', '2 d 8 h')
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    for unit, name, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        count, rest = divmod(round(seconds / below), unit // below)
        if count:
            return f"{count} {name} {rest} {small}"
    return f"{seconds:.0f} s"


def mebibytes(count: float) -> str:
    """Format a number of bytes.

    Example:
        >>> mebibytes(3 * 2**20), mebibytes(3 * 2**30)
        ('3.0 MiB', '3.0 GiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
