import numpy as np
import pytest
import torch
import torch.nn.functional as F

from early_fusion_seg.errors import UserError
from early_fusion_seg.logits import row_upsample
from early_fusion_seg.losses import SegmentationLoss, cross_entropy, dice, ohem_cross_entropy, pixel_cross_entropy

SIZES = [((12, 16), (45, 61)), ((5, 7), (5, 7)), ((9, 9), (4, 5)), ((1, 1), (3, 2)), ((6, 8), (12, 16))]
K = 5


def example(low: tuple[int, int], high: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, K, *low, generator=generator) * 3).requires_grad_()
    target = torch.randint(0, K, (2, *high), generator=generator, dtype=torch.uint8)
    target[torch.rand(2, *high, generator=generator) < 0.2] = 255
    return logits, target, F.interpolate(logits, size=high, mode="bilinear", align_corners=False)


def assert_same(ours: torch.Tensor, plain: torch.Tensor, logits: torch.Tensor) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.fixture(params=[1, 500, 2**22])
def _chunk_sizes(request, monkeypatch):
    monkeypatch.setattr(row_upsample, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunk_sizes")
@pytest.mark.parametrize(("low", "high"), SIZES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_equals_torchs_on_full_resolution_logits(low, high, weighted, smoothing):
    logits, target, up = example(low, high)
    weights = torch.linspace(0.2, 2.0, K) if weighted else None
    plain = F.cross_entropy(up, target.long(), weights, ignore_index=255, label_smoothing=smoothing)
    assert_same(cross_entropy(logits, target, weights, smoothing), plain, logits)


@pytest.mark.usefixtures("_chunk_sizes")
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_cross_entropy_of_each_pixel_equals_torchs(low, high):
    logits, target, up = example(low, high)
    pixels = F.cross_entropy(up, target.long(), ignore_index=255, reduction="none")
    torch.testing.assert_close(pixel_cross_entropy(logits, target), pixels.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_chunk_sizes")
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_dice_equals_the_computation_on_full_resolution_logits(low, high):
    logits, target, up = example(low, high)
    valid = target != 255
    probability = up.softmax(1).movedim(1, -1)[valid]  # (pixels, K)
    truth = F.one_hot(target[valid].long(), K)
    scores = 2 * (probability * truth).sum(0) / (probability.sum(0) + truth.sum(0))
    assert_same(dice(logits, target), 1 - scores[truth.sum(0) > 0].mean(), logits)


@pytest.mark.usefixtures("_chunk_sizes")
@pytest.mark.parametrize(("threshold", "min_kept"), [(0.7, 0.0), (1e-6, 0.3), (0.9999999, 1.0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_ohem_keeps_the_hard_pixels(threshold, min_kept, weighted):
    logits, target, up = example((12, 16), (45, 61))
    weights = torch.linspace(0.2, 2.0, K) if weighted else torch.ones(K)
    probability = up.softmax(1).movedim(1, -1)[target != 255].gather(1, target[target != 255].long()[:, None])[:, 0]
    labels = target[target != 255].long()
    order = probability.detach().argsort()
    at_least = max(1, round(min_kept * target.numel()))
    hard = torch.zeros_like(labels, dtype=torch.bool)
    hard[order[:at_least]] = True
    hard |= probability.detach() <= threshold
    losses = -probability.log() * weights[labels]
    plain = losses[hard].sum() / weights[labels][hard].sum()
    ours = ohem_cross_entropy(logits, target, threshold, min_kept, weights if weighted else None)
    assert_same(ours, plain, logits)


@pytest.mark.parametrize("terms", [{"cross_entropy": 1.0}, {"ohem": 1.0}, {"dice": 1.0}])
@pytest.mark.parametrize("weights", [None, [1.0] * K])
def test_a_batch_of_ignored_pixels_has_zero_loss_and_zero_gradient(terms, weights):
    logits = torch.randn(2, K, 4, 4, requires_grad=True)
    loss = SegmentationLoss(terms, weights)(logits, torch.full((2, 8, 8), 255, dtype=torch.uint8))
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("terms", [{"cross_entropy": 1.0}, {"ohem": 1.0}, {"dice": 1.0}])
def test_ignored_pixels_get_no_gradient(terms):
    logits = torch.randn(1, K, 8, 8, requires_grad=True)
    target = torch.randint(0, K, (1, 8, 8))
    target[:, :4] = 255
    SegmentationLoss(terms)(logits, target).backward()
    assert not logits.grad[:, :, :4].any()
    assert logits.grad[:, :, 4:].any()


def test_segmentation_loss_is_the_weighted_sum_of_its_terms():
    logits, target, _ = example((12, 16), (45, 61))
    weights = [0.5, 1.0, 1.5, 2.0, 2.5]
    loss = SegmentationLoss({"cross_entropy": 0.3, "ohem": 2.0, "dice": 0.7}, weights, label_smoothing=0.1)
    tensor = torch.tensor(weights)
    expected = 0.3 * cross_entropy(logits, target, tensor, 0.1) + 0.7 * dice(logits, target)
    expected = expected + 2.0 * ohem_cross_entropy(logits, target, class_weights=tensor)
    torch.testing.assert_close(loss(logits, target), expected)


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_cross_entropy_of_logits_whose_exponential_overflows(scale):
    logits, target, _ = example((12, 16), (24, 32))
    large = (logits.detach() * scale).requires_grad_()
    up = F.interpolate(large, size=(24, 32), mode="bilinear")
    assert_same(cross_entropy(large, target), F.cross_entropy(up, target.long(), ignore_index=255), large)


@pytest.mark.parametrize("terms", [{}, {"focal": 1.0}])
def test_unknown_terms_are_refused(terms):
    with pytest.raises(UserError, match="expected a weight for one or more of cross_entropy, ohem, dice"):
        SegmentationLoss(terms)


def test_low_precision_logits_are_reduced_in_float32():
    logits, target, _ = example((12, 16), (45, 61))
    low = logits.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(low, target)
    up = F.interpolate(low.detach().float(), size=target.shape[-2:], mode="bilinear")
    torch.testing.assert_close(loss, F.cross_entropy(up, target.long(), ignore_index=255), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert low.grad.dtype == torch.bfloat16


def test_full_resolution_logits_are_not_saved_for_backward():
    logits, target, _ = example((32, 32), (128, 128))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy(logits, target)
    assert max(t.numel() for t in saved) <= max(logits.numel(), target.numel())


@pytest.mark.parametrize("term", ["cross_entropy", "ohem", "dice"])
def test_each_term_leaves_out_pixels_with_ignore_index(term):
    logits, target, _ = example((6, 8), (12, 16))
    other = target.where(target != 255, torch.tensor(7, dtype=torch.uint8))
    expected = SegmentationLoss({term: 1.0})(logits, target)
    torch.testing.assert_close(SegmentationLoss({term: 1.0}, ignore_index=7)(logits, other), expected)


def test_ohem_keeps_probabilities_below_0_7_and_at_least_a_sixteenth_of_the_pixels():
    logits = torch.full((1, 2, 4, 8), 0.0)
    logits[:, 0] = torch.tensor(0.8 / 0.2).log()  # easy pixels: probability 0.8
    logits[:, 0, 0, :4] = 0.0  # hard pixels: 0.5
    target = torch.zeros(1, 4, 8, dtype=torch.uint8)
    torch.testing.assert_close(ohem_cross_entropy(logits, target), torch.tensor(2.0).log())
    easy = torch.tensor([0.75, 0.76, 0.77, 0.78])  # no hard pixel: the two hardest of 32 are kept
    logits[0, 0, 0, :4] = (easy / (1 - easy)).log()
    torch.testing.assert_close(ohem_cross_entropy(logits, target), -easy[:2].log().mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_float32_under_autocast(dtype, smoothing):
    """In float16, the sums would exceed 65,504 and be infinite."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 64, 64, generator=generator).requires_grad_()
    target = torch.randint(0, 2, (4, 256, 256), generator=generator, dtype=torch.uint8)
    loss = SegmentationLoss({"cross_entropy": 1.0, "dice": 1.0}, label_smoothing=smoothing)
    exact = loss(logits, target)
    with torch.autocast("cpu", dtype):
        under_autocast = loss(logits, target)
    assert torch.equal(exact, under_autocast)
    assert torch.equal(*(torch.autograd.grad(x, logits)[0] for x in (exact, under_autocast)))


def test_dice_of_many_pixels_is_exact():
    logits, target = torch.zeros(1, 2, 128, 128), torch.zeros(1, 1024, 1024, dtype=torch.uint8)
    logits[:, 0] = 2.0
    probability = 1 / (1 + np.exp(-2.0))
    exact = 1 - 2 * probability / (probability + 1)
    assert dice(logits, target).item() == pytest.approx(exact, abs=3e-7)


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy, dice])
def test_logits_of_the_size_of_the_target_are_not_overwritten(loss):
    logits, target = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    before = logits.clone()
    loss(logits, target)
    loss(logits.requires_grad_(), target).backward()
    assert torch.equal(logits, before)


def test_cross_entropy_of_no_images_is_zero():
    assert cross_entropy(torch.zeros(0, 3, 4, 4), torch.zeros(0, 8, 8, dtype=torch.uint8)) == 0


def test_huge_logits_have_a_finite_loss():
    logits = torch.full((1, 19, 1, 1), 1e38)
    logits[:, 0] = 0.0
    assert cross_entropy(logits, torch.ones(1, 1, 1, dtype=torch.uint8)) == 0  # log(18) is below the precision at 1e38


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy, dice])
def test_labels_that_are_no_class_are_refused(loss):
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        loss(torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), 7, dtype=torch.uint8))


@pytest.mark.parametrize("loss", [cross_entropy, dice, ohem_cross_entropy, pixel_cross_entropy])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.complex64])
def test_a_target_of_fractions_is_refused(loss, kind):
    with pytest.raises(UserError, match=rf"the target holds {kind}; expected integers"):
        loss(torch.zeros(1, 2, 3, 4, requires_grad=True), torch.full((1, 3, 4), 0.7).to(kind))


def test_a_bool_target_is_that_of_two_classes():
    logits, target = torch.randn(1, 2, 6, 8), torch.rand(1, 6, 8) > 0.5
    torch.testing.assert_close(cross_entropy(logits, target), F.cross_entropy(logits, target.long()))
