"""Calibration against torchmetrics, PyTorch and numpy on whole logits."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_runs import QUICK, QUIET, fit_args
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils._pytree import tree_leaves
from torchmetrics.functional.classification import multiclass_calibration_error

from early_fusion_seg import CamVidDataModule, ReverseHRNetSeg
from early_fusion_seg.__main__ import main
from early_fusion_seg.cli.calibrate import store_temperature
from early_fusion_seg.errors import UserError
from early_fusion_seg.inference import CalibrationMetrics, score_pixels, settings
from early_fusion_seg.inference.calibration import fit_temperature, sample_logits
from early_fusion_seg.logits import LazyLogits, row_upsample

K = 4


def example(strength: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (2, K, 5, 7) and a target (2, 20, 28) with ignored pixels."""
    random = torch.Generator().manual_seed(0)
    logits = strength * torch.randn(2, K, 5, 7, generator=random)
    target = torch.randint(0, K, (2, 20, 28), generator=random).to(torch.uint8)
    target[:, 3:8] = 255
    return logits, target


def oracle(logits: torch.Tensor, target: torch.Tensor, temperature: float = 1.0) -> tuple[float, float]:
    """ECE by torchmetrics and negative log-likelihood by PyTorch of whole logits (n, K, h, w)."""
    whole = F.interpolate(logits, target.shape[-2:], mode="bilinear") / temperature
    pixels, labels = whole.movedim(1, -1).reshape(-1, logits.shape[1]), target.long().flatten()
    ece = multiclass_calibration_error(pixels.softmax(1), labels, logits.shape[1], 15, "l1", ignore_index=255)
    return float(ece), float(F.cross_entropy(pixels, labels, ignore_index=255))


def computed(*batches: tuple[torch.Tensor, torch.Tensor], temperature: float = 1.0) -> tuple[float, float]:
    metrics = CalibrationMetrics()
    for logits, target in batches:
        _, counts, nll = score_pixels(logits, target, temperature)
        metrics.update(counts, nll)
    scores = metrics.compute()
    return float(scores["ece"]), float(scores["nll"])


@pytest.mark.parametrize("chunk", [1, 500, 2**22])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_scores_equal_those_of_torchmetrics_and_pytorch(chunk, temperature, monkeypatch):
    monkeypatch.setattr(row_upsample, "CHUNK_ELEMENTS", chunk)
    logits, target = example()
    kept = logits.clone()
    assert computed((logits, target), temperature=temperature) == pytest.approx(
        oracle(logits, target, temperature), abs=3e-5
    )
    whole = F.interpolate(logits, target.shape[-2:], mode="bilinear")
    labels = score_pixels(logits, target, temperature).labels
    assert (labels == whole.argmax(1)).float().mean() > 0.999  # rounding may break a tie either way
    assert torch.equal(logits, kept)


def test_scores_of_several_images_are_those_of_all_pixels():
    logits, target = example()
    alone = [(logits[i : i + 1], target[i : i + 1]) for i in range(2)]
    assert computed(*alone) == pytest.approx(oracle(logits, target), abs=3e-5)


def test_a_confidence_of_1_is_in_the_last_bin():
    logits = torch.tensor([[0.0, 200.0], [0.0, 3.0], [3.0, 0.0]]).T.view(1, 2, 1, 3)  # confidences 1, 0.953, 0.953
    target = torch.tensor([[[1, 0, 1]]])
    confidence = np.array([1, 1, 1]) - np.array([0, 1, 1]) / (1 + np.exp(3))
    assert computed((logits, target))[0] == pytest.approx(abs(1 / 3 - confidence.mean()), abs=3e-5)


def test_logits_at_the_size_of_the_target_are_not_changed():
    logits = torch.randn(1, K, 6, 8)
    kept = logits.clone()
    score_pixels(logits, torch.zeros(1, 6, 8, dtype=torch.uint8))
    assert torch.equal(logits, kept)


def test_without_a_labeled_pixel_the_scores_are_nan():
    logits, target = example()
    assert np.isnan(computed((logits, torch.full_like(target, 255)))).all()


def test_scores_need_no_float64_on_the_device(device_without_float64):
    logits, target = example()
    with device_without_float64:
        scores = computed((logits, target))
    assert scores == pytest.approx(oracle(logits, target), abs=3e-5)


def test_the_temperature_is_that_by_which_logits_were_too_large():
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(100_000, K, generator=random)
    labels = torch.multinomial(logits.softmax(1), 1, generator=random)[:, 0]  # calibrated by construction
    for factor in (0.5, 3.0):
        fitted = fit_temperature(factor * logits, labels)
        assert fitted == pytest.approx(factor, rel=0.02)
        grid = fitted * np.linspace(0.9, 1.1, 41)
        losses = [F.cross_entropy((factor * logits / value).double(), labels).item() for value in grid]
        assert np.argmin(losses) == 20  # the middle


def test_no_temperature_fits_predictions_that_are_no_better_than_chance():
    with pytest.raises(UserError, match=f"the best temperature of {K} pixels is .*; expected 0.01 to 100"):
        fit_temperature(torch.eye(K), (torch.arange(K) + 1) % K)


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_a_sample_has_the_logits_and_labels_of_labeled_pixels(chunk, monkeypatch):
    monkeypatch.setattr(row_upsample, "CHUNK_ELEMENTS", chunk)
    logits, target = example()
    whole = F.interpolate(logits, target.shape[-2:], mode="bilinear").movedim(1, -1)[target != 255]
    every, labels = sample_logits(LazyLogits((logits,)), target, 10**6, torch.Generator())
    torch.testing.assert_close(every, whole)
    assert torch.equal(labels, target[target != 255].long())
    some, few = sample_logits(LazyLogits((logits,)), target, 50, torch.Generator())
    assert some.shape == (50, K)
    distance = (some[:, None] - every).abs().amax(-1) + 1.0 * (few[:, None] != labels)
    assert distance.amin(1).max() < 1e-5


# --- the command


def whole_logits(model: ReverseHRNetSeg, folder: Path, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's plain computation: logits (n, K, H, W) and target of images of val."""
    images, masks = (
        torch.stack([torch.from_numpy(np.array(Image.open(folder / part / name))) for name in names])
        for part in ("val", "valannot")
    )
    with torch.no_grad():
        logits = model.eval().network(images.movedim(-1, 1))
    return F.interpolate(logits, images.shape[1:3], mode="bilinear"), torch.where(masks < 11, masks, 255)


@pytest.fixture
def own(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(checkpoint, tmp_path / "own.ckpt"))


@pytest.fixture
def data(camvid: Path, checkpoint: Path, tmp_path: Path) -> Path:
    """The fake replica with masks of which the network of the checkpoint knows a part."""
    root = Path(shutil.copytree(camvid, tmp_path / "data"))
    model, random = ReverseHRNetSeg.load_from_checkpoint(checkpoint), np.random.default_rng(0)
    for path in (root / "val").glob("*.png"):
        labels = model.predict(path)
        noise = random.integers(0, 12, labels.shape)  # 11 is ignored
        Image.fromarray(np.where(random.random(labels.shape) < 0.5, labels, noise).astype(np.uint8)).save(
            root / "valannot" / path.name
        )
    return root


def same(found: Any, expected: Any) -> bool:
    leaves = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in leaves)


def calibrate(camvid: Path, path: Path, *more: str) -> int:
    return main(["calibrate", "camvid", f"--data.root={camvid}", f"--ckpt_path={path}", "--output=out", *more])


@pytest.mark.usefixtures("elsewhere")
def test_calibrate_stores_the_temperature_that_fits_every_second_image(data, checkpoint, own, capsys):
    names = sorted(path.name for path in (data / "val").glob("*.png"))
    model = ReverseHRNetSeg.load_from_checkpoint(checkpoint)
    assert calibrate(data, own) == 0
    printed = capsys.readouterr().out
    written = json.loads(Path("out/calibration.json").read_text())
    temperature = written["temperature"]

    logits, target = whole_logits(model, data, names[::2])
    losses = [oracle(logits, target, temperature * factor)[1] for factor in (0.97, 1.0, 1.03)]
    assert min(losses) == losses[1]
    logits, target = whole_logits(model, data, names[1::2])
    for when, value in (("before", 1.0), ("after", temperature)):
        found = written[when]["ece"], written[when]["nll"]
        assert found == pytest.approx(oracle(logits, target, value), abs=5e-5)
        assert f"{found[1]:.4f}" in printed
    assert (written["images_fitted"], written["images_scored"]) == (2, 1)

    before, after = (torch.load(path, weights_only=True) for path in (checkpoint, own))
    assert after.pop("temperature") == temperature != before.pop("temperature") == 1.0
    assert same(after, before)

    calibrated = ReverseHRNetSeg.load_from_checkpoint(own)
    image = data / "val" / names[0]
    np.testing.assert_array_equal(calibrated.predict(image), model.predict(image))
    expected = (whole_logits(model, data, names[:1])[0][0] / temperature).softmax(0)
    np.testing.assert_allclose(calibrated.predict(image, probabilities=True), expected, atol=1e-3)

    assert calibrate(data, own) == 0  # "before" is always the temperature 1
    assert json.loads(Path("out/calibration.json").read_text())["before"] == written["before"]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_validate_scores_calibration_and_keeps_its_loss(temperature, camvid, own):
    store_temperature(str(own), temperature)
    data = ["--config=camvid", f"--data.root={camvid}", "--output=out"]
    assert main(["validate", *data, f"--ckpt_path={own}", *QUICK, QUIET[0]]) == 0
    results = json.loads(Path("out/results.json").read_text())
    names = sorted(path.name for path in (camvid / "val").glob("*.png"))
    logits, target = whole_logits(ReverseHRNetSeg.load_from_checkpoint(own), camvid, names)
    assert (results["ece"], results["nll"]) == pytest.approx(oracle(logits, target, temperature), abs=5e-5)
    metrics = Path("out/metrics.csv").read_text().splitlines()
    row = dict(zip(metrics[0].split(","), metrics[-1].split(","), strict=True))
    assert float(row["val/loss"]) == pytest.approx(oracle(logits, target)[1], rel=1e-5)


def test_each_validation_counts_its_own_pixels(camvid, checkpoint):
    model = ReverseHRNetSeg.load_from_checkpoint(checkpoint)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    for _ in range(2):
        trainer.validate(model, CamVidDataModule(camvid, num_workers=0), verbose=False)
    masks = [np.asarray(Image.open(path)) for path in (camvid / "valannot").glob("*.png")]
    assert model.calibration.counts.sum() == sum((mask < 11).sum() for mask in masks)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.filterwarnings("ignore:the best checkpoint so far stays")
def test_a_run_that_resumes_drops_the_temperature_of_other_weights(camvid, trained, tmp_path):
    path = shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt")
    store_temperature(path, 2.0)
    assert main(fit_args(camvid, Path("more"), f"--ckpt_path={path}", "--trainer.max_epochs=3")) == 0
    assert ReverseHRNetSeg.load_from_checkpoint("more/checkpoints/last.ckpt").temperature == 1.0


def test_the_temperature_of_an_older_format_is_stored_without_other_changes(tmp_path):
    old = Path(__file__).parent / "checkpoints" / "format_1.ckpt"
    path = shutil.copy(old, tmp_path / "old.ckpt")
    store_temperature(path, 1.5)
    before, after = (torch.load(file, weights_only=True) for file in (old, path))
    assert same(after, before | {"temperature": 1.5})


@pytest.mark.usefixtures("elsewhere")
def test_calibrate_names_data_that_do_not_suffice(camvid, own, tmp_path, monkeypatch, capsys):
    few = Path(shutil.copytree(camvid, tmp_path / "few"))
    (few / "val.txt").write_text((few / "val.txt").read_text().splitlines()[0] + "\n")
    assert calibrate(few, own) == 2
    assert "has 1 images; expected at least two with labels" in capsys.readouterr().err
    content = own.read_bytes()
    monkeypatch.setattr(settings, "MAX_WHOLE_PIXELS", 36 * 48 - 1)
    assert calibrate(camvid, own) == 2
    assert "all 2 images of val for fitting pass in windows" in capsys.readouterr().err
    assert own.read_bytes() == content
    assert not Path("out").exists()
