"""LazyLogits: the last features of the streams and their 1x1 classifiers, from which rows of logits are computed.

The 1x1 classifier of a stream computes K values per pixel at the resolution of that stream. The result of the coarsest
stream is upsampled to the next finer stream and added to its result, and so on. The sum at the finest stream is the
logits. Losses and label maps need the logits upsampled further, to the label size. They compute them in chunks of rows,
in float32 for any dtype of the features, and never store all of them.

Shapes: n images, K classes, features of stream i (n, W_i, h_i, w_i), h x w the finest stream, H x W the label size,
R rows of a chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from early_fusion_seg.logits.row_upsample import row_chunks, source_rows, uncropped_rows, upsample_rows

Size = tuple[int, int]
Chunk = tuple[slice, int, int]
"""Slice of images, first row, row after the last: the part of upsampled logits that is computed at a time."""


class LazyLogits(NamedTuple):
    """Features and classifiers of all streams; or, without classifiers, one tensor of logits.

    Attributes:
        features: (n, W_i, h_i, w_i) of each stream, finest first.
        weights: (K, W_i, 1, 1) of each stream's classifier.
        biases: (K,) of each stream's classifier.
        ratios: Stride of each stream divided by the finest stride.
    """

    features: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] = ()
    biases: tuple[Tensor, ...] = ()
    ratios: tuple[int, ...] = (1,)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (n, K, h, w) of the logits."""
        n, channels, h, w = self.features[0].shape
        return n, len(self.weights[0]) if self.weights else channels, h, w

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors: features, weights, biases."""
        return *self.features, *self.weights, *self.biases

    def logits(self) -> Tensor:
        """Compute all logits, (n, K, h, w) float32."""
        n, _, h, w = self.shape
        return self.upsampled((h, w), (slice(0, n), 0, h)).movedim(-1, 1)

    def chunks(self, size: Size, with_gradient: bool = False) -> Iterator[Chunk]:
        """Yield the chunks of the logits at `size` (H, W); on the CPU, they are smaller if gradients are needed."""
        parts = 2 if with_gradient and self.features[0].device.type == "cpu" else 1
        return row_chunks(*self.shape[:2], size, parts)

    def upsampled(self, size: Size, chunk: Chunk) -> Tensor:
        """Compute one chunk of the logits upsampled to `size` (H, W): (n, R, W, K) float32, classes last."""
        rows, first = self._uncropped(self._needed_by(size, chunk), size, chunk)
        return rows[:, first : first + chunk[2] - chunk[1]]

    def gradients(self, size: Size, write_gradient: Callable[[Tensor, Chunk], None]) -> list[Tensor]:
        """Sum the gradients of all tensors over all chunks, in float32.

        Args:
            size: (H, W).
            write_gradient: Function that is called with the upsampled logits (n, R, W, K) of each chunk, and overwrites
                them with the gradient of the loss with respect to them.

        Returns:
            One gradient for each of `tensors`.
        """
        totals = [torch.zeros_like(x, dtype=torch.float32) for x in self.tensors]
        leaves = self._replace(weights=_leaves(self.weights), biases=_leaves(self.biases))
        for chunk in self.chunks(size, with_gradient=True):
            gradients = leaves._chunk_gradients(size, chunk, write_gradient)
            places = [*self._indices(size, chunk), *([...] * (len(gradients) - len(self.features)))]
            for total, place, gradient in zip(totals, places, gradients, strict=True):
                total[place] += gradient
        return totals

    def _chunk_gradients(
        self, size: Size, chunk: Chunk, write_gradient: Callable[[Tensor, Chunk], None]
    ) -> Sequence[Tensor]:
        """Compute the gradients of one chunk in float32; those of features only have the rows that the chunk needs."""
        part = self._needed_by(size, chunk)
        part = part._replace(features=_leaves(part.features))
        with torch.enable_grad():
            rows, first = self._uncropped(part, size, chunk)
        gradient = rows.data  # with detach(), autograd would see the in-place write and copy `rows`
        if size == self.shape[2:]:
            gradient = gradient.clone()  # `rows` may be a view of a feature map
        last = first + chunk[2] - chunk[1]
        write_gradient(gradient[:, first:last], chunk)
        gradient[:, :first], gradient[:, last:] = 0, 0
        return torch.autograd.grad(rows, part.tensors, gradient)

    def _spans(self, size: Size, chunk: Chunk) -> list[tuple[int, int]]:
        """Return, for each feature map, the range of rows from which a chunk is computed."""
        h = self.shape[2]
        spans = [source_rows(h, h / size[0], *chunk[1:])]
        for x, (finer, coarser) in zip(self.features[1:], pairwise(self.ratios), strict=True):
            spans.append(source_rows(x.shape[2], finer / coarser, *spans[-1]))
        return spans

    def _indices(self, size: Size, chunk: Chunk) -> list[Any]:
        """Return, for each feature map, the index of the part from which a chunk is computed."""
        return [(chunk[0], slice(None), slice(*span)) for span in self._spans(size, chunk)]

    def _needed_by(self, size: Size, chunk: Chunk) -> "LazyLogits":
        """Return lazy logits with the features cropped to the part from which a chunk is computed."""
        indices = self._indices(size, chunk)
        return self._replace(features=tuple(x[index] for x, index in zip(self.features, indices, strict=True)))

    def _uncropped(self, part: "LazyLogits", size: Size, chunk: Chunk) -> tuple[Tensor, int]:
        """Compute rows of upsampled logits that include a chunk, and the position of its first row.

        Args:
            part: `self._needed_by(size, chunk)`, with the same values; its tensors may be leaves that need gradients.
            size: (H, W).
            chunk: The chunk.
        """
        spans = self._spans(size, chunk)
        total: Tensor | None = None
        with torch.autocast(self.features[0].device.type, enabled=False):
            for i in reversed(range(len(self.features))):
                x = part.features[i].movedim(1, -1).float()  # (n, r, w_i, W_i)
                if self.weights:  # upsampling preserves constants, so the sum of all biases is added once
                    bias = torch.stack(part.biases).float().sum(0) if i == 0 else None
                    x = F.linear(x, part.weights[i].flatten(1).float(), bias)  # (n, r, w_i, K)
                if total is not None:
                    h, w = self.features[i + 1].shape[2:]
                    ratio = self.ratios[i + 1] // self.ratios[i]
                    x = x + upsample_rows(total, h, (h * ratio, w * ratio), *spans[i])[:, :, : x.shape[2]]
                total = x
            assert total is not None
            return uncropped_rows(total, self.shape[2], size, *chunk[1:])


def as_lazy_logits(logits: Tensor | LazyLogits) -> LazyLogits:
    """Wrap computed logits (n, K, h, w); return lazy logits unchanged."""
    return logits if isinstance(logits, LazyLogits) else LazyLogits((logits,))


def _leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().float().requires_grad_() for x in tensors)
