"""Class weights for the loss, and sampling of images with rare classes, both computed from class frequencies.

Class weights: median-frequency balancing (Eigen and Fergus, arXiv 1411.4734) and ENet's (arXiv 1606.02147). Sampling:
DAFormer's softmax of frequencies (arXiv 2111.14887); the minimum of 100 pixels per image is our own choice.

Shapes: N images, K classes; counts (N, K) are the numbers of pixels of each class in each image, without ignored
pixels.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from early_fusion_seg.errors import UserError

Counts = NDArray[np.int64]
Weighting = Literal["median", "inverse-log"]

TEMPERATURE = 0.01  # DAFormer's: a class that is rarer by 1 % of all pixels is drawn e times as often
MIN_PIXELS = 100  # of a class in an image drawn for it; fewer pixels may disappear when the image is reduced


def class_weights(counts: Counts, kind: Weighting) -> list[float]:
    """Compute K class weights with `median_frequency` or `inverse_log`.

    Args:
        counts: (N, K).
        kind: "median" or "inverse-log".

    Raises:
        UserError: No pixel is labeled, or the kind is unknown.
    """
    kinds = {"median": median_frequency, "inverse-log": inverse_log}
    if kind not in kinds:
        raise UserError(f"the kind of class weights is {kind!r}; expected one of {', '.join(kinds)}")
    _require_labels(counts)
    weights: list[float] = kinds[kind](counts).tolist()
    return weights


def median_frequency(counts: Counts) -> NDArray[np.float64]:
    """Compute median(f) / f_c, where f_c is the frequency of class c in the images that contain it.

    The median is over the classes that occur. A class that does not occur gets weight 1, the value without weighting.
    No training pixel uses this weight, but label smoothing and the validation loss need a finite number above 0.

    Args:
        counts: (N, K).

    Returns:
        (K,) weights.

    Example:
        >>> median_frequency(np.array([[6, 2], [4, 0]]))  # f is 10/12 and 2/8
        array([0.65      , 2.16666667])
    """
    pixels = counts.sum(0)
    image_pixels = counts.sum(1) @ (counts > 0)  # (K,) pixels of the images that contain the class
    occurs = pixels > 0
    frequency = pixels[occurs] / image_pixels[occurs]
    weights = np.ones(len(pixels))
    weights[occurs] = np.median(frequency) / frequency
    return weights


def inverse_log(counts: Counts) -> NDArray[np.float64]:
    """Compute 1 / ln(1.02 + p_c), where p_c is the fraction of class c in all pixels.

    The weights lie between 1.4 (p_c = 1) and 50.5 (p_c = 0).

    Args:
        counts: (N, K).

    Returns:
        (K,) weights.
    """
    weights: NDArray[np.float64] = 1 / np.log(1.02 + counts.sum(0) / counts.sum())
    return weights


def class_probabilities(counts: Counts) -> NDArray[np.float64]:
    """Compute the probability of drawing each class: proportional to exp((1 - p_c) / 0.01), and 0 for absent classes.

    p_c is the fraction of class c in all pixels. Classes of much less than 1 % are drawn about equally often, classes
    of several percent almost never. With probabilities proportional to 1 / p_c, a class of a few pixels in one image
    would take nearly all draws, and that image would be repeated again and again.

    Args:
        counts: (N, K).

    Returns:
        (K,) probabilities with sum 1.

    Raises:
        UserError: No pixel is labeled.
    """
    _require_labels(counts)
    share = counts.sum(0) / counts.sum()
    weights = np.exp(-share / TEMPERATURE) * (share > 0)
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


def draw_rare_classes(counts: Counts, share: float, seed: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    """Draw images with rare classes for some places in the order of an epoch.

    Args:
        counts: (N, K).
        share: Probability, 0..1, that a place gets an image drawn for a rare class.
        seed: Seed of the random numbers.

    Returns:
        Place in 0..N-1 -> (image, class). The image has at least 100 pixels of the class; if no image has as many, it
        is an image with the most.
    """
    chance, which, where = np.random.default_rng(seed).random((3, len(counts)))
    cumulated = np.cumsum(class_probabilities(counts))
    classes = np.searchsorted(cumulated / cumulated[-1], which, side="right")
    draws: dict[int, tuple[int, int]] = {}
    places = np.flatnonzero(chance < share)
    for label in np.unique(classes[places]).tolist():
        enough = min(MIN_PIXELS, int(counts[:, label].max()))
        candidates = np.flatnonzero(counts[:, label] >= enough)
        own = places[classes[places] == label]
        images = candidates[(where[own] * len(candidates)).astype(int)]
        draws |= {place: (image, label) for place, image in zip(own.tolist(), images.tolist(), strict=True)}
    return draws


def _require_labels(counts: Counts) -> None:
    if not counts.sum():
        raise UserError("no pixel of the training images has a class, so no class frequencies can be computed")
