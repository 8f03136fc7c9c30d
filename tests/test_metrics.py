import copy
import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from early_fusion_seg.errors import UserError
from early_fusion_seg.metrics import CHUNK, MeanLoss, SegmentationMetrics, class_iou, confusion_matrix


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


def test_scores_equal_torchmetrics_under_the_same_rule():
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
def test_confusion_matrices_of_batches_add_up(seeds):
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


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize(("k", "ignore_index"), [(7, 255), (255, 255), (7, 9), (300, 511)])
def test_every_pair_of_labels_is_counted_for_any_dtype(kind, k, ignore_index):
    highest = 256 if kind == torch.uint8 else 512
    prediction, truth = torch.randint(highest, (2, 3, 700, 701), generator=torch.Generator().manual_seed(k)).to(kind)
    assert truth.numel() > CHUNK  # more pixels than are counted at a time
    counts = confusion_matrix(prediction, truth, k, ignore_index)
    table = np.array([v if v < k else k if v == ignore_index else k + 1 for v in range(highest)])
    expected = np.zeros((k + 2, k + 2), np.int64)
    np.add.at(expected, (table[truth.long()], table[prediction.long()]), 1)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts, expected)


# The ground truth has classes 0 and 1; class 2 is predicted once, class 3 is absent from both. IoU: 2/3, 1, 0, nan.
TRUTH, PREDICTION = [0, 0, 0, 1, 255], [0, 0, 2, 1, 3]


@pytest.mark.parametrize(
    ("absent", "expected", "per_class", "accuracy"),
    [
        ("nan-skip", (2 / 3 + 1 + 0) / 3, [2 / 3, 1, 0, np.nan], (2 / 3 + 1) / 2),  # Cityscapes, Mapillary, mmseg
        ("gt-only", (2 / 3 + 1) / 2, [2 / 3, 1, np.nan, np.nan], (2 / 3 + 1) / 2),  # COCO-Stuff, detectron2
        ("zero", (2 / 3 + 1) / 4, [2 / 3, 1, 0, 0], (2 / 3 + 1) / 4),  # SegNet's CamVid
        ("strict-nan", np.nan, [2 / 3, 1, 0, np.nan], (2 / 3 + 1) / 2),  # PASCAL VOC
    ],
)
def test_absent_classes_under_each_rule(absent, expected, per_class, accuracy):
    scores = score(TRUTH, PREDICTION, absent=absent)
    np.testing.assert_allclose(scores["miou"], expected)
    np.testing.assert_allclose(scores["per_class"], per_class)
    np.testing.assert_allclose(scores["mean_accuracy"], accuracy)
    np.testing.assert_allclose(scores["fw_iou"], 3 / 4 * 2 / 3 + 1 / 4 * 1)


@pytest.mark.parametrize("absent", ["nan-skip", "gt-only", "zero", "strict-nan"])
@pytest.mark.parametrize("pred_void", ["fn", "drop"])
@pytest.mark.parametrize("seed", range(5))
def test_the_mean_of_per_class_is_the_miou_under_each_rule(absent, pred_void, seed):
    rng = np.random.default_rng(seed)
    truth, prediction = rng.choice((0, 1, V), 20).tolist(), rng.choice((0, 1, 2, V), 20).tolist()
    scores = score(truth, prediction, absent=absent, pred_void=pred_void)
    mean = np.mean if absent == "strict-nan" else np.nanmean
    np.testing.assert_allclose(scores["miou"], mean(scores["per_class"]))


def test_strict_nan_is_the_plain_mean_if_all_classes_occur():
    assert score([0, 1, 2, 3], [0, 1, 2, 2], absent="strict-nan")["miou"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)


@pytest.mark.parametrize(("pred_void", "iou", "accuracy"), [("fn", 2 / 4, 3 / 5), ("drop", 2 / 3, 3 / 4)])
def test_void_predictions_under_each_rule(pred_void, iou, accuracy):
    scores = score([0, 0, 0, 0, 1], [0, 0, 1, 255, 1], k=2, pred_void=pred_void)
    assert scores["per_class"][0] == pytest.approx(iou)
    assert scores["pixel_accuracy"] == pytest.approx(accuracy)


def test_a_class_predicted_as_void_everywhere_is_absent_under_drop():
    scores = score([0, 1, 1], [0, 255, 255], k=2, absent="gt-only", pred_void="drop")
    np.testing.assert_allclose(scores["per_class"], [1, np.nan])
    assert (scores["miou"], scores["mean_accuracy"]) == (1.0, 1.0)


def test_another_ignore_index():
    scores = score([0, 9, 1], [0, 1, 9], k=2, ignore_index=9)
    assert (scores["miou"], scores["pixel_accuracy"]) == (0.5, 0.5)
    with pytest.raises(UserError, match=r"neither in 0\.\.1 nor 9"):
        score([255], [0], k=2, ignore_index=9)


def test_void_predictions_are_an_error_under_the_rule_error():
    with pytest.raises(UserError, match="1 pixels are predicted as void"):
        score([0, 1], [0, 255], pred_void="error")
    assert score([255, 1], [0, 1], pred_void="error")["pixel_accuracy"] == 1.0


@pytest.mark.parametrize("label", [255, 21])
def test_the_rule_error_refuses_labels_that_are_no_class_on_ignored_pixels_too(label):
    with pytest.raises(UserError, match="1 pixels are predicted as void or as no class"):
        score([255, 1], [label, 1], k=21, absent="strict-nan", pred_void="error")  # VOC's devkit: "out of range"


@pytest.mark.parametrize("absent", ["nan-skip", "gt-only", "zero", "strict-nan"])
def test_scores_without_labeled_pixels_are_nan_with_a_warning(absent):
    with pytest.warns(UserWarning, match="the 1 images scored have no labeled pixel, so all scores are nan"):
        scores = score([255], [0], absent=absent)
    assert all(np.isnan(scores[name]) for name in ("miou", "pixel_accuracy", "mean_accuracy", "fw_iou"))
    assert np.isnan(scores["per_class"]).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_fractions_and_complex_numbers_are_refused_as_labels(kind):
    labels, fractions = torch.ones(1, 1, 2, dtype=torch.uint8), torch.tensor([[[0.9, 0.2]]]).to(kind)
    for name, pair in {"prediction": (fractions, labels), "target": (labels, fractions)}.items():
        for function in (SegmentationMetrics(2).update, lambda p, t: confusion_matrix(p, t, 2)):
            with pytest.raises(UserError, match=f"the {name} holds {kind}; expected integers"):
                function(*pair)


def test_bool_labels_are_those_of_two_classes():
    truth = torch.tensor([[[1, 1, 0, 255]]])
    metrics = SegmentationMetrics(2)
    metrics.update(torch.tensor([[[0.9, 0.2, 0.1, 0.9]]]) > 0.5, truth)
    assert metrics.confusion.tolist() == [[1, 0, 0], [1, 1, 0]]
    with pytest.raises(UserError, match=r"holds torch\.bool, .* there are 3"):
        SegmentationMetrics(3).update(truth > 0, truth)
    with pytest.raises(UserError, match=r"the target holds torch\.bool, .* there are 1"):
        SegmentationMetrics(1).update(truth, truth > 300)


def test_one_class_keeps_its_axis():
    labels = torch.tensor([[[0, 0, 255]]])
    metrics = SegmentationMetrics(1)
    assert metrics(labels, labels)["per_class"].shape == (1,)  # the value of the batch
    for copied in (metrics, copy.deepcopy(metrics), pickle.loads(pickle.dumps(metrics))):
        assert copied.compute()["per_class"].tolist() == [1.0]
        assert copied.compute()["per_class"].shape == (1,)  # from torchmetrics' cache
        assert copied.compute()["miou"].shape == ()


def test_nothing_on_the_device_is_float64(device_without_float64):
    prediction, truth = batch(0)
    with device_without_float64:
        with pytest.raises(TypeError, match="the device has no float64"):
            prediction.double()
        metrics, loss = SegmentationMetrics(7), MeanLoss()
        metrics.update(prediction, truth)
        loss.update(torch.tensor(0.5), torch.tensor(3.0))
        scores = metrics.compute()
        assert {value.dtype for value in (*scores.values(), loss.compute())} == {torch.float64}  # on the CPU


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64])
def test_labels_on_a_device_are_counted_in_one_pass_without_waiting_for_it(kind):
    labels = torch.zeros(1, 700, 701, dtype=kind, device="meta")  # meta tensors refuse to give their values
    assert labels.numel() > CHUNK
    metrics = SegmentationMetrics(4).to("meta")
    with CountOperators() as counted:
        metrics.update(labels, labels)
    assert counted["aten::scatter_add_"] == 1
    assert not counted.keys() & {"aten::bincount", "aten::_local_scalar_dense"}
    assert metrics.confusion.device.type == "meta"


class CountOperators(TorchDispatchMode):
    """Count the operators that run."""

    def __enter__(self):
        super().__enter__()
        self.counted = Counter()
        return self.counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counted[func.name()] += 1
        return func(*args, **kwargs or {})


def test_pairs_counted_as_on_a_device_equal_those_of_a_cpu(monkeypatch):
    prediction, truth = batch(3, void=True)
    expected = confusion_matrix(prediction, truth, 7)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    assert torch.equal(confusion_matrix(prediction, truth, 7), expected)


@given(st.lists(st.tuples(st.floats(0, 20, width=32), st.integers(0, 2**21)), min_size=1, max_size=50))
@settings(max_examples=25, deadline=None)
def test_the_mean_loss_is_exact(batches):
    loss = MeanLoss()
    for value, pixels in batches:
        loss.update(torch.tensor(value, dtype=torch.float32), torch.tensor(pixels))
    weight = sum(pixels for _, pixels in batches)
    exact = sum(Fraction(value) * pixels for value, pixels in batches) / weight if weight else np.nan
    np.testing.assert_allclose(float(loss.compute()), float(exact), rtol=1e-14)


@pytest.mark.parametrize(("truth", "prediction"), [([4], [0]), ([0], [4]), ([-1], [0]), ([0], [254])])
def test_labels_outside_the_classes_are_refused(truth, prediction):
    with pytest.raises(UserError, match=r"neither in 0\.\.3 nor 255"):
        score(truth, prediction)


def test_invalid_predictions_on_ignored_pixels_are_not_counted():
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
    with pytest.raises(UserError, match=r"expected both \(n, h, w\)"):
        metrics.update(*torch.zeros(2, 2, 3, dtype=torch.uint8))  # no batch dimension: 2 images would be counted


@pytest.mark.parametrize("options", [{"absent": "skip"}, {"pred_void": "ignore"}, {"ignore_index": 3}])
def test_options_that_do_not_exist_are_refused(options):
    with pytest.raises(UserError, match=r"expected one of|is one of the"):
        SegmentationMetrics(4, **options)


def test_metrics_work_under_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        assert score([0, 1], [0, 1], k=2)["miou"] == 1.0
    finally:
        torch.use_deterministic_algorithms(False)


# --- official evaluators reimplemented from their published rules, on plain lists of labels; V is void

V = 255


def _sums(truth, prediction, classes):
    pairs = list(zip(truth, prediction, strict=True))
    hit = [sum(t == p == c for t, p in pairs) for c in range(classes)]
    in_truth = [sum(t == c for t, _ in pairs) for c in range(classes)]
    return pairs, hit, in_truth


def miou_cityscapes(truth, prediction, classes):
    """The row sum includes the void column; classes without any pixel are left out."""
    pairs, hit, in_truth = _sums(truth, prediction, classes)
    false_positive = [sum(p == c and t not in (c, V) for t, p in pairs) for c in range(classes)]
    union = [i + f for i, f in zip(in_truth, false_positive, strict=True)]
    return np.mean([h / u for h, u in zip(hit, union, strict=True) if u])


def miou_voc(truth, prediction, classes):
    """Like Cityscapes, but 0/0 stays nan in the mean, and void predictions are an error, anywhere in the file."""
    if V in prediction:
        return "error"
    _, _, in_truth = _sums(truth, prediction, classes)
    seen = {p for t, p in zip(truth, prediction, strict=True) if t != V}
    if any(not n and c not in seen for c, n in enumerate(in_truth)):
        return np.nan
    return miou_cityscapes(truth, prediction, classes)


def miou_mapillary(truth, prediction, classes):
    """Row and column of void are deleted before the sums."""
    kept = [(t, p) for t, p in zip(truth, prediction, strict=True) if V not in (t, p)]
    return miou_cityscapes([t for t, _ in kept], [p for _, p in kept], classes) if kept else np.nan


def miou_coco_stuff(truth, prediction, classes):
    """The mean is over the classes in the ground truth.

    Void predictions are false negatives by our choice: the official programs count them as the last class, refuse them
    or leave them out.
    """
    pairs, hit, in_truth = _sums(truth, prediction, classes)
    false_positive = [sum(p == c and t not in (c, V) for t, p in pairs) for c in range(classes)]
    return np.mean([hit[c] / (in_truth[c] + false_positive[c]) for c in range(classes) if in_truth[c]])


miou_detectron2 = miou_coco_stuff  # argmax gives no void


def miou_segnet(truth, prediction, classes):
    """Pixels that are void in ground truth or prediction are left out; the sum is divided by the number of classes."""
    kept = [(t, p) for t, p in zip(truth, prediction, strict=True) if V not in (t, p)]
    _, hit, in_truth = _sums([t for t, _ in kept], [p for _, p in kept], classes)
    union = [in_truth[c] + sum(p == c and t != c for t, p in kept) for c in range(classes)]
    return sum(hit[c] / union[c] for c in range(classes) if union[c]) / classes


def miou_mmseg(truth, prediction, classes):
    """Areas of label, prediction and overlap over labeled pixels; void is no predicted area; nanmean."""
    kept = [(t, p) for t, p in zip(truth, prediction, strict=True) if t != V]
    with np.errstate(invalid="ignore"):
        label, predicted, overlap = (
            np.array([sum(f(t, p, c) for t, p in kept) for c in range(classes)], float)
            for f in (lambda t, _, c: t == c, lambda _, p, c: p == c, lambda t, p, c: t == p == c)
        )
        return np.nanmean(overlap / (label + predicted - overlap))


RULES = {
    miou_cityscapes: ("nan-skip", "fn"),
    miou_voc: ("strict-nan", "error"),
    miou_mapillary: ("nan-skip", "drop"),
    miou_coco_stuff: ("gt-only", "fn"),
    miou_segnet: ("zero", "drop"),
    miou_mmseg: ("nan-skip", "fn"),
}


@pytest.mark.parametrize("evaluator", [*RULES, miou_detectron2])
@pytest.mark.parametrize("predicted", [(0, 1, 2, 3), (0, 1), (0, 1, 2, V)])
@pytest.mark.parametrize("seed", range(5))
def test_every_official_rule_is_a_pair_of_options(evaluator, predicted, seed):
    rng = np.random.default_rng(seed)
    truth = [0, 1, *rng.choice((0, 1, 2, V) if seed % 2 else (0, 1, V), 30).tolist()]
    prediction = [0, 1, *rng.choice(predicted, 30).tolist()]
    expected = evaluator(truth, prediction, 4)
    absent, pred_void = RULES[evaluator]
    if isinstance(expected, str):
        with pytest.raises(UserError, match="predicted as void"):
            score(truth, prediction, absent=absent, pred_void=pred_void)
    else:
        np.testing.assert_allclose(score(truth, prediction, absent=absent, pred_void=pred_void)["miou"], expected)


def test_examples_computed_with_the_official_code():
    mapillary = {"k": 3, "absent": "nan-skip", "pred_void": "drop"}
    assert score([0, 0, 1, 1], [0, V, 1, 1], **mapillary)["miou"] == 1.0
    assert score([0, 0, 1, 1], [0, 2, 1, 1], **mapillary)["miou"] == 0.5
    assert score([0, 0, 1, 1], [0, 2, 1, 1], k=3, absent="gt-only")["miou"] == 0.75


def test_camvid_has_the_accuracies_of_segnets_script():
    segnet = {"k": 11, "absent": "zero", "pred_void": "drop"}
    assert score([0, 0], [0, V], **segnet)["pixel_accuracy"] == 0.5  # a void prediction is wrong
    assert score([0, 0], [0, V], **segnet)["miou"] == 1 / 11  # and left out of the IoU
    assert score([0, 0], [0, 1], **segnet)["mean_accuracy"] == 0.5 / 11  # the class average is always over 11
    mapillary = {"k": 11, "absent": "nan-skip", "pred_void": "drop"}
    assert score([0, 0], [0, V], **mapillary)["pixel_accuracy"] == 1.0
    assert score([0, 0], [0, 1], **mapillary)["mean_accuracy"] == 0.5


def test_scores_on_plain_counts():
    counts = torch.tensor([[3, 1, 0], [0, 2, 2]])  # the last column is void
    assert class_iou(counts).tolist() == [3 / 4, 2 / 5]
    assert class_iou(counts, pred_void="drop").tolist() == [3 / 4, 2 / 3]
