"""predict, validate and test with several checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import QUICK, QUIET
from lightning.pytorch import Trainer
from PIL import Image

from early_fusion_seg import CamVidDataModule, ReverseHRNetSeg
from early_fusion_seg.__main__ import main

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of three models, of which the first and the last have the same classes, and best.ckpt as name."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    camvid = CamVidDataModule("none")
    paths = [
        folder / "a" / "checkpoints" / "best.ckpt",
        folder / "few.ckpt",
        folder / "b" / "checkpoints" / "best.ckpt",
    ]
    for i, path in enumerate(paths):
        options = {"encoder": "resnet18", "encoder_weights": "random", "width": 4 + 4 * i}
        model = ReverseHRNetSeg(3, **options) if i == 1 else ReverseHRNetSeg.for_data(camvid, **options)
        with torch.no_grad():  # classes of about the same frequency
            image = torch.randint(0, 256, (1, 3, 36, 48), dtype=torch.uint8)
            model.network.head.classifiers["4"].bias -= model.eval()(image).mean((0, 2, 3))
        trainer = Trainer(max_epochs=0, logger=False, enable_checkpointing=False, accelerator="cpu")
        trainer.strategy.connect(model)
        trainer.save_checkpoint(path)
    return paths


def listed(paths: list[Path]) -> str:
    return f"--ckpt_path=[{', '.join(map(str, paths))}]"


def read_masks(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "masks").glob("*.png"))}


def test_predict_writes_a_folder_for_each_head_with_the_bits_of_separate_runs(
    models: list[Path], camvid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos").mkdir()
    for path in (camvid / "val").glob("*.png"):
        Image.open(path).convert("RGB").save(Path("photos", path.name))
    Path("photos/cut.png").write_bytes(b"no image")
    options = ["predict", "--data.root=photos", *QUICK, QUIET[0]]
    assert main([*options, listed(models[::2]), "--output=two"]) == 1
    assert capsys.readouterr().err.count("cut.png is") == 1
    assert main([*options, listed(models), "--output=all"]) == 1
    assert {path.name for path in Path("two").iterdir() if path.is_dir()} == {"a", "b"}
    assert {path.name for path in Path("all").iterdir() if path.is_dir()} == {"a", "few", "b"}
    for i, path in enumerate(models):
        assert main([*options, f"--ckpt_path={path}", f"--output=alone{i}"]) == 1
        alone = read_masks(Path(f"alone{i}"))
        assert len(alone) == 3
        assert len(np.unique(np.stack(list(alone.values())))) > 1
        name = ("a", "few", "b")[i]
        folders = [Path("all", name), *([] if name == "few" else [Path("two", name)])]
        for folder in folders:
            found = read_masks(folder)
            assert found.keys() == alone.keys()
            assert all((found[name] == alone[name]).all() for name in alone)
            written = {file.relative_to(folder) for file in folder.rglob("*.*")}
            assert written >= {file.relative_to(f"alone{i}") for file in Path(f"alone{i}", "overlays").rglob("*.*")}


def test_an_ensemble_is_scored_and_predicted_like_the_mean_of_the_probabilities(
    models: list[Path], camvid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [ReverseHRNetSeg.load_from_checkpoint(path) for path in models[::2]]
    options = [f"--data.root={camvid}", *QUICK, QUIET[0], listed(models[::2]), "--ensemble=mean"]
    assert main(["validate", "--config=camvid", *options, "--output=scored"]) == 0
    assert main(["predict", *options, f"--data.root={camvid / 'val'}", "--output=predicted"]) == 0
    results = json.loads(Path("scored/results.json").read_text())
    masks = read_masks(Path("predicted"))
    right = alone = total = 0
    for path in (camvid / "val").glob("*.png"):
        truth = np.asarray(Image.open(camvid / "valannot" / path.name))
        mean = np.mean([model.predict(path, probabilities=True).astype(np.float32) for model in both], axis=0)
        (mask,) = [mask for name, mask in masks.items() if name.startswith(path.stem)]
        assert (mask == mean.argmax(0)).mean() > 0.99  # probabilities are rounded to float16
        right, total = right + ((mask == truth) & (truth < 11)).sum(), total + (truth < 11).sum()
        alone += ((both[0].predict(path) == truth) & (truth < 11)).sum()
    assert results["pixel_accuracy"] == pytest.approx(right / total, abs=1e-9)
    assert results["plain"]["pixel_accuracy"] == pytest.approx(alone / total, abs=1e-9)
    assert right != alone
    assert results["checkpoint"] == [str(path) for path in models[::2]]
    assert results["inference"]["ensemble"] == 2
    assert "first alone" in " ".join(capsys.readouterr().out.split())


def test_several_checkpoints_that_make_no_sense_are_refused(
    models: list[Path], camvid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--config=camvid", f"--data.root={camvid}", *QUICK]
    for more, message in (
        (["validate", listed(models[::2])], "validate scores one model and got 2 checkpoints"),
        (["validate", listed(models[:1]), "--ensemble=mean"], "--ensemble needs several checkpoints"),
        (["validate", listed(models[:2]), "--ensemble=mean"], "class 0 is 'Sky' in the data, but 'class 0' in"),
        (["predict", f"--data.root={camvid / 'val'}", listed(models[:2]), "--ensemble=mean"], "with the same classes"),
        (["fit", listed(models[::2])], "there is no checkpoint ["),
    ):
        assert main([more[0], *(options if more[0] != "predict" else QUICK), *more[1:]]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("runs").exists()
