import numpy as np
import pytest
import torch
import torch.nn.functional as F

from early_fusion_seg.errors import UserError
from early_fusion_seg.inference import upsampled_argmax
from early_fusion_seg.logits import row_upsample as upsample
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
def _chunks(request, monkeypatch):
    monkeypatch.setattr(upsample, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(("low", "high"), SIZES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_equals_torch_on_whole_logits(low, high, weighted, smoothing):
    logits, target, up = example(low, high)
    weights = torch.linspace(0.2, 2.0, K) if weighted else None
    plain = F.cross_entropy(up, target.long(), weights, ignore_index=255, label_smoothing=smoothing)
    assert_same(cross_entropy(logits, target, weights, smoothing), plain, logits)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_cross_entropy_of_each_pixel(low, high):
    logits, target, up = example(low, high)
    pixels = F.cross_entropy(up, target.long(), ignore_index=255, reduction="none")
    torch.testing.assert_close(pixel_cross_entropy(logits, target), pixels.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_dice_equals_the_plain_computation(low, high):
    logits, target, up = example(low, high)
    valid = target != 255
    probability = up.softmax(1).movedim(1, -1)[valid]  # (pixels, K)
    truth = F.one_hot(target[valid].long(), K)
    scores = 2 * (probability * truth).sum(0) / (probability.sum(0) + truth.sum(0))
    assert_same(dice(logits, target), 1 - scores[truth.sum(0) > 0].mean(), logits)


@pytest.mark.usefixtures("_chunks")
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
def test_a_batch_of_ignored_pixels_gives_zero_with_a_gradient_of_zero(terms, weights):
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


def test_the_mix_is_the_weighted_sum():
    logits, target, _ = example((12, 16), (45, 61))
    weights = [0.5, 1.0, 1.5, 2.0, 2.5]
    mix = SegmentationLoss({"cross_entropy": 0.3, "ohem": 2.0, "dice": 0.7}, weights, label_smoothing=0.1)
    tensor = torch.tensor(weights)
    expected = 0.3 * cross_entropy(logits, target, tensor, 0.1) + 0.7 * dice(logits, target)
    expected = expected + 2.0 * ohem_cross_entropy(logits, target, class_weights=tensor)
    torch.testing.assert_close(mix(logits, target), expected)


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_logits_beyond_the_range_of_the_exponential(scale):
    logits, target, _ = example((12, 16), (24, 32))
    large = (logits.detach() * scale).requires_grad_()
    up = F.interpolate(large, size=(24, 32), mode="bilinear")
    assert_same(cross_entropy(large, target), F.cross_entropy(up, target.long(), ignore_index=255), large)


@pytest.mark.parametrize("terms", [{}, {"focal": 1.0}])
def test_terms_that_do_not_exist_are_refused(terms):
    with pytest.raises(UserError, match="cross_entropy, ohem and dice"):
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


def test_full_resolution_logits_are_never_kept():
    logits, target, _ = example((32, 32), (128, 128))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy(logits, target)
    assert max(t.numel() for t in saved) <= max(logits.numel(), target.numel())


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_upsampled_argmax_equals_argmax_of_whole_logits(low, high):
    logits, _, up = example(low, high)
    labels = upsampled_argmax(logits, high)
    assert labels.dtype == torch.uint8
    first, second = up.topk(2, dim=1).values.unbind(1)
    clear = (first - second > 1e-4).detach().numpy()  # rounding may decide a tie either way
    assert np.array_equal(labels.numpy()[clear], up.argmax(1).numpy()[clear])
    assert clear.mean() > 0.99


@pytest.mark.parametrize("term", ["cross_entropy", "ohem", "dice"])
def test_each_term_of_the_mix_leaves_out_the_value_that_is_to_be_ignored(term):
    logits, target, _ = example((6, 8), (12, 16))
    other = target.where(target != 255, torch.tensor(7, dtype=torch.uint8))
    expected = SegmentationLoss({term: 1.0})(logits, target)
    torch.testing.assert_close(SegmentationLoss({term: 1.0}, ignore_index=7)(logits, other), expected)


def test_hard_pixels_are_those_below_a_probability_of_0_7_but_at_least_a_sixteenth():
    logits = torch.full((1, 2, 4, 8), 0.0)
    logits[:, 0] = torch.tensor(0.8 / 0.2).log()  # easy: probability 0.8
    logits[:, 0, 0, :4] = 0.0  # hard: 0.5
    target = torch.zeros(1, 4, 8, dtype=torch.uint8)
    torch.testing.assert_close(ohem_cross_entropy(logits, target), torch.tensor(2.0).log())
    easy = torch.tensor([0.75, 0.76, 0.77, 0.78])  # none is hard, so the two hardest of the 32 pixels are kept
    logits[0, 0, 0, :4] = (easy / (1 - easy)).log()
    torch.testing.assert_close(ohem_cross_entropy(logits, target), -easy[:2].log().mean())


@pytest.mark.parametrize(("share", "mib"), [(1, 16), (2, 8)])
@pytest.mark.parametrize(("n", "k", "size"), [(1, 19, (1024, 2048)), (8, 171, (512, 640)), (16, 11, (48, 64))])
def test_chunks_cover_all_rows_once_and_are_no_larger_than_said(n, k, size, share, mib):
    seen = np.zeros((n, size[0]), dtype=int)
    chunks = list(upsample.row_chunks(n, k, size, share))
    for images, start, stop in chunks:
        seen[images, start:stop] += 1
        assert seen[images, start:stop].size * k * size[1] * 4 <= mib * 2**20
    assert (seen == 1).all()
    assert len(chunks) <= 1.5 * n * k * size[0] * size[1] * 4 / (mib * 2**20) + 1


def test_chunks_have_several_images_while_32_rows_of_each_fit():
    assert next(iter(upsample.row_chunks(2, 19, (512, 512)))) == (slice(0, 2), 0, 215)
    images, start, stop = next(iter(upsample.row_chunks(8, 171, (512, 640))))
    assert (images, start, stop) == (slice(0, 1), 0, 38)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_autocast_leaves_losses_in_float32(dtype, smoothing):
    """A float16 sum of more than 65,504 would be infinite."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 64, 64, generator=generator).requires_grad_()
    target = torch.randint(0, 2, (4, 256, 256), generator=generator, dtype=torch.uint8)
    loss = SegmentationLoss({"cross_entropy": 1.0, "dice": 1.0}, label_smoothing=smoothing)
    exact = loss(logits, target)
    with torch.autocast("cpu", dtype):
        cast = loss(logits, target)
    assert torch.equal(exact, cast)
    assert torch.equal(*(torch.autograd.grad(x, logits)[0] for x in (exact, cast)))


def test_dice_of_many_pixels_is_as_exact_as_of_few():
    logits, target = torch.zeros(1, 2, 128, 128), torch.zeros(1, 1024, 1024, dtype=torch.uint8)
    logits[:, 0] = 2.0
    probability = 1 / (1 + np.exp(-2.0))
    exact = 1 - 2 * probability / (probability + 1)
    assert dice(logits, target).item() == pytest.approx(exact, abs=3e-7)


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy, dice])
def test_logits_of_the_size_of_the_target_are_not_written_over(loss):
    logits, target = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    before = logits.clone()
    loss(logits, target)
    loss(logits.requires_grad_(), target).backward()
    assert torch.equal(logits, before)


def test_no_image_has_no_labels_and_no_cross_entropy():
    assert upsampled_argmax(torch.zeros(0, 3, 4, 4), (8, 8)).shape == (0, 8, 8)
    assert cross_entropy(torch.zeros(0, 3, 4, 4), torch.zeros(0, 8, 8, dtype=torch.uint8)) == 0


def test_huge_logits_have_a_finite_loss():
    logits = torch.full((1, 19, 1, 1), 1e38)
    logits[:, 0] = 0.0
    assert cross_entropy(logits, torch.ones(1, 1, 1, dtype=torch.uint8)) == 0  # log(18) is lost beside 1e38


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy, dice])
def test_labels_beyond_the_classes_are_refused(loss):
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        loss(torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), 7, dtype=torch.uint8))
