"""What follows from how often the classes occur: their weights in the loss, and which images show the rare ones.

Weights: median-frequency balancing (Eigen and Fergus, arXiv 1411.4734) and ENet's (arXiv 1606.02147). Which class is
drawn: DAFormer's softmax of frequencies (arXiv 2111.14887). That an image must hold 100 pixels of it is our own choice.

Shapes: N images, K classes; counts (N, K) are the pixels of each class in each image. Ignored pixels count nowhere.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from early_fusion_seg.errors import UserError

Counts = NDArray[np.int64]
Weighting = Literal["median", "inverse-log"]

TEMPERATURE = 0.01  # DAFormer's: a class that is rarer by 1 % of all pixels is drawn e times as often
MIN_PIXELS = 100  # of a class in an image that is drawn for it; fewer may vanish when the image is shrunk


def weights_of(counts: Counts, kind: Weighting) -> list[float]:
    """Return K class weights, by `median_frequency` or `inverse_log`.

    Raises:
        UserError: No pixel is labeled, or there is no such kind.
    """
    kinds = {"median": median_frequency, "inverse-log": inverse_log}
    if kind not in kinds:
        raise UserError(f"the kind of class weights is {kind!r}; expected one of {', '.join(kinds)}")
    if not counts.sum():
        raise UserError("no pixel of the training images has a class, so no class weights follow from them")
    weights: list[float] = kinds[kind](counts).tolist()
    return weights


def median_frequency(counts: Counts) -> NDArray[np.float64]:
    """Compute median(f) / f_c, where f_c is the share of class c in the images that hold it.

    The median is over the classes that occur. A class that does not gets 1, as without weights: no pixel is weighted
    with it, but label smoothing and the validation loss need a number that is neither infinite nor 0.

    Args:
        counts: (N, K).

    Returns:
        (K,) weights.

    Example:
        >>> median_frequency(np.array([[6, 2], [4, 0]]))  # f is 10/12 and 2/8
        array([0.65      , 2.16666667])
    """
    pixels = counts.sum(0)
    around = counts.sum(1) @ (counts > 0)  # (K,) pixels of the images that hold the class
    occurs = pixels > 0
    frequency = pixels[occurs] / around[occurs]
    weights = np.ones(len(pixels))
    weights[occurs] = np.median(frequency) / frequency
    return weights


def inverse_log(counts: Counts) -> NDArray[np.float64]:
    """Compute 1 / ln(1.02 + p_c), where p_c is the share of class c in all pixels: from 1.4 up to 50.5 where it is 0.

    Args:
        counts: (N, K).

    Returns:
        (K,) weights.
    """
    weights: NDArray[np.float64] = 1 / np.log(1.02 + counts.sum(0) / counts.sum())
    return weights


def class_probabilities(counts: Counts) -> NDArray[np.float64]:
    """Compute how probably each class is drawn: proportional to exp((1 - p_c) / 0.01) where it occurs.

    With the inverse of p_c, a class of a few pixels in one image would take nearly all draws, and that image with it;
    here classes of much less than 1 % are drawn alike, and those of several per cent hardly ever.

    Args:
        counts: (N, K).

    Returns:
        (K,) probabilities with sum 1.
    """
    share = counts.sum(0) / counts.sum()
    weights = np.exp(-share / TEMPERATURE) * (share > 0)
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


def rare_draws(counts: Counts, share: float, seed: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    """Draw images that hold rare classes for some places in an epoch's order.

    Args:
        counts: (N, K).
        share: How probably a place is drawn for, 0..1.
        seed: On which, with the counts, all of it depends.

    Returns:
        Place in 0..N-1 -> (image, class); the image holds at least 100 pixels of the class where any does.
    """
    chance, which, where = np.random.default_rng(seed).random((3, len(counts)))
    cumulated = np.cumsum(class_probabilities(counts))
    classes = np.searchsorted(cumulated / cumulated[-1], which, side="right")
    draws: dict[int, tuple[int, int]] = {}
    places = np.flatnonzero(chance < share)
    for label in np.unique(classes[places]).tolist():
        enough = min(MIN_PIXELS, int(counts[:, label].max()))
        holders = np.flatnonzero(counts[:, label] >= enough)
        own = places[classes[places] == label]
        images = holders[(where[own] * len(holders)).astype(int)]
        draws |= {place: (image, label) for place, image in zip(own.tolist(), images.tolist(), strict=True)}
    return draws
