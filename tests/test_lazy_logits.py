"""LazyLogits compared with the plain computation in PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from early_fusion_seg.logits import row_upsample
from early_fusion_seg.logits.lazy_logits import LazyLogits
from early_fusion_seg.losses import cross_entropy, dice, ohem_cross_entropy

K, WIDTHS, RATIOS = 5, (3, 4, 6), (1, 2, 8)
SIZES = [((12, 16), (24, 32)), ((13, 17), (26, 33)), ((9, 9), (9, 9)), ((9, 10), (4, 5)), ((1, 1), (3, 2))]


@pytest.fixture(params=[1, 400, 2**22])
def _chunk_sizes(request, monkeypatch):
    monkeypatch.setattr(row_upsample, "CHUNK_ELEMENTS", request.param)


def example(low: tuple[int, int], n: int = 3) -> LazyLogits:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    features = tuple(draw(n, c, -(-low[0] // r), -(-low[1] // r)) for c, r in zip(WIDTHS, RATIOS, strict=True))
    return LazyLogits(features, tuple(draw(K, c, 1, 1) for c in WIDTHS), tuple(draw(K) for _ in WIDTHS), RATIOS)


def plain(lazy: LazyLogits) -> torch.Tensor:
    """Apply the classifiers to whole feature maps; from the coarsest on, upsample the sum to the next finer map."""
    total, ratio = torch.zeros(()), RATIOS[-1]
    for x, weight, bias, finer in reversed(list(zip(*lazy, strict=True))):
        if ratio > finer:
            total = F.interpolate(total, scale_factor=ratio // finer, mode="bilinear")[..., : x.shape[2], : x.shape[3]]
        total, ratio = total + F.conv2d(x, weight, bias), finer
    return total


def labels(n: int, size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, K, (n, *size), generator=generator, dtype=torch.uint8)
    target[torch.rand(n, *size, generator=generator) < 0.2] = 255
    return target


@pytest.mark.usefixtures("_chunk_sizes")
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_logits_are_the_sum_of_upsampled_classifier_outputs(low, high):
    lazy = example(low)
    assert lazy.shape == (3, K, *low)
    torch.testing.assert_close(lazy.logits(), plain(lazy))
    up = F.interpolate(plain(lazy), size=high, mode="bilinear")
    for images, start, stop in lazy.chunks(high):
        rows = lazy.upsampled(high, (images, start, stop))
        torch.testing.assert_close(rows.movedim(-1, 1), up[images, :, start:stop], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_chunk_sizes")
@pytest.mark.parametrize(("low", "high"), SIZES)
@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy, dice])
def test_gradients_of_features_and_classifiers_equal_those_through_plain_logits(low, high, loss):
    lazy, target = example(low), labels(3, high)
    ours = torch.autograd.grad(loss(lazy, target), lazy.tensors)
    logits = plain(lazy)
    torch.testing.assert_close(loss(lazy, target), loss(logits, target), rtol=1e-5, atol=1e-6)
    if loss is cross_entropy:
        up = F.interpolate(logits, size=high, mode="bilinear")
        theirs = torch.autograd.grad(F.cross_entropy(up, target.long(), ignore_index=255), lazy.tensors)
    else:
        theirs = torch.autograd.grad(loss(logits, target), lazy.tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_cross_entropy_without_gradients_has_the_same_value():
    lazy, target = example((12, 16)), labels(3, (24, 32))
    expected = cross_entropy(lazy, target).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(cross_entropy(lazy, target), expected)


def test_a_factor_of_the_loss_scales_its_gradient():
    lazy, target = example((12, 16)), labels(3, (24, 32))
    once = torch.autograd.grad(cross_entropy(lazy, target), lazy.tensors)
    scaled = torch.autograd.grad(2**16 * cross_entropy(lazy, target), lazy.tensors)
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(2**16 * a, b)


def test_logits_of_a_single_stream():
    features, weights, biases, ratios = (x[:1] for x in example((12, 16)))
    torch.testing.assert_close(
        LazyLogits(features, weights, biases, ratios).logits(), F.conv2d(*features, *weights, *biases)
    )


def test_a_second_backward_gives_the_same_gradients():
    lazy, target = example((12, 16)), labels(3, (24, 32))
    loss = cross_entropy(lazy, target)
    first = torch.autograd.grad(4 * loss, lazy.tensors, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, lazy.tensors)
    for a, b, c in zip(first, second, kept, strict=True):
        torch.testing.assert_close(a, 4 * b)
        assert torch.equal(a, c)


def test_low_precision_features_are_added_in_float32():
    lazy = example((12, 16))
    low = lazy._replace(features=tuple(x.detach().bfloat16().requires_grad_() for x in lazy.features))
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(low, labels(3, (24, 32)))
        logits = low.logits()
    exact = plain(low._replace(features=tuple(x.float() for x in low.features)))
    torch.testing.assert_close(logits, exact)
    torch.testing.assert_close(loss, cross_entropy(exact, labels(3, (24, 32))))
    loss.backward()
    assert [x.grad.dtype for x in low.features] == [torch.bfloat16] * 3


def test_no_logits_are_saved_for_backward():
    lazy, target = example((32, 32)), labels(3, (64, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy(lazy, target)
    assert {t.numel() for t in saved} <= {1, *(x.numel() for x in lazy.tensors)}
