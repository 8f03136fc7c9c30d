"""Predictor against PyTorch's plain computation on whole logits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from early_fusion_seg import InferenceSettings
from early_fusion_seg.errors import UserError
from early_fusion_seg.inference import InputSize, Predictor
from early_fusion_seg.inference.predictor import axes, resized, weights
from early_fusion_seg.logits import LazyLogits

K = 5


class Toy(nn.Module):
    """A network of stride 4 whose logits at a pixel depend on the pixels at most 10 away."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, K, 3, padding=1, padding_mode="replicate")
        )

    def forward(self, images: torch.Tensor) -> LazyLogits:
        h, w = images.shape[-2:]
        pixels = images / 255 if images.dtype == torch.uint8 else images
        return LazyLogits((5 * self.layers(F.pad(pixels, (0, -w % 4, 0, -h % 4), mode="replicate")),))


def plain(network, images, passes, temperature=1.0):
    """Average the probabilities of whole upsampled logits."""
    total = 0
    for factor, flip in passes:
        size = images.shape[-2:]
        given = images.float()
        if factor != 1:
            new = [round(side * factor) for side in size]
            given = F.interpolate(given, new, mode="bilinear", antialias=factor < 0.5).round()
        given = given.to(torch.uint8)
        logits = network(given.flip(-1) if flip else given).logits()
        probabilities = (F.interpolate(logits, size, mode="bilinear") / temperature).softmax(1)
        total = total + (probabilities.flip(-1) if flip else probabilities)
    return total / len(passes)


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 45, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def predictor(stride=4, temperature=1.0, **settings):
    return Predictor(Toy(), InferenceSettings(**settings), stride, temperature)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, [(1.0, False)]),
        ({"scale": 0.5}, [(0.5, False)]),
        ({"scale": 0.3}, [(0.3, False)]),
        ({"short_side": 90}, [(2.0, False)]),
        ({"flip": True}, [(1.0, False), (1.0, True)]),
        ({"scales": (0.75, 1.5)}, [(0.75, False), (1.5, False)]),
        ({"scale": 0.5, "scales": (1.0, 2.0), "flip": True}, [(f, flip) for f in (0.5, 1.0) for flip in (False, True)]),
    ],
)
def test_the_probabilities_are_the_mean_over_the_passes(settings, passes, images):
    segment = predictor(**settings)
    with torch.no_grad():
        expected = plain(segment.forward, images, passes)
    labels, confidence = segment.labels_and_confidence(images)
    assert torch.equal(labels, expected.argmax(1).to(torch.uint8))
    assert torch.equal(labels, segment.labels(images))
    assert torch.allclose(segment.probabilities(images).float(), expected, atol=1e-3)
    assert torch.allclose(confidence.float(), 255 * expected.amax(1), atol=0.51)


def test_the_temperature_divides_the_logits(images):
    segment = predictor(temperature=3.0)
    with torch.no_grad():
        expected = plain(segment.forward, images, [(1.0, False)], temperature=3.0)
    assert torch.allclose(segment.probabilities(images).float(), expected, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("size", [(48, 72), (64, 128), (32, 32), (200, 40)])  # logits of odd sizes are stretched
def test_windows_equal_the_whole_image_where_the_network_sees_less_than_a_quarter_of_the_overlap(size, scale):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = F.avg_pool2d(images.float(), 3, 1, 1).round().to(torch.uint8)
    whole = predictor(window=None, scale=scale)
    parts = predictor(window=(96, 104), overlap=48, scale=scale)
    assert torch.allclose(parts.probabilities(images).float(), whole.probabilities(images).float(), atol=2e-3)
    assert (parts.labels(images) == whole.labels(images)).float().mean() > 0.9999


def test_windows_show_where_the_network_sees_more_than_the_overlap():
    images = torch.randint(0, 256, (1, 3, 64, 129), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, parts = (predictor(window=window, overlap=0) for window in (None, 32))
    assert not torch.allclose(parts.probabilities(images).float(), whole.probabilities(images).float(), atol=2e-3)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100, 257])
@pytest.mark.parametrize("side", [32, 64, 90])
@pytest.mark.parametrize("overlap", [0, 10, 16, 32])
@pytest.mark.parametrize("factor", [1.0, 0.5, 0.37, 1.7])
def test_the_weights_of_the_windows_sum_to_1(length, side, overlap, factor):
    if overlap > side // 2:
        return
    total = torch.zeros(length)
    windows = axes(length, side, overlap, factor, 8)
    for window in windows:
        assert window.before + window.after <= window.stop - window.start
        total[window.start : window.stop] += weights(window, "cpu")
    assert torch.allclose(total, torch.ones(length))
    assert max(round((w.stop - w.start) * factor) for w in windows) <= -(-side // 8) * 8 + 2


def test_every_pixel_is_in_one_rectangle(images):
    count = torch.zeros(2, 45, 70)
    for place, scores in predictor(window=32, overlap=16).rectangles(images):
        count[place] += 1
        assert scores.shape == (*count[place].shape, K)
    assert (count == 1).all()


def test_float_images_stay_floats(images):
    floats = images / 255
    assert resized(floats, 0.5).dtype == torch.float32
    assert torch.allclose(255 * resized(floats, 0.5), resized(images, 0.5).float(), atol=0.501)


def test_large_images_pass_in_windows_of_bounded_size():
    auto = InferenceSettings()
    assert auto.windows((2048, 2048)) is None
    assert auto.windows((2048, 2049)) == (1024, 1024)
    assert replace(auto, scale=0.5).windows((4096, 4096)) is None
    assert replace(auto, window=None).windows((20000, 15000)) is None


def test_the_input_size_is_that_of_training_unless_another_is_given():
    settings = InferenceSettings(flip=True)
    assert settings.at_size(InputSize(0.5)) == replace(settings, scale=0.5)
    assert settings.at_size(InputSize(0.5, 100)) == replace(settings, short_side=100)
    for given in ({"scale": 2.0}, {"short_side": 7}):
        assert InferenceSettings(**given).at_size(InputSize(0.5, 100)) == InferenceSettings(**given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, "inference.scale is 0.0; expected numbers above 0"),
        ({"scales": ()}, "inference.scales"),
        ({"scales": (1.0, -1.0)}, "inference.scales"),
        ({"short_side": 0}, "inference.short_side"),
        ({"window": 0}, "inference.window"),
        ({"window": (64, 0)}, "inference.window"),
        ({"overlap": -1}, "inference.overlap is -1; expected 0 to half"),
        ({"window": 64, "overlap": 33}, "inference.overlap is 33; expected 0 to half"),
        ({"scale": 1.0, "short_side": 9}, "exclude each other"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        InferenceSettings(**settings)
