"""Samplers and loaders: which process reads which images, in which order, and where an interrupted epoch resumes.

The order of the training images depends only on (seed, epoch), the augmentation of a sample only on (seed, epoch,
position). So the training data are the same for any number of processes and workers, and for a run that was interrupted
and resumed. Images drawn for rare classes replace images in this order before it is split among the processes.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from early_fusion_seg.data.dataset import FileSource, Sample, SegmentationDataset
from early_fusion_seg.errors import UserError, first_five

ORDER = {  # what determines the order of an epoch, in the words of messages
    "batch_size": "batches of {}",
    "processes": "{} process(es)",
    "images": "{} images",
    "names": "images whose names have the checksum {}",
    "seed": "the seed {}",
}


class EpochSampler(DistributedSampler[tuple[int, ...]]):
    """Yield (epoch, position) for the images of this process, in an order that depends only on seed and epoch.

    An image drawn for a rare class is (epoch, position, class, place in the order); see `draw_rare_classes`.

    Lightning sets the epoch before each pass. A plain loop over the loader does not, so each pass also sets the next
    epoch.

    Attributes:
        skip: Number of positions that the next pass skips at its start because they were trained on before an
            interruption.
        rare_draws: Function of the epoch that returns the images drawn for rare classes: place in the order of all
            processes -> (position, class).
    """

    skip: int = 0
    rare_draws: Callable[[int], dict[int, tuple[int, int]]] | None = None

    def __iter__(self) -> Iterator[Any]:
        epoch, skip = self.epoch, self.skip
        draws = {} if self.rare_draws is None else self.rare_draws(epoch)
        indices: list[tuple[int, ...]] = []
        for i, position in enumerate(super().__iter__()):
            # DistributedSampler repeats the first images at the end to give every process the same number
            place = (self.rank + i * self.num_replicas) % len(cast(Any, self.dataset))
            indices.append((epoch, *draws[place], place) if place in draws else (epoch, cast(int, position)))
        self.set_epoch(epoch + 1)
        self.skip = 0
        return iter(indices[skip:])


class UnpaddedDistributedSampler(DistributedSampler[int]):
    """Yield every position exactly once over all processes.

    Unlike DistributedSampler it repeats no images, so processes may get different numbers of images, or none.

    Args:
        dataset: The images.
        world: Number of processes.
        rank: Number of this process.
        pad: Give a process that would get no image one that another process has too.
    """

    def __init__(self, dataset: Dataset[Any], world: int, rank: int, pad: bool = False) -> None:
        super().__init__(dataset, world, rank, shuffle=False)
        images = len(cast(Any, dataset))
        self.positions = range(rank, images, world)
        if pad and not self.positions:
            self.positions = range(rank % images, rank % images + 1)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.positions)

    def __len__(self) -> int:
        return len(self.positions)


class BatchLoader(DataLoader[Sample]):
    """A DataLoader that raises UserError in the main process, and yields one empty batch if it has no images.

    An exception raised in a worker would arrive as a traceback in a string. A worker returns a sample with `error`
    instead, which keeps the message as it is. A process without images must still join the collective operations at the
    end of an epoch, so it gets one batch without `image` and with an empty list `key`.
    """

    yield_errors = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # every caller accepts a generator
        if super().__len__() == 0:
            yield {"key": []}
        for batch in super().__iter__():
            if "error" in batch and not self.yield_errors:
                raise UserError(self._message(batch["error"]))
            yield batch

    def __len__(self) -> int:
        return max(1, super().__len__())

    def _message(self, errors: Sequence[str]) -> str:
        """Join the errors of a batch; if files are missing, count those of the whole split."""
        source = cast(SegmentationDataset, self.dataset).source
        missing = source.missing_files() if isinstance(source, FileSource) else []
        if missing:
            errors = [error for error in errors if not any(str(file) in error for file in missing)]
            errors.append(f"{len(missing)} file(s) do not exist: {first_five(missing)}")
        return first_five(errors, "; ")


class PredictLoader(BatchLoader):
    """A loader that yields unreadable files too: their batches have `error` and no `image`."""

    yield_errors = True


class TrainLoader(BatchLoader):
    """A loader that can resume in the middle of an epoch.

    Lightning stores its state in checkpoints and restores it. The sampler skips the images that were trained on, so
    they are not decoded again.
    """

    epoch = 0
    batches = 0  # yielded in this epoch
    restored: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # as above
        if isinstance(
            self.sampler, EpochSampler
        ):  # not so with Lightning's overfit_batches, which replaces the sampler
            self.epoch, self.batches = self.sampler.epoch, self._batches_to_skip(self.sampler)
            self.sampler.skip = self.batches * cast(int, self.batch_size)
        for batch in super().__iter__():
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of batches yielded in it, and the numbers that determine its order."""
        return {"epoch": self.epoch, "batches": self.batches} | self._order

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Store a state; the next pass resumes from it if it is a pass of the same epoch."""
        self.restored = state

    @cached_property
    def _order(self) -> dict[str, int]:
        """Return the numbers that determine which images are in which batch of an epoch; see `ORDER`."""
        dataset = cast(SegmentationDataset, self.dataset)
        names = "\n".join(dataset.source.key(i) for i in range(len(dataset)))
        return {
            "batch_size": cast(int, self.batch_size),
            "processes": getattr(self.sampler, "num_replicas", 1),
            "images": len(dataset),
            "names": zlib.crc32(names.encode(errors="surrogateescape")),
            "seed": dataset.seed,
        }

    def _batches_to_skip(self, sampler: EpochSampler) -> int:
        """Return how many batches of this epoch were trained on before an interruption."""
        state, self.restored = self.restored, None
        if state is None or state["epoch"] != sampler.epoch or state["batches"] >= len(self):
            return 0
        different = [name for name, value in self._order.items() if state.get(name, value) != value]
        if different:
            before, now = (ORDER[different[0]].format(numbers[different[0]]) for numbers in (state, self._order))
            raise UserError(
                f"the checkpoint was saved in the middle of epoch {state['epoch'] + 1} with {before}; this run has "
                f"{now}, so it would leave out or repeat images of this epoch. Resume with the same images, batch "
                "size, processes and seed, or from a checkpoint saved at the end of an epoch"
            )
        return state["batches"]
