"""The input size of training is that of every command, and all ways from a network to labels agree."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_runs import QUICK, QUIET, fit_args
from lightning.pytorch import Trainer
from PIL import Image

from early_fusion_seg import CamVidDataModule, CityscapesDataModule, InferenceSettings, ReverseHRNetSeg
from early_fusion_seg.__main__ import main
from early_fusion_seg.data.cityscapes import fake_cityscapes
from early_fusion_seg.errors import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def half(camvid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was trained at half scale."""
    run = tmp_path_factory.mktemp("half") / "run"
    assert main(fit_args(camvid, run, "--data.scale=0.5", "--data.crop_size=[18,24]")) == 0
    return run / "checkpoints" / "last.ckpt"


def whole_logits(model: ReverseHRNetSeg, path: Path, factor: float) -> torch.Tensor:
    """PyTorch's plain computation: resize, segment, upsample all logits to the size of the image."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float()
    size = pixels.shape[-2:]
    given = F.interpolate(pixels / 255, [round(factor * side) for side in size], mode="bilinear").clamp(0, 1)
    with torch.no_grad():
        return F.interpolate(model.eval().network(given), size, mode="bilinear")[0]


def commands(command: str, camvid: Path, checkpoint: Path, *more: str) -> list[str]:
    data = [*([] if command == "predict" else ["--config=camvid"]), f"--data.root={camvid}"]
    return [command, *data, f"--ckpt_path={checkpoint}", "--output=out", *QUICK, QUIET[0], *more]


def test_a_model_trained_at_half_scale_is_used_at_half_scale_and_scored_at_full_size(half: Path, camvid: Path) -> None:
    model = ReverseHRNetSeg.load_from_checkpoint(half)
    assert model.trained_at == (0.5, None)
    labels = {path.stem: whole_logits(model, path, 0.5).argmax(0).numpy() for path in (camvid / "val").glob("*.png")}
    at_full_scale = {path.stem: whole_logits(model, path, 1.0).argmax(0) for path in (camvid / "val").glob("*.png")}
    assert any((labels[key] != at_full_scale[key].numpy()).any() for key in labels)

    for path in (camvid / "val").glob("*.png"):  # Python
        np.testing.assert_array_equal(model.predict(path), labels[path.stem])
        confidence = whole_logits(model, path, 0.5).softmax(0).numpy()
        np.testing.assert_allclose(model.predict(path, probabilities=True), confidence, atol=1e-3)

    shutil.copytree(camvid / "val", "photos")  # predict
    assert main([*commands("predict", Path("photos"), half), "--output=predicted"]) == 0
    for key, expected in labels.items():
        np.testing.assert_array_equal(np.asarray(Image.open(f"predicted/masks/{key}.png")), expected)

    for command, split in (("validate", "val"), ("test", "test")):
        assert main(commands(command, camvid, half)) == 0
        results = json.loads(Path("out/results.json").read_text())
        right = total = 0
        for path in (camvid / split).glob("*.png"):
            truth = np.asarray(Image.open(camvid / f"{split}annot" / path.name))
            found = whole_logits(model, path, 0.5).argmax(0).numpy()
            right, total = right + ((found == truth) & (truth < 11)).sum(), total + (truth < 11).sum()
        assert results["pixel_accuracy"] == pytest.approx(right / total, abs=1e-9)
        assert results["inference"]["scale"] == 0.5
        assert results["plain"] is None
        shutil.rmtree("out")


def test_submit_uses_the_input_size_of_training(tmp_path: Path) -> None:
    root = fake_cityscapes(tmp_path / "data", images=2, size=(36, 48))
    data = CityscapesDataModule(root, scale=0.5)
    torch.manual_seed(0)
    model = ReverseHRNetSeg.for_data(data, encoder="resnet18", encoder_weights="random", width=4)
    assert model.trained_at == (0.5, None)
    trainer = Trainer(max_epochs=0, logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint("model.ckpt")
    options = ["submit", "cityscapes", f"--data.root={root}", "--ckpt_path=model.ckpt", "--output=up"]
    for more, factor in (([], 0.5), (["--inference.scale=1.0"], 1.0)):
        assert main([*options, *more]) == 0
        source = data.source("test")
        for item in source.items:
            expected = data.label_set.decode(whole_logits(model, item.image, factor).argmax(0).numpy().astype(np.uint8))
            np.testing.assert_array_equal(np.asarray(Image.open(f"up/labels/{item.key}.png")), expected)
        shutil.rmtree("up")


def test_options_override_the_input_size_and_add_passes(half: Path, camvid: Path, capsys) -> None:
    options = ["--inference.scale=1.0", "--inference.flip=true", "--inference.scales=[1.0, 2.0]"]
    assert main(commands("validate", camvid, half, *options)) == 0
    results = json.loads(Path("out/results.json").read_text())
    assert results["inference"] == {
        "scale": 1.0,
        "short_side": None,
        "flip": True,
        "scales": [1.0, 2.0],
        "window": "auto",
        "overlap": 128,
        "temperature": 1.0,
        "ensemble": 1,
    }
    model = ReverseHRNetSeg.load_from_checkpoint(half)
    model.inference = InferenceSettings(scale=1.0)
    right = total = 0
    for path in (camvid / "val").glob("*.png"):
        truth = np.asarray(Image.open(camvid / "valannot" / path.name))
        right, total = right + ((model.predict(path) == truth) & (truth < 11)).sum(), total + (truth < 11).sum()
    assert results["plain"]["pixel_accuracy"] == pytest.approx(right / total, abs=1e-9)
    assert results["plain"]["pixel_accuracy"] != results["pixel_accuracy"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "scales 1, 2, flip" in printed
    assert "in one pass" in printed


def test_another_scale_of_the_data_is_refused_with_the_option_to_give(half: Path, camvid: Path, capsys) -> None:
    assert main(commands("validate", camvid, half, "--data.scale=0.25")) == 2
    message = capsys.readouterr().err
    assert "the data module has scale 0.25, but the model was trained with scale 0.5" in message
    assert "--inference.scale" in message
    assert main(commands("validate", camvid, half, "--data.scale=0.5")) == 0  # as in the config.yaml of the run
    assert main([*commands("validate", camvid, half, "--data.scale=0.25", "--inference.scale=0.25"), "--output=b"]) == 0


@pytest.mark.filterwarnings("ignore:the best checkpoint so far stays")
def test_resuming_keeps_the_scale_of_the_data(half: Path, camvid: Path) -> None:
    other = ["--data.scale=0.75", "--data.crop_size=[27,36]", f"--ckpt_path={half}", "--trainer.max_epochs=3"]
    assert main(fit_args(camvid, Path("more"), *other)) == 0
    assert ReverseHRNetSeg.load_from_checkpoint("more/checkpoints/last.ckpt").trained_at == (0.75, None)


def test_images_in_windows_are_scored_and_stay_off_the_device(half: Path, camvid: Path) -> None:
    model = ReverseHRNetSeg.load_from_checkpoint(half)
    model.inference = InferenceSettings(scale=1.0, window=32, overlap=16)
    data = CamVidDataModule(camvid, num_workers=0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (scores,) = trainer.validate(model, data, verbose=False)
    right = total = 0
    for path in (camvid / "val").glob("*.png"):
        truth = np.asarray(Image.open(camvid / "valannot" / path.name))
        right, total = right + ((model.predict(path) == truth) & (truth < 11)).sum(), total + (truth < 11).sum()
    assert scores["val/pixel_accuracy"] == pytest.approx(right / total, abs=1e-6)
    assert np.isnan(scores["val/loss"])  # of images that pass whole
    batch = next(iter(data.val_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["image"].device.type == "cpu"
    assert moved["mask"].device.type == "meta"


def test_a_data_module_without_input_size_changes_nothing(camvid: Path, tmp_path: Path) -> None:
    model = ReverseHRNetSeg(11, encoder="resnet18", encoder_weights="random", width=4, ignore_index=255)
    with pytest.raises(UserError, match="trained with scale 1, which evaluation and prediction use too"):
        Trainer(accelerator="cpu", logger=False).validate(model, CamVidDataModule(camvid, scale=0.5), verbose=False)
