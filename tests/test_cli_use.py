import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from cli_runs import QUICK, QUIET, command, fit_args
from PIL import Image

from early_fusion_seg import ReverseHRNetSeg
from early_fusion_seg.__main__ import main

pytestmark = pytest.mark.usefixtures("elsewhere")


# --- validate and test


def run_validate(camvid: Path, checkpoint: Path, output: Path, *more: str, command: str = "validate") -> dict[str, Any]:
    data = ["--config=camvid", f"--data.root={camvid}", f"--output={output}"]
    assert main([command, *data, f"--ckpt_path={checkpoint}", *QUICK, QUIET[0], *more]) == 0
    results: dict[str, Any] = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return results


def numpy_scores(model: ReverseHRNetSeg, camvid: Path, split: str) -> tuple[float, list[float]]:
    """Mean IoU with absent classes as 0 (SegNet's rule), and the IoU of each class, nan where absent."""
    hit, union = np.zeros(11), np.zeros(11)
    for path in sorted((camvid / split).glob("*.png")):
        truth = np.asarray(Image.open(camvid / f"{split}annot" / path.name))
        prediction = np.where(truth < 11, model.predict(path), 255)
        for c in range(11):
            hit[c] += ((prediction == c) & (truth == c)).sum()
            union[c] += ((prediction == c) | (truth == c)).sum()
    iou = np.full(11, np.nan)
    iou[union > 0] = hit[union > 0] / union[union > 0]
    return float(np.nan_to_num(iou).mean()), iou.tolist()


@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_scores_equal_those_of_numpy(
    command: str, split: str, camvid: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_validate(camvid, checkpoint, tmp_path / "run", command=command)
    miou, per_class = numpy_scores(ReverseHRNetSeg.load_from_checkpoint(checkpoint).eval(), camvid, split)
    assert results["miou"] == pytest.approx(miou, abs=1e-9)
    for value, expected in zip(results["per_class"].values(), per_class, strict=True):
        assert value is None if np.isnan(expected) else value == pytest.approx(expected, abs=1e-9)
    assert list(results["per_class"])[:2] == ["Sky", "Building"]
    assert (results["split"], results["images"], results["partial"]) == (split, 3, False)
    assert (results["absent"], results["inference"]["scale"], results["seed"]) == ("zero", 1.0, 0)
    assert results["checkpoint"] == str(checkpoint)
    assert results["encoder"]["name"] == "resnet18"
    assert results["config"]["model"]["width"] == 4
    assert results["config"]["data"]["init_args"]["root"] == str(camvid)
    assert len(list((tmp_path / "run" / "panels" / split).glob("*.png"))) == 3
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("Bicyclist", "mIoU", "license", "results.json"))


def test_a_limited_validation_is_marked_partial(camvid: Path, checkpoint: Path, tmp_path: Path) -> None:
    results = run_validate(camvid, checkpoint, tmp_path / "run", "--trainer.limit_val_batches=2")
    assert (results["images"], results["partial"]) == (2, True)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_the_config_of_a_fit_run_can_be_passed_to_validate_and_test(
    command: str, trained: Path, tmp_path: Path
) -> None:
    config = trained / "config.yaml"
    assert "save_every_n_steps" in config.read_text(encoding="utf-8")  # an option of fit, without effect here
    args = [command, f"--config={config}", f"--ckpt_path={trained / 'checkpoints' / 'last.ckpt'}"]
    assert main([*args, f"--output={tmp_path / 'run'}"]) == 0
    assert (tmp_path / "run" / "results.json").is_file()


def test_the_new_place_of_an_encoder_file_can_be_given(camvid: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet18").state_dict(), weights)
    run = tmp_path / "run"
    assert main(fit_args(camvid, run, f"--model.encoder_weights={weights}", "--trainer.max_epochs=1")) == 0
    moved = weights.rename(tmp_path / "moved.pth")
    best = run / "checkpoints" / "best.ckpt"
    data = ["--config=camvid", f"--data.root={camvid}", f"--ckpt_path={best}", *QUICK]
    assert main(["validate", *data, f"--model.encoder_weights={moved}"]) == 0
    assert main(["validate", *data, f"--model.encoder_weights={weights}"]) == 0  # the checkpoint holds the weights
    other = {key: value + 0.01 for key, value in torch.load(moved).items()}
    torch.save(other, moved)
    assert main(["validate", *data, f"--model.encoder_weights={moved}"]) == 2


# --- predict


def image(path: Path, size: tuple[int, int] = (21, 33), mode: str = "RGB", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    ramp = np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, 0)
    Image.fromarray(ramp).convert("RGB").convert(mode).save(path, **options)


def predict(folder: Path, checkpoint: Path, output: Path, *more: str) -> int:
    return main(["predict", f"--data.root={folder}", f"--ckpt_path={checkpoint}", f"--output={output}", *QUICK, *more])


def test_predict_keeps_the_folders_and_writes_every_image(checkpoint: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in ("a.jpg", "a.png", "deep/er/b.webp", "c.tif"):
        image(photos / name)
    image(photos / "gray.png", mode="L")
    image(photos / "tiny.png", size=(1, 1))
    assert predict(photos, checkpoint, tmp_path / "out") == 0
    for kind in ("masks", "overlays"):
        written = {p.relative_to(tmp_path / "out" / kind).as_posix() for p in (tmp_path / "out" / kind).rglob("*.png")}
        assert written == {"a.jpg.png", "a.png.png", "deep/er/b.png", "c.png", "gray.png", "tiny.png"}
    model = ReverseHRNetSeg.load_from_checkpoint(checkpoint).eval()
    with Image.open(tmp_path / "out" / "masks" / "a.png.png") as mask:
        assert mask.mode == "P"
        assert mask.size == (33, 21)
        np.testing.assert_array_equal(np.asarray(mask), model.predict(photos / "a.png"))
        colors = np.array(mask.getpalette()).reshape(-1, 3)[:11]
    np.testing.assert_array_equal(colors, model.palette)
    with Image.open(tmp_path / "out" / "overlays" / "deep" / "er" / "b.png") as overlay:
        assert overlay.size == (33, 21)


def test_predictions_are_evaluated_like_the_model(camvid: Path, checkpoint: Path, tmp_path: Path) -> None:
    expected = run_validate(camvid, checkpoint, tmp_path / "run")
    assert predict(camvid / "val", checkpoint, tmp_path / "out") == 0
    args = ["evaluate", "camvid", f"--data.root={camvid}", "--predictions=out", "--output=scores"]
    for names_with_suffix in (False, True):  # as earlier versions wrote them
        if names_with_suffix:
            for path in list(Path("out/masks").glob("*.png")):
                path.rename(path.with_name(f"{path.name}.png"))
        assert main(args) == 0
        assert json.loads(Path("scores/results.json").read_text())["per_class"] == expected["per_class"]


@pytest.mark.parametrize("place", ["photos/*.png", "list.txt", "photos/a.png"])
def test_predict_takes_a_source_and_writes_what_is_asked_for(checkpoint: Path, tmp_path: Path, place: str) -> None:
    image(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "b.jpg").touch()
    Path("list.txt").write_text("photos/a.png\n")
    saved = ["labels", "confidence", "probabilities"]
    options = [f"--save=[{', '.join(saved)}]", "--classes", "[Car]", "--opacity", "1", "--legend", "true"]
    args = ["predict", "--ckpt_path", str(checkpoint), place, "--output=out", *options, *QUICK, QUIET[0]]
    assert main(args) == 0
    model = ReverseHRNetSeg.load_from_checkpoint(checkpoint).eval()
    expected = np.asarray(model.predict(tmp_path / "photos" / "a.png", probabilities=True))
    with np.load("out/probabilities/a.npz") as stored:
        np.testing.assert_array_equal(stored["probabilities"], expected)
    with Image.open("out/confidence/a.png") as confidence:
        np.testing.assert_allclose(np.asarray(confidence), 255 * expected.max(0).astype(np.float32), atol=0.7)
    with Image.open("out/masks/a.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask), model.predict(tmp_path / "photos" / "a.png"))
    assert not Path("out/overlays").exists()
    assert len(Path("out/summary.csv").read_text().splitlines()) == 2


def test_masks_have_the_exif_orientation_of_the_image(checkpoint: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image(tmp_path / "photos" / "turned.jpg", exif=exif)
    assert predict(tmp_path / "photos", checkpoint, tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "masks" / "turned.png") as mask:
        assert mask.size == (21, 33)


def test_unreadable_files_are_listed_and_the_others_are_segmented(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    image(photos / "a.png")
    image(photos / "z.png")
    (photos / "notes.doc").write_text("not an image", encoding="utf-8")
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:60])
    assert predict(photos, checkpoint, tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert str(photos / "notes.doc") in errors
    assert str(photos / "cut.png") in errors
    assert "a.png is" not in errors.replace("cut.png", "")
    assert sorted(path.name for path in (tmp_path / "out" / "masks").glob("*.png")) == ["a.png", "z.png"]


@pytest.mark.parametrize("output", [None, ".", "here"])
def test_predict_in_the_folder_of_the_images_leaves_out_what_it_wrote(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | None
) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "runs/fit/version_0/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/fit/version_0/checkpoints/last.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    args = ["predict", "--data.root=.", f"--ckpt_path={checkpoint}", *QUICK, QUIET[0]]
    for _ in range(2):
        assert main([*args, *([] if output is None else [f"--output={output}"])]) == 0
    runs = sorted((tmp_path / "runs/predict").iterdir()) if output is None else [tmp_path / output]
    assert len(runs) == (2 if output is None else 1)
    for run in runs:
        assert [path.name for path in (run / "masks").rglob("*.png")] == ["a.png"]


def test_python_m_prints_only_the_folder(checkpoint: Path, tmp_path: Path) -> None:
    image(tmp_path / "photos" / "a.png")
    args = command("predict", f"--data.root={tmp_path / 'photos'}", f"--ckpt_path={checkpoint}", *QUICK, QUIET[0])
    done = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "written: runs/predict/version_0\n"
    assert (tmp_path / "runs" / "predict" / "version_0" / "masks" / "a.png").is_file()
