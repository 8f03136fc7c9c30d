"""The arithmetic of `estimate`: rates from batches that were timed, the length of a run, the largest batch."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from early_fusion_seg.callbacks.step_timer import TimedBatch

LARGEST = 4096  # images; the search for the largest batch ends there


class Rate(NamedTuple):
    """What some batches took.

    Attributes:
        images: Images per second.
        batch: Seconds per batch.
        waiting: Share of the time spent waiting for data, in 0..1.
    """

    images: float
    batch: float
    waiting: float


class Length(NamedTuple):
    """What a run does, in each of its processes.

    Attributes:
        batches: Training batches.
        steps: Optimizer steps.
        epochs: Epochs, the one included that it ends in.
        validations: Times that the validation split is scored; None where the clock decides.
    """

    batches: int
    steps: int
    epochs: int
    validations: int | None


class Saved(NamedTuple):
    """What one checkpoint takes.

    Attributes:
        size: Bytes.
        seconds: To write it.
    """

    size: int
    seconds: float


def rate(timed: Sequence[TimedBatch], warmup: int) -> Rate:
    """Compute what a batch takes once the run is warm.

    Args:
        timed: The batches, at least one.
        warmup: Steps that do not count; where there are no more than that, the last one does.

    Example:
        >>> rate([TimedBatch(0, 4, 8.0, 9.0), TimedBatch(1, 4, 0.5, 2.0), TimedBatch(2, 4, 0.5, 2.0)], warmup=1)
        Rate(images=2.0, batch=2.0, waiting=0.25)
    """
    counted = [batch for batch in timed if batch.step >= min(warmup, timed[-1].step)]
    seconds = sum(batch.seconds for batch in counted)
    images = sum(batch.images for batch in counted)
    return Rate(images / seconds, seconds / len(counted), sum(batch.waited for batch in counted) / seconds)


def limited(batches: int, limit: float | None) -> int:
    """Apply the trainer's `limit_train_batches` or `limit_val_batches`: a number of batches, or a share of them.

    Example:
        >>> limited(7, 3), limited(7, 1.0), limited(7, 0.5), limited(7, None)
        (3, 7, 3, 7)
    """
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def batches_and_steps(epoch: int, accumulate: int, max_epochs: int, max_steps: int) -> tuple[int, int]:
    """Compute how many batches and optimizer steps a run has; what is reached first ends it.

    Args:
        epoch: Batches of an epoch.
        accumulate: Batches of a step; the last step of an epoch may have fewer.
        max_epochs: -1: no limit.
        max_steps: -1: no limit; there must be one of the two.

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
    """Count the validations of a run, the one at its end included.

    Args:
        batches: Of the run.
        epoch: Batches of an epoch.
        every_epochs: The trainer's `check_val_every_n_epoch`; None: `interval` counts batches over all epochs.
        interval: The trainer's `val_check_interval`: a number of batches, or a share of an epoch.

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
    """Find the largest batch that fits by doubling and bisecting, to one image in sixteen.

    Args:
        fits: Tells whether a batch of so many images does.
        start: Images to begin with.
        limit: Images to end with.

    Returns:
        The most images that did fit, 0 if not even one, and the fewest that did not, None if none were found.

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
    """Say how long something takes, in the two units that matter.

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
    """Say how much memory or disk something takes.

    Example:
        >>> mebibytes(3 * 2**20), mebibytes(3 * 2**30)
        ('3.0 MiB', '3.0 GiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
