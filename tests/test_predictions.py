"""PredictionWriter with the data of a folder: what it writes, and with how much memory."""

import csv
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from early_fusion_seg import FolderDataModule
from early_fusion_seg.callbacks import PredictionWriter, predictions
from early_fusion_seg.callbacks.predictions import output_names
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.images import OUTPUT_MARK
from early_fusion_seg.labels import LabelSet

PALETTE = [[200, 0, 0], [0, 0, 200], [1, 200, 3]]
NAMES = ["dark", "bright, red", "never"]


class Brightness(LightningModule):
    """Class 1 is where the red channel is bright; the green channel is the confidence."""

    def __init__(self) -> None:
        super().__init__()
        self.class_names, self.palette, self.predict_probabilities = NAMES, PALETTE, False

    def predict_step(self, batch: dict[str, Any], index: int) -> dict[str, Any]:
        if "image" not in batch:
            return {"key": batch["key"], "error": batch["error"]}
        images = batch["image"]
        result = {"prediction": (images[:, 0] > 127).to(torch.uint8), "confidence": images[:, 1]}
        return result | ({"probabilities": (images / 255).half()} if self.predict_probabilities else {})


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (6, 40)) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def run(root: Path, writer: PredictionWriter) -> PredictionWriter:
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", callbacks=[writer], enable_checkpointing=False, **options)
    trainer.predict(Brightness(), datamodule=FolderDataModule(root, num_workers=0), return_predictions=False)
    return writer


def files(folder: Path) -> list[str]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != OUTPUT_MARK]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_everything_that_can_be_saved(tmp_path: Path) -> None:
    pixels = {"a": photo(tmp_path / "in/a.png"), "deep/b": photo(tmp_path / "in/deep/b.png", 1, (9, 5))}
    (tmp_path / "in/c.doc").write_text("no image")
    out = tmp_path / "out"
    writer = run(tmp_path / "in", PredictionWriter(out, ["probabilities", "labels", "overlay", "confidence"]))
    assert len(writer.unreadable) == 1
    kinds = {"confidence": "png", "masks": "png", "overlays": "png", "probabilities": "npz"}
    written = [f"{kind}/{name}.{suffix}" for kind, suffix in kinds.items() for name in pixels]
    assert files(out) == sorted([*written, "labels.csv", "legend.png", "summary.csv"])
    with (out / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["a.png", "deep/b.png"]
    for (name, image), row in zip(pixels.items(), rows, strict=True):
        bright = image[..., 0] > 127
        np.testing.assert_array_equal(read(out / f"masks/{name}.png"), bright)
        np.testing.assert_array_equal(read(out / f"confidence/{name}.png"), image[..., 1])
        with np.load(out / f"probabilities/{name}.npz") as stored:
            assert stored["probabilities"].dtype == np.float16
            np.testing.assert_allclose(stored["probabilities"], image.transpose(2, 0, 1) / 255, atol=1e-3)
            assert stored["class_names"].tolist() == NAMES
        assert (int(row["height"]), int(row["width"])) == bright.shape
        assert float(row["mean_confidence"]) == pytest.approx(image[..., 1].mean() / 255, abs=1e-4)
        assert float(row["bright, red"]) == pytest.approx(bright.mean(), abs=1e-6)
        assert float(row["dark"]) == pytest.approx(1 - bright.mean(), abs=1e-6)
        assert float(row["never"]) == 0
    classes = LabelSet.from_csv(out / "labels.csv")
    assert (list(classes.class_names), [list(color) for color in classes.palette]) == (NAMES, PALETTE)
    assert classes.raw_to_train == ((0, 0), (1, 1), (2, 2))
    assert {tuple(color) for color in PALETTE} <= {tuple(color) for color in read(out / "legend.png").reshape(-1, 3)}


def test_names_lose_the_suffix_unless_two_would_be_the_same(tmp_path: Path) -> None:
    keys = ["a.jpg", "b.JPG", "b.png", "C.tif", "c.webp", "d.jpg", "d.jpg.png", "e", "e.png", "f.v2", "s/a.jpeg"]
    names = output_names(keys)
    assert names == {key: key for key in keys} | {"a.jpg": "a", "d.jpg": "d", "s/a.jpeg": "s/a"}
    assert len({name.lower() for name in names.values()}) == len(keys)
    for key in ("a.png", "b.gif", "b.png"):
        photo(tmp_path / "in" / key)
    run(tmp_path / "in", PredictionWriter(tmp_path / "out", ["labels"]))
    assert files(tmp_path / "out/masks") == ["a.png", "b.gif.png", "b.png.png"]


def test_overlays_show_the_chosen_classes_with_the_opacity_and_a_legend(tmp_path: Path) -> None:
    image = photo(tmp_path / "in/a.png", size=(6, 300))
    run(tmp_path / "in", PredictionWriter(tmp_path / "out", ["overlay"], ["never", "bright, red"], 0.75, legend=True))
    shown = read(tmp_path / "out/overlays/a.png")
    bright = (image[..., 0] > 127)[..., None]
    expected = np.where(bright, np.rint(0.25 * image + 0.75 * np.array(PALETTE[1])), image)
    np.testing.assert_array_equal(shown[:6], expected)
    colors = {tuple(color) for color in shown[6:].reshape(-1, 3).tolist()}
    assert (0, 0, 200) in colors
    assert not colors & {(200, 0, 0), (1, 200, 3)}  # not chosen, and not in the image
    assert shown.shape[1] == 300
    legend = {tuple(color) for color in read(tmp_path / "out/legend.png").reshape(-1, 3).tolist()}
    assert legend >= {(0, 0, 200), (1, 200, 3)}
    assert (200, 0, 0) not in legend


def test_an_overlay_is_as_wide_as_its_legend(tmp_path: Path) -> None:
    image = photo(tmp_path / "in/a.png", size=(6, 5))
    run(tmp_path / "in", PredictionWriter(tmp_path / "out", ["overlay"], opacity=0, legend=True))
    shown = read(tmp_path / "out/overlays/a.png")
    np.testing.assert_array_equal(shown[:6, :5], image)
    assert (shown[:6, 5:] == 255).all()
    assert shown.shape[1] > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save": ["masks"]}, "save has 'masks'; expected some of labels, overlay, confidence, probabilities"),
        ({"opacity": 1.5}, "opacity is 1.5; expected a number in 0..1"),
        ({"classes": ["dark", "Dark"]}, "classes has 'Dark'; the classes of the model are dark, bright, red, never"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    with pytest.raises(UserError, match=message):
        run(tmp_path / "in", PredictionWriter(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_the_label_table_of_other_classes_is_not_replaced(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    for _ in range(2):  # its own is written again
        run(tmp_path / "in", PredictionWriter(tmp_path / "out"))
    table = "raw_id,train_id,name,color\n7,0,road,#000000\n"
    (tmp_path / "out/labels.csv").write_text(table)
    with pytest.raises(UserError, match=r"labels\.csv has other classes than the model, or other raw ids"):
        run(tmp_path / "in", PredictionWriter(tmp_path / "out"))
    assert (tmp_path / "out/labels.csv").read_text() == table


def test_probabilities_that_need_too_much_memory_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "MAX_PROBABILITIES", 6 * 40 * 3 * 2)
    photo(tmp_path / "in/a.png")
    photo(tmp_path / "in/b.png", size=(6, 41))
    photo(tmp_path / "in/c.png")
    problems = run(tmp_path / "in", PredictionWriter(tmp_path / "out", ["probabilities", "labels"])).unreadable
    assert len(problems) == 1
    assert problems[0].startswith("b.png: its probabilities would take 0.0 GB (3 classes, 41x6 pixels), more than 1.")
    assert files(tmp_path / "out/masks") == ["a.png", "b.png", "c.png"]
    assert files(tmp_path / "out/probabilities") == ["a.npz", "c.npz"]


def test_a_module_without_confidence_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Brightness, "predict_step", lambda *_: {"prediction": torch.zeros(1, 6, 40, dtype=torch.uint8)})
    photo(tmp_path / "in/a.png")
    writer = run(tmp_path / "in", PredictionWriter(tmp_path / "out", ["confidence", "labels"]))
    assert writer.unreadable == ["a.png: predict_step of Brightness returns no confidence"]
    assert "a.png,40,6,,1.000000,0.000000,0.000000" in (tmp_path / "out/summary.csv").read_text()


def test_a_large_image_is_written_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("early_fusion_seg.io.png.BAND_PIXELS", 2**14)
    side = 1500
    image = torch.arange(side, dtype=torch.int32).to(torch.uint8).expand(3, side, side).contiguous()
    labels = (image[0] > 127).to(torch.uint8)
    outputs = {"prediction": labels[None], "confidence": image[None, 1]}
    writer = PredictionWriter(tmp_path, ["labels", "overlay", "confidence"], legend=True)
    tracemalloc.start()
    try:
        writer.on_predict_batch_end(Trainer(logger=False), Brightness(), outputs, {"key": ["a"], "image": image[None]})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * side**2  # bytes; one overlay alone has 3 per pixel
    assert read(tmp_path / "overlays/a.png")[:side].shape == (side, side, 3)
