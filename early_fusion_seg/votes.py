"""Logits that are never there as a whole: the last states of the streams, and the classifiers that vote on them.

Each stream's 1x1 convolution gives votes for K classes. Those of the coarsest are upsampled to the next finer stream
and added to its votes, and so on; at the finest stream they are the logits. Losses and label maps want these upsampled
further, to the pixels, a few rows at a time; so a few rows are all that is made, in float32 whatever the states are.

Shapes: n images, K classes, stream i (n, W_i, h_i, w_i), h x w the finest, H x W pixels, R rows of a chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from early_fusion_seg.upsample import row_chunks, source_rows, uncut_rows, upsample_rows

Size = tuple[int, int]
Chunk = tuple[slice, int, int]
"""Which images, the first row and the row after the last."""


class LazyLogits(NamedTuple):
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

    def chunks(self, size: Size, learns: bool = False) -> Iterator[Chunk]:
        """Cut the logits, upsampled to `size`, into chunks; on the CPU smaller ones where each gets a gradient too."""
        return row_chunks(*self.shape[:2], size, share=2 if learns and self.states[0].device.type == "cpu" else 1)

    def upsampled(self, size: Size, chunk: Chunk) -> Tensor:
        """Return a chunk of the logits upsampled to `size` (H, W): (n, R, W, K) float32."""
        fine, first = self._uncut(self._part(size, chunk), size, chunk)
        return fine[:, first : first + chunk[2] - chunk[1]]

    def gradients(self, size: Size, of_chunk: Callable[[Tensor, Chunk], None]) -> list[Tensor]:
        """Sum the gradients of all tensors over the chunks, in float32.

        Args:
            size: (H, W).
            of_chunk: Writes the gradient of a chunk's upsampled logits, (n, R, W, K), over them.
        """
        totals = [torch.zeros_like(x, dtype=torch.float32) for x in self.tensors]
        leaves = self._replace(weights=_leaves(self.weights), biases=_leaves(self.biases))
        for chunk in self.chunks(size, learns=True):
            gradients = leaves._gradients_of(size, chunk, of_chunk)
            places = [*self._places(size, chunk), *([...] * (len(gradients) - len(self.states)))]
            for total, place, x in zip(totals, places, gradients, strict=True):
                total[place] += x
        return totals

    def _gradients_of(self, size: Size, chunk: Chunk, of_chunk: Callable[[Tensor, Chunk], None]) -> Sequence[Tensor]:
        """Return the gradients of what a chunk needs of all tensors, in float32; arguments as in `gradients`."""
        part = self._part(size, chunk)
        part = part._replace(states=_leaves(part.states))
        with torch.enable_grad():
            fine, first = self._uncut(part, size, chunk)
        gradient = fine.data  # of detach() autograd would see the writing, and copy `fine` to be a view anew
        if size == self.shape[2:]:
            gradient = gradient.clone()  # `fine` may be a view of a state, which must not be written over
        last = first + chunk[2] - chunk[1]
        of_chunk(gradient[:, first:last], chunk)
        gradient[:, :first], gradient[:, last:] = 0, 0
        return torch.autograd.grad(fine, part.tensors, gradient)

    def _spans(self, size: Size, chunk: Chunk) -> list[tuple[int, int]]:
        """Return which rows of each state a chunk needs."""
        h = self.shape[2]
        spans = [source_rows(h, h / size[0], *chunk[1:])]
        for state, (finer, coarser) in zip(self.states[1:], pairwise(self.ratios), strict=True):
            spans.append(source_rows(state.shape[2], finer / coarser, *spans[-1]))
        return spans

    def _places(self, size: Size, chunk: Chunk) -> list[Any]:
        """Return which part of each state a chunk needs, as an index."""
        return [(chunk[0], slice(None), slice(*span)) for span in self._spans(size, chunk)]

    def _part(self, size: Size, chunk: Chunk) -> "LazyLogits":
        """Return the votes with no more of the states than a chunk needs."""
        places = self._places(size, chunk)
        return self._replace(states=tuple(x[place] for x, place in zip(self.states, places, strict=True)))

    def _uncut(self, part: "LazyLogits", size: Size, chunk: Chunk) -> tuple[Tensor, int]:
        """Return what a chunk of the upsampled logits is cut out of, and where in it the first row is: `uncut_rows`.

        Args:
            part: The votes cut to what the chunk needs; `self` are the whole ones.
            size: (H, W).
            chunk: Which.
        """
        spans = self._spans(size, chunk)
        total: Tensor | None = None
        with torch.autocast(self.states[0].device.type, enabled=False):
            for i in reversed(range(len(self.states))):
                votes = part.states[i].movedim(1, -1).float()  # (n, r, w_i, W_i)
                if self.weights:  # upsampling changes no constant, so all biases are added at once
                    bias = torch.stack(part.biases).float().sum(0) if i == 0 else None
                    votes = F.linear(votes, part.weights[i].flatten(1).float(), bias)
                if total is not None:
                    h, w = self.states[i + 1].shape[2:]
                    step = self.ratios[i + 1] // self.ratios[i]
                    votes = votes + upsample_rows(total, h, (h * step, w * step), *spans[i])[:, :, : votes.shape[2]]
                total = votes
            assert total is not None
            return uncut_rows(total, self.shape[2], size, *chunk[1:])


def as_lazy_logits(logits: Tensor | LazyLogits) -> LazyLogits:
    """Take logits (n, K, h, w) as votes that are counted already."""
    return logits if isinstance(logits, LazyLogits) else LazyLogits((logits,))


def _leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().float().requires_grad_() for x in tensors)
