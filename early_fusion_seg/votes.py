"""Logits that are never there as a whole: the last states of the streams, and the classifiers that vote on them.

The logits at the finest stream's stride are the sum of every stream's 1x1 convolution to K classes, upsampled. Losses
and label maps want them upsampled further, to the pixels, a few rows at a time; so a few rows are all that is made, in
float32 whatever the states are.

Shapes: n images, K classes, stream i (n, W_i, h_i, w_i), h x w the finest, H x W pixels, R rows of a chunk.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from early_fusion_seg.upsample import row_chunks, source_rows, upsample_rows

Size = tuple[int, int]
Chunk = tuple[slice, int, int]
"""Which images, the first row and the row after the last."""


class Votes(NamedTuple):
    """States of streams and their classifiers, or, without classifiers, logits that are there already.

    Attributes:
        states: (n, W_i, h_i, w_i) of each stream, finest first.
        weights: (K, W_i, 1, 1) of each stream.
        biases: (K,) of each stream.
        ratios: Stride of each stream over the finest one.
    """

    states: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] = ()
    biases: tuple[Tensor, ...] = ()
    ratios: tuple[int, ...] = (1,)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (n, K, h, w) of the logits."""
        n, channels, h, w = self.states[0].shape
        return n, len(self.weights[0]) if self.weights else channels, h, w

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors: states, weights, biases."""
        return *self.states, *self.weights, *self.biases

    def logits(self) -> Tensor:
        """Return all logits, (n, K, h, w) float32."""
        n, _, h, w = self.shape
        return self.upsampled((h, w), (slice(0, n), 0, h)).movedim(-1, 1)

    def chunks(self, size: Size) -> Iterator[Chunk]:
        """Cut the logits, upsampled to `size`, into chunks."""
        return row_chunks(*self.shape[:2], size)

    def upsampled(self, size: Size, chunk: Chunk, part: "Votes | None" = None) -> Tensor:
        """Return a chunk of the logits upsampled to `size`, (n, R, W, K) float32.

        Args:
            size: (H, W).
            chunk: Which.
            part: The votes cut to the chunk, if that is done already.
        """
        slabs, weights, biases, _ = part or self._part(size, chunk)
        h, w = self.shape[2:]
        first, last = self._rows(size, chunk)
        total: Tensor | None = None
        with torch.autocast(slabs[0].device.type, enabled=False):
            for i, (slab, whole, ratio) in enumerate(zip(slabs, self.states, self.ratios, strict=True)):
                votes = slab.movedim(1, -1).float()  # (n, r, w_i, W_i)
                if weights:
                    votes = F.linear(votes, weights[i].flatten(1).float(), biases[i].float())
                full = (whole.shape[2] * ratio, whole.shape[3] * ratio)
                votes = upsample_rows(votes, whole.shape[2], full, first, last)[:, :, :w]
                total = votes if total is None else total + votes
            assert total is not None
            return upsample_rows(total, h, size, *chunk[1:])

    def gradients(self, size: Size, of_chunk: Callable[[Tensor, Chunk], Tensor]) -> list[Tensor]:
        """Sum the gradients of all tensors over the chunks, in float32.

        Args:
            size: (H, W).
            of_chunk: Maps the upsampled logits of a chunk, (n, R, W, K), to their gradient.
        """
        totals = [torch.zeros_like(x, dtype=torch.float32) for x in self.tensors]
        for chunk in self.chunks(size):
            cut = self._part(size, chunk)
            states, weights, biases = (_leaves(xs) for xs in (cut.states, cut.weights, cut.biases))
            part = Votes(states, weights, biases, self.ratios)
            with torch.enable_grad():
                rows = self.upsampled(size, chunk, part)
            gradients = torch.autograd.grad(rows, part.tensors, of_chunk(rows.detach(), chunk))
            places = [*self._places(size, chunk), *([...] * (len(gradients) - len(self.states)))]
            for total, place, gradient in zip(totals, places, gradients, strict=True):
                total[place] += gradient
        return totals

    def _rows(self, size: Size, chunk: Chunk) -> tuple[int, int]:
        """Return which of the h rows of the logits a chunk needs."""
        h = self.shape[2]
        return source_rows(h, h / size[0], *chunk[1:])

    def _places(self, size: Size, chunk: Chunk) -> list[Any]:
        """Return which part of each state a chunk needs, as an index."""
        rows = self._rows(size, chunk)
        spans = [source_rows(x.shape[2], 1 / r, *rows) for x, r in zip(self.states, self.ratios, strict=True)]
        return [(chunk[0], slice(None), slice(a, b)) for a, b in spans]

    def _part(self, size: Size, chunk: Chunk) -> "Votes":
        """Return the votes with no more of the states than a chunk needs."""
        places = self._places(size, chunk)
        return self._replace(states=tuple(x[place] for x, place in zip(self.states, places, strict=True)))


def as_votes(logits: Tensor | Votes) -> Votes:
    """Take logits (n, K, h, w) as votes that are counted already."""
    return logits if isinstance(logits, Votes) else Votes((logits,))


def _leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in tensors)
