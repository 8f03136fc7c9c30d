"""Predictor against PyTorch's plain computation on whole logits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from early_fusion_seg import InferenceSettings
from early_fusion_seg.errors import UserError
from early_fusion_seg.inference import InputSize, Predictor
from early_fusion_seg.inference.predictor import resized
from early_fusion_seg.inference.windows import axes, weights
from early_fusion_seg.logits import LazyLogits

K = 5


class Toy(nn.Module):
    """A network of stride 4 whose logits at a pixel depend on the pixels at most 10 away."""

    def __init__(self, seed: int = 0, classes: int = K) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, classes, 3, padding=1, padding_mode="replicate")
        )

    def forward(self, images: torch.Tensor) -> LazyLogits:
        h, w = images.shape[-2:]
        pixels = images / 255 if images.dtype == torch.uint8 else images
        return LazyLogits((5 * self.layers(F.pad(pixels, (0, -w % 4, 0, -h % 4), mode="replicate")),))


def plain(network, images, passes, temperature=1.0):
    """Average the probabilities of whole upsampled logits of a network."""
    total = 0
    for factor, flip in passes:
        size = images.shape[-2:]
        given = images
        if factor != 1:
            new = [round(side * factor) for side in size]
            given = F.interpolate(images / 255, new, mode="bilinear", antialias=factor < 0.5).clamp(0, 1)
        logits = network(given.flip(-1) if flip else given).logits()
        probabilities = (F.interpolate(logits, size, mode="bilinear") / temperature).softmax(1)
        total = total + (probabilities.flip(-1) if flip else probabilities)
    return total / len(passes)


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 45, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def predictor(stride=4, temperature=1.0, **settings):
    network = Toy()
    return Predictor(lambda images: [network(images)], InferenceSettings(**settings), stride, [temperature])


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
        expected = plain(Toy(), images, passes)
    ((labels, confidence, _),) = segment.predictions(images, confidence=True)
    assert torch.equal(labels, expected.argmax(1).to(torch.uint8))
    assert torch.equal(labels, segment.labels(images))
    assert torch.allclose(segment.probabilities(images).float(), expected, atol=1e-3)
    assert torch.allclose(confidence.float(), 255 * expected.amax(1), atol=0.51)


def test_confidence_changes_no_label_of_nearly_equal_classes():
    """Softmax rounds logits that differ in their last bits to equal probabilities."""
    logits = torch.randn(1, 19, 300, 300, generator=torch.Generator().manual_seed(0)) * 1e-6
    assert (logits.softmax(1).argmax(1) != logits.argmax(1)).any()
    lazy = LazyLogits((logits,))
    segment = Predictor(lambda images: [lazy], InferenceSettings(), 2)
    images = torch.zeros(1, 3, 300, 300, dtype=torch.uint8)
    assert torch.equal(segment.predictions(images, confidence=True)[0].labels[0], logits[0].argmax(0).to(torch.uint8))


def test_the_temperature_divides_the_logits(images):
    segment = predictor(temperature=3.0)
    with torch.no_grad():
        expected = plain(Toy(), images, [(1.0, False)], temperature=3.0)
    assert torch.allclose(segment.probabilities(images).float(), expected, atol=1e-3)


def test_labels_are_those_of_the_logits_where_probabilities_are_rounded_to_the_same_number(images):
    network = Toy()
    segment = Predictor(lambda x: [LazyLogits((1e-8 * network(x).features[0],))], InferenceSettings(), 4)
    assert (segment.probabilities(images) == segment.probabilities(images)[:, :1]).all()
    labels = segment.predictions(images, confidence=True)[0].labels
    assert len(labels.unique()) > 1
    assert torch.equal(labels, segment.labels(images))


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
    for place, scores, head in predictor(window=32, overlap=16).rectangles(images):
        count[place] += 1
        assert (head, scores.shape) == (0, (*count[place].shape, K))
    assert (count == 1).all()


HEADS = [{}, {"flip": True, "scales": (0.5, 1.0)}, {"window": 32, "overlap": 16}, {"window": 48, "flip": True}]


@pytest.mark.parametrize("settings", HEADS)
def test_several_heads_give_the_same_bits_as_each_alone_and_get_every_image_once(settings, images):
    networks, temperatures = [Toy(), Toy(1, classes=3), Toy(2)], [1.0, 2.0, 0.5]
    given, options = [], (InferenceSettings(**{"overlap": 0} | settings), 4)

    def forward(x):
        given.append(x)
        return [network(x) for network in networks]

    found = Predictor(forward, *options, temperatures).predictions(images, confidence=True, probabilities=True)
    passes = len(given)
    assert [x.probabilities.shape[1] for x in found] == [K, 3, K]
    for prediction, network, temperature in zip(found, networks, temperatures, strict=True):
        calls = len(given)
        alone = Predictor(lambda x, n=network: [given.append(x), n(x)][1:], *options, [temperature])
        assert torch.equal(prediction.probabilities, alone.probabilities(images))
        assert len(given) - calls == passes
        ((labels, confidence, _),) = alone.predictions(images, confidence=True)
        assert torch.equal(prediction.labels, labels)
        assert torch.equal(prediction.confidence, confidence)


@pytest.mark.parametrize("settings", HEADS)
def test_an_ensemble_is_the_mean_of_the_probabilities_of_its_heads(settings, images):
    networks, temperatures = [Toy(), Toy(1), Toy(2)], [1.0, 2.0, 0.5]
    options = (InferenceSettings(**{"overlap": 0} | settings), 4)
    alone = [
        Predictor(lambda x, n=n: [n(x)], *options, [t]).probabilities(images).float()
        for n, t in zip(networks, temperatures, strict=True)
    ]
    ensemble = Predictor(lambda x: [n(x) for n in networks], *options, temperatures, average=True)
    mean = sum(alone) / 3
    assert torch.allclose(ensemble.probabilities(images).float(), mean, atol=1e-3)
    assert (ensemble.labels(images) == mean.argmax(1)).float().mean() > 0.995  # probabilities are rounded to float16


def test_float_images_stay_floats(images):
    floats = images / 255
    assert torch.equal(resized(floats, 0.5), resized(images, 0.5))
    assert torch.equal(resized(images, 1.0), images)
    assert float(resized(images, 0.3).max()) <= 1


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
