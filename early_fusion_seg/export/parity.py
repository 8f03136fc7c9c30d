"""Parity: an exported file against the model it was made of, on images of many sizes.

Two programs that add the same numbers in another order differ in the last digits. So labels must be equal only where
the two highest logits of a pixel differ by more than `MARGIN`; the share of other pixels that differ is reported.

Shapes: n images of h x w pixels, K classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from early_fusion_seg.data.synthetic.street import scene
from early_fusion_seg.inference import Predictor

Run = Callable[[Tensor], Sequence[Tensor]]
"""Runs an exported file: images (n, 3, h, w) uint8 -> labels (n, h, w) uint8 and, if it has them, probabilities."""
MARGIN = 1e-3
"""Difference of the two highest logits above which labels must be equal."""
LARGEST_DIFFERENCE = 1e-3
"""Of two probabilities."""
SIZES = (
    (1, 1, 1), (1, 5, 33), (2, 17, 31), (1, 32, 32), (3, 33, 64), (1, 64, 97), (1, 127, 129), (3, 96, 160),
    (1, 225, 301), (1, 360, 480), (1, 257, 130), (1, 67, 2051),
)  # fmt: skip
"""Number, height and width: odd, below the coarsest stride, above 2,000 pixels, several images."""


class Comparison(NamedTuple):
    """The file against the model on one batch.

    Attributes:
        shape: Number, height and width of the images.
        pixels: Pixels compared.
        wrong: Pixels with other labels although the margin is above `MARGIN`.
        undecided: Pixels with other labels and a smaller margin.
        difference: The largest difference of probabilities; None if the file has none.
    """

    shape: tuple[int, int, int]
    pixels: int
    wrong: int
    undecided: int
    difference: float | None

    @property
    def equal(self) -> bool:
        """Whether the file is equal to the model where it must be."""
        return not self.wrong and (self.difference or 0.0) <= LARGEST_DIFFERENCE


def sample_images(sizes: Iterable[tuple[int, int, int]]) -> Iterator[Tensor]:
    """Yield batches (n, 3, h, w) uint8 of synthetic street scenes with noise."""
    generator = torch.Generator().manual_seed(0)
    for n, h, w in sizes:
        images = torch.stack([torch.from_numpy(scene(i, h, w)[0]).permute(2, 0, 1) for i in range(n)])
        noise = torch.randint(-8, 9, images.shape, generator=generator)
        yield (images + noise).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def compare(predictor: Predictor, run: Run, images: Tensor) -> Comparison:
    """Compare an exported file with the predictor of its model.

    Args:
        predictor: Passes whole images once.
        run: Runs the file.
        images: (n, 3, h, w) uint8.
    """
    labels, *probabilities = run(images)
    wrong = undecided = 0
    difference = 0.0 if probabilities else None
    for place, scores, _ in predictor.rectangles(images):
        best = scores.topk(min(2, scores.shape[-1])).values
        clear = best[..., 0] - best[..., -1] > MARGIN
        differs = labels[place] != scores.argmax(-1)
        wrong += int((differs & clear).sum())
        undecided += int((differs & ~clear).sum())
        if difference is not None:
            theirs = probabilities[0][place[0], :, place[1], place[2]].movedim(1, -1)
            ours = (scores / predictor.temperatures[0]).softmax(-1)
            difference = max(difference, float((theirs - ours).abs().max()))
    n, _, h, w = images.shape
    return Comparison((n, h, w), labels.numel(), wrong, undecided, difference)
