"""Samplers and loaders: who reads which images, in which order, and from where after an interruption.

The order of the training images depends on (seed, epoch) alone; a sample's augmentation on (seed, epoch, position). So
any number of processes and workers, and a run that was interrupted, see what one uninterrupted process sees. Images
drawn for rare classes take places in that common order, before it is shared.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from early_fusion_seg.data.dataset import Sample
from early_fusion_seg.errors import UserError


class EpochSampler(DistributedSampler[tuple[int, ...]]):
    """Yield this process's share of (epoch, position) in an order that depends on seed and epoch alone.

    Where an image was drawn for a rare class, it is (epoch, position, class, place in the order), see `rare_draws`.

    Lightning sets the epoch before each one. A plain loop over the loader does not, so each pass starts the next epoch.

    Attributes:
        skip: Positions that the next pass leaves out at its start, because they were trained on before an interruption.
        rare: Epoch -> (place in the order of all processes -> (position, class)) for the places of rare classes.
    """

    skip: int = 0
    rare: Callable[[int], dict[int, tuple[int, int]]] | None = None

    def __iter__(self) -> Iterator[Any]:
        epoch, skip = self.epoch, self.skip
        draws = {} if self.rare is None else self.rare(epoch)
        indices: list[tuple[int, ...]] = []
        for i, position in enumerate(super().__iter__()):
            place = (self.rank + i * self.num_replicas) % len(cast(Any, self.dataset))  # the first ones fill up the end
            indices.append((epoch, *draws[place], place) if place in draws else (epoch, cast(int, position)))
        self.set_epoch(epoch + 1)
        self.skip = 0
        return iter(indices[skip:])


class UnpaddedDistributedSampler(DistributedSampler[int]):
    """Yield every position exactly once over all processes: no repeats to make the shares equal, and empty shares."""

    def __init__(self, dataset: Dataset[Any], world: int, rank: int) -> None:
        super().__init__(dataset, world, rank, shuffle=False)
        self.positions = range(rank, len(cast(Any, dataset)), world)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.positions)

    def __len__(self) -> int:
        return len(self.positions)


class BatchLoader(DataLoader[Sample]):
    """A DataLoader that raises a user's error in the main process, and gives an empty share one batch of no images.

    PyTorch carries an exception out of a worker as a traceback in a string; a sample with `error` keeps the sentence.
    A process without images must still take part in what the processes do together at the end: its only batch has no
    `image` and an empty `key`.
    """

    errors_pass = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator serves every use of the iterator
        if super().__len__() == 0:
            yield {"key": []}
        for batch in super().__iter__():
            if "error" in batch and not self.errors_pass:
                raise UserError("; ".join(batch["error"]))
            yield batch

    def __len__(self) -> int:
        return max(1, super().__len__())


class PredictLoader(BatchLoader):
    """A loader that lets unreadable files pass: their batches have `error` and no `image`."""

    errors_pass = True


class TrainLoader(BatchLoader):
    """A loader that goes on in the middle of an epoch: Lightning saves its state in checkpoints and restores it.

    What was trained on is left out by the sampler, so nothing is decoded to be thrown away.
    """

    epoch = 0
    batches = 0  # given in this epoch
    restored: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # as above
        if isinstance(self.sampler, EpochSampler):  # Lightning puts another in its place to overfit a few batches
            self.epoch, self.batches = self.sampler.epoch, self._batches_before(self.sampler)
            self.sampler.skip = self.batches * cast(int, self.batch_size)
        for batch in super().__iter__():
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how far this epoch is, and what a batch was."""
        return {"epoch": self.epoch, "batches": self.batches} | self._sizes()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there at the next pass, if that is still the same epoch."""
        self.restored = state

    def _sizes(self) -> dict[str, int]:
        return {"batch_size": cast(int, self.batch_size), "processes": getattr(self.sampler, "num_replicas", 1)}

    def _batches_before(self, sampler: EpochSampler) -> int:
        """Return how many batches of this epoch were trained on before an interruption."""
        state, self.restored = self.restored, None
        if state is None or state["epoch"] != sampler.epoch or state["batches"] >= len(self):
            return 0
        here = self._sizes()
        if any(state[name] != value for name, value in here.items()):
            raise UserError(
                f"the checkpoint was written in the middle of epoch {state['epoch'] + 1} by {state['processes']} "
                f"process(es) with batches of {state['batch_size']}, now it is {here['processes']} with batches of "
                f"{here['batch_size']}; go on with the same numbers, or from a checkpoint of an epoch's end"
            )
        return state["batches"]
