import math

import numpy as np
import pytest
import torch

from early_fusion_seg.data.frequencies import (
    MIN_PIXELS,
    class_probabilities,
    class_weights,
    draw_rare_classes,
    inverse_log,
    median_frequency,
)
from early_fusion_seg.errors import UserError


def test_median_frequency_by_hand() -> None:
    counts = np.array([[6, 2, 0, 0], [4, 0, 0, 1], [0, 0, 0, 5]])
    # frequencies in the images that contain the class: 10/13, 2/8, none, 6/10; their median is 6/10
    np.testing.assert_allclose(median_frequency(counts), [0.6 * 13 / 10, 0.6 * 8 / 2, 1.0, 1.0])
    np.testing.assert_allclose(median_frequency(np.array([[7]])), [1.0])


def test_inverse_log_by_hand() -> None:
    weights = inverse_log(np.array([[1, 0, 0], [0, 3, 0]]))
    assert weights == pytest.approx([1 / math.log(1.27), 1 / math.log(1.77), 1 / math.log(1.02)])
    assert weights[2] == pytest.approx(50.498, abs=1e-3)
    assert inverse_log(np.array([[9]])) == pytest.approx([1.4222], abs=1e-4)


def test_class_weights_are_floats_of_the_given_kind() -> None:
    counts = np.array([[6, 2], [4, 0]])
    assert class_weights(counts, "median") == pytest.approx([0.65, 13 / 6])
    assert class_weights(counts, "inverse-log") == pytest.approx(
        [1 / math.log(1.02 + 10 / 12), 1 / math.log(1.02 + 1 / 6)]
    )
    assert all(type(weight) is float for weight in class_weights(counts, "median"))
    with pytest.raises(UserError, match="the kind of class weights is 'mean'; expected one of median, inverse-log"):
        class_weights(counts, "mean")
    with pytest.raises(UserError, match="no pixel of the training images has a class"):
        class_weights(np.zeros((3, 2), np.int64), "median")


def test_rarer_classes_are_drawn_more_often() -> None:
    counts = np.array([[7000, 2700, 100, 150, 0], [0, 0, 50, 0, 0]])
    share = torch.tensor([0.70, 0.27, 0.015, 0.015], dtype=torch.float64)
    expected = [*torch.softmax((1 - share) / 0.01, 0).tolist(), 0.0]  # DAFormer's formula
    assert class_probabilities(counts) == pytest.approx(expected)
    assert class_probabilities(np.array([[5, 0]])).tolist() == [1.0, 0.0]
    one_pixel = class_probabilities(np.array([[10**9, 10**6, 1]]))
    assert one_pixel[2] < 0.53  # a class of a single pixel does not take all draws


def test_draws_have_the_given_share_and_contain_their_class() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3 * MIN_PIXELS, (2000, 4)) * (rng.random((2000, 4)) < 0.3)
    counts[:, 0] = 100 * counts.sum(1)
    counts[:, 3] = 0
    counts[77, 3], counts[88, 3] = 9, 7  # fewer pixels than MIN_PIXELS: the image with the most is drawn
    assert draw_rare_classes(counts, 0.0, (0,)) == {}
    assert len(draw_rare_classes(counts, 1.0, (0,))) == 2000
    draws = draw_rare_classes(counts, 0.4, (3, 1))
    assert 700 < len(draws) < 900
    assert set(draws) <= set(range(2000))
    for image, label in draws.values():
        assert counts[image, label] >= MIN_PIXELS or (image, label) == (77, 3)
    drawn = np.bincount([label for _, label in draws.values()], minlength=4) / len(draws)
    np.testing.assert_allclose(drawn, class_probabilities(counts), atol=0.06)
    candidates = np.flatnonzero(counts[:, 1] >= MIN_PIXELS)
    images = {image for image, label in draws.values() if label == 1}
    assert len(images) > 0.3 * len(candidates)  # spread over the images that contain it
    assert min(images) < 200
    assert max(images) > 1800


def test_draws_depend_only_on_the_seed() -> None:
    counts = np.full((50, 3), MIN_PIXELS)
    assert draw_rare_classes(counts, 0.5, (3, 1)) == draw_rare_classes(counts, 0.5, (3, 1))
    assert draw_rare_classes(counts, 0.5, (3, 1)) != draw_rare_classes(counts, 0.5, (3, 2))
    assert draw_rare_classes(counts, 0.5, (3, 1)) != draw_rare_classes(counts, 0.5, (4, 1))
