import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from early_fusion_seg.errors import UserError
from early_fusion_seg.metrics import SegmentationMetrics


def score(truth, prediction, k=4, **options):
    metrics = SegmentationMetrics(k, **options)
    metrics.update(torch.tensor(prediction).reshape(1, 1, -1), torch.tensor(truth).reshape(1, 1, -1))
    return {name: value.tolist() for name, value in metrics.compute().items()}


def batch(seed: int, k: int = 7, void: bool = False, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, k, (n, 13, 17)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.2] = 255
    prediction = rng.integers(0, k, truth.shape).astype(np.uint8)
    if void:
        prediction[rng.random(truth.shape) < 0.1] = 255
    return torch.from_numpy(prediction), torch.from_numpy(truth)


def test_scores_equal_torchmetrics_where_the_rule_is_the_same():
    prediction, truth = batch(0)
    ours = SegmentationMetrics(7)
    ours.update(prediction, truth)
    scores = ours.compute()
    options = {"num_classes": 7, "ignore_index": 255}
    jaccard = MulticlassJaccardIndex(average=None, **options)(prediction.long(), truth.long())
    torch.testing.assert_close(scores["per_class"].float(), jaccard)
    torch.testing.assert_close(scores["miou"].float(), jaccard.mean())
    matrix = MulticlassConfusionMatrix(**options)(prediction.long(), truth.long())
    assert torch.equal(ours.confusion[:, :-1], matrix)
    for name, average in (("pixel_accuracy", "micro"), ("mean_accuracy", "macro")):
        accuracy = MulticlassAccuracy(average=average, **options)(prediction.long(), truth.long())
        torch.testing.assert_close(scores[name].float(), accuracy)


@given(seed=st.integers(0, 2**31), void=st.booleans(), rule=st.sampled_from(["fn", "drop"]))
@settings(max_examples=25, deadline=None)
def test_scores_equal_numpy(seed, void, rule):
    prediction, truth = batch(seed, void=void)
    metrics = SegmentationMetrics(7, pred_void=rule)
    metrics.update(prediction, truth)
    scores = metrics.compute()
    p, t = prediction.numpy(), truth.numpy()
    valid = (t != 255) & ((p != 255) | (rule == "fn"))
    p, t = p[valid], t[valid]
    iou = np.array([np.sum((p == c) & (t == c)) / np.sum((p == c) | (t == c)) for c in range(7)])
    share = np.array([np.mean(t == c) for c in range(7)])
    np.testing.assert_allclose(scores["per_class"], iou)
    np.testing.assert_allclose(scores["miou"], iou.mean())
    np.testing.assert_allclose(scores["pixel_accuracy"], np.mean(p == t))
    np.testing.assert_allclose(scores["mean_accuracy"], np.mean([np.mean(p[t == c] == c) for c in range(7)]))
    np.testing.assert_allclose(scores["fw_iou"], (iou * share).sum())


@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_matrices_of_parts_add_up(seeds):
    whole = SegmentationMetrics(7)
    parts = torch.zeros_like(whole.confusion)
    for seed in seeds:
        part = SegmentationMetrics(7)
        part.update(*batch(seed, void=True))
        whole.update(*batch(seed, void=True))
        parts += part.confusion
    assert torch.equal(whole.confusion, parts)
    assert whole.confusion.dtype == torch.int64
    assert int(whole.images) == 3 * len(seeds)


# Truth has classes 0 and 1; class 2 is predicted once, class 3 is absent from both. IoU: 2/3, 1, 0, nan.
TRUTH, PREDICTION = [0, 0, 0, 1, 255], [0, 0, 2, 1, 3]


@pytest.mark.parametrize(
    ("absent", "expected"),
    [
        ("nan-skip", (2 / 3 + 1 + 0) / 3),  # Cityscapes, Mapillary Vistas, mmsegmentation
        ("gt-only", (2 / 3 + 1) / 2),  # COCO-Stuff, detectron2
        ("zero", (2 / 3 + 1) / 4),  # SegNet's CamVid
        ("strict-nan", np.nan),  # PASCAL VOC
    ],
)
def test_absent_classes_under_each_rule(absent, expected):
    scores = score(TRUTH, PREDICTION, absent=absent)
    np.testing.assert_allclose(scores["miou"], expected)
    np.testing.assert_allclose(scores["per_class"], [2 / 3, 1, 0, np.nan])


def test_strict_nan_is_the_plain_mean_where_all_classes_occur():
    assert score([0, 1, 2, 3], [0, 1, 2, 2], absent="strict-nan")["miou"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)


@pytest.mark.parametrize(("pred_void", "iou", "accuracy"), [("fn", 2 / 4, 3 / 5), ("drop", 2 / 3, 3 / 4)])
def test_void_predictions_under_each_rule(pred_void, iou, accuracy):
    scores = score([0, 0, 0, 0, 1], [0, 0, 1, 255, 1], k=2, pred_void=pred_void)
    assert scores["per_class"][0] == pytest.approx(iou)
    assert scores["pixel_accuracy"] == pytest.approx(accuracy)


def test_void_predictions_are_an_error_where_the_rule_says_so():
    with pytest.raises(UserError, match="predicted as void"):
        score([0, 1], [0, 255], pred_void="error")
    assert score([255, 1], [255, 1], pred_void="error")["pixel_accuracy"] == 1.0


def test_nothing_to_score_is_nan():
    scores = score([255], [0])
    assert all(np.isnan(scores[name]) for name in ("miou", "pixel_accuracy", "mean_accuracy", "fw_iou"))


@pytest.mark.parametrize(("truth", "prediction"), [([4], [0]), ([0], [4]), ([-1], [0]), ([0], [254])])
def test_labels_outside_the_classes_are_refused(truth, prediction):
    with pytest.raises(UserError, match=r"neither in 0\.\.3 nor 255"):
        score(truth, prediction)


def test_invalid_predictions_on_ignored_pixels_do_not_matter():
    assert score([255, 0], [77, 0])["pixel_accuracy"] == 1.0


def test_invalid_labels_counted_on_a_device_are_refused_at_compute():
    metrics = SegmentationMetrics(4)
    metrics.update(torch.zeros(1, 1, 1, dtype=torch.uint8), torch.zeros(1, 1, 1, dtype=torch.uint8))
    metrics.invalid += 1
    with pytest.raises(UserError, match="1 pixels"):
        metrics.compute()


def test_shapes_that_differ_are_refused():
    metrics = SegmentationMetrics(4)
    with pytest.raises(UserError, match=r"\(1, 2, 3\) and target \(1, 3, 2\)"):
        metrics.update(torch.zeros(1, 2, 3, dtype=torch.uint8), torch.zeros(1, 3, 2, dtype=torch.uint8))


@pytest.mark.parametrize("options", [{"absent": "skip"}, {"pred_void": "ignore"}, {"ignore_index": 3}])
def test_options_that_do_not_exist_are_refused(options):
    with pytest.raises(UserError, match=r"expected one of|is one of the"):
        SegmentationMetrics(4, **options)


def test_it_works_under_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        assert score([0, 1], [0, 1], k=2)["miou"] == 1.0
    finally:
        torch.use_deterministic_algorithms(False)
