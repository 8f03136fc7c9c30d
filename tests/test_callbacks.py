import csv
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import QUICK, QUIET
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from early_fusion_seg.__main__ import main
from early_fusion_seg.callbacks import (
    ClassIoU,
    PanelLogger,
    PredictionWriter,
    ResultsWriter,
    Throughput,
    ValidateAtEnd,
    check_images,
    path_inside,
    to_pixels,
)
from early_fusion_seg.callbacks.class_iou import names_for_loggers
from early_fusion_seg.callbacks.slow_bfloat16 import SlowBfloat16Warning
from early_fusion_seg.data.folder import FolderDataModule
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.images import OUTPUT_MARK
from early_fusion_seg.metrics import SegmentationMetrics
from early_fusion_seg.visualize import overlay

PALETTE = [[200, 0, 0], [0, 0, 200]]


class Encoder(nn.Module):
    name = "brightness"
    source = "hub"
    package = None
    license = "CC0"

    def fingerprint(self) -> str:
        return "00" * 32


class Brightness(LightningModule):
    """A module with all that the callbacks need and no network: class 1 is where the red channel is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.class_names = ["dark", "bright"]
        self.palette = PALETTE
        self.ignore_index = 255
        self.network = nn.Module()
        self.network.encoder = Encoder()
        self.metrics = nn.ModuleDict({split: SegmentationMetrics(2) for split in ("val", "test")})
        self.weight = nn.Parameter(torch.zeros(()))

    def label(self, batch: dict[str, Any]) -> Tensor:
        red = batch["image"][:, 0]
        return (red > (0.5 if red.is_floating_point() else 127)).to(torch.uint8)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        return self.score(batch, "val")

    def test_step(self, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        return self.score(batch, "test")

    def score(self, batch: dict[str, Any], split: str) -> dict[str, Tensor]:
        prediction = self.label(batch)
        self.metrics[split].update(prediction, batch["mask"])
        return {"prediction": prediction}

    def predict_step(self, batch: dict[str, Any], index: int) -> dict[str, Tensor] | None:
        return {"prediction": self.label(batch)} if "image" in batch else None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Pictures(LightningDataModule):
    def __init__(self, samples: list[dict[str, Any]], batch_size: int = 1) -> None:
        super().__init__()
        self.samples = samples
        self.batch_size = batch_size

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=self.batch_size)

    train_dataloader = test_dataloader = predict_dataloader = val_dataloader


def sample(key: str, seed: int = 0, size: tuple[int, int] = (5, 8)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "key": key,
        "image": torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator),
        "mask": torch.randint(0, 2, size, dtype=torch.uint8, generator=generator),
    }


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "logger": CSVLogger(folder, name="", version=""),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "max_epochs": 2,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | options))


def pngs(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != OUTPUT_MARK]
    return sorted(path.relative_to(folder).as_posix() for path in files)


# --- panels


def test_each_validation_draws_panels_of_the_first_images(tmp_path: Path) -> None:
    data = Pictures([sample(f"deep/{i}.jpg", i) for i in range(4)], batch_size=3)
    trainer(tmp_path, PanelLogger(2)).fit(Brightness(), datamodule=data)
    assert pngs(tmp_path / "panels") == [f"last/deep/{i}.jpg.png" for i in (0, 1)]  # of both validations


class Scores(Brightness):
    """Logs given scores, one in each validation."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = list(scores)

    def on_validation_epoch_end(self) -> None:
        self.log("val/mIoU", self.scores.pop(0))


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")  # the second run's
def test_the_panels_of_the_best_validation_are_kept(tmp_path: Path) -> None:
    data = Pictures([sample(f"{i}", i) for i in range(2)])
    drawn = PanelLogger(1)
    options: dict[str, Any] = {"num_sanity_val_steps": 0, "max_epochs": 1}
    best: list[int] = []
    for score in (0.2, 0.1, 0.3):
        callback = PanelLogger(1)
        callback.load_state_dict(drawn.state_dict())  # as a resumed run does
        trainer(tmp_path, callback, **options).fit(Scores(score), datamodule=data)
        best.append((tmp_path / "panels" / "best" / "0.png").stat().st_mtime_ns)
        drawn = callback
    assert pngs(tmp_path / "panels") == ["best/0.png", "last/0.png"]
    assert best[0] == best[1] < best[2]


def test_a_panel_shows_truth_and_prediction_in_the_colors_of_the_classes(tmp_path: Path) -> None:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[0, :, 30:] = 255  # predicted 1 on the right; the truth is 0 everywhere
    data = Pictures([{"key": "a", "image": image, "mask": torch.zeros(40, 60, dtype=torch.uint8)}])
    trainer(tmp_path, PanelLogger()).test(Brightness(), datamodule=data, verbose=False)
    with Image.open(tmp_path / "panels" / "test" / "a.png") as panel:
        colors = {color for _, color in panel.convert("RGB").getcolors(1 << 24) or []}
    assert tuple(PALETTE[0]) in colors
    assert tuple(PALETTE[1]) in colors
    assert (255, 0, 0) in colors  # the image itself


def test_panels_of_validate_have_a_folder_without_step_number(tmp_path: Path) -> None:
    trainer(tmp_path, PanelLogger()).validate(Brightness(), datamodule=Pictures([sample("a")]), verbose=False)
    assert pngs(tmp_path / "panels") == ["val/a.png"]


def test_a_logger_without_images_gets_no_panels(tmp_path: Path) -> None:
    from lightning.pytorch.loggers.logger import DummyLogger

    run = trainer(tmp_path, PanelLogger(), logger=DummyLogger(), default_root_dir=tmp_path)
    run.validate(Brightness(), datamodule=Pictures([sample("a")]), verbose=False)
    assert pngs(tmp_path) == []


# --- the IoU of each class


def rows(folder: Path, column: str) -> list[dict[str, str]]:
    """Return the rows of metrics.csv that have a value in the column."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get(column)]


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_iou_of_each_class_is_logged_by_name(split: str, tmp_path: Path) -> None:
    samples = [sample(str(i), i) for i in range(3)]
    run = trainer(tmp_path, ClassIoU())
    (run.validate if split == "val" else run.test)(Brightness(), datamodule=Pictures(samples), verbose=False)
    truth = np.concatenate([s["mask"].numpy().ravel() for s in samples])
    predicted = np.concatenate([(s["image"][0].numpy() > 127).ravel() for s in samples])
    (row,) = rows(tmp_path, f"{split}/IoU/dark")
    for c, name in enumerate(("dark", "bright")):
        iou = ((truth == c) & (predicted == c)).sum() / ((truth == c) | (predicted == c)).sum()
        assert float(row[f"{split}/IoU/{name}"]) == pytest.approx(iou)


def test_absent_classes_are_not_logged_and_the_progress_bar_shows_no_class_iou(tmp_path: Path) -> None:
    dark = {"key": "a", "image": torch.zeros(3, 4, 4, dtype=torch.uint8), "mask": torch.zeros(4, 4, dtype=torch.uint8)}
    run = trainer(tmp_path, ClassIoU())
    run.fit(Brightness(), datamodule=Pictures([dark]))
    assert [row["val/IoU/dark"] for row in rows(tmp_path, "val/IoU/dark")] == ["1.0", "1.0"]  # two epochs
    assert "val/IoU/bright" not in run.logged_metrics
    assert not [name for name in run.progress_bar_metrics if "IoU" in name]


def test_class_names_become_unique_names_without_special_characters() -> None:
    odd = [
        "Straße",
        "a b",
        "a/b",
        "a_b",
        "A.b",
        "-x-",
        "",
        "?",
        "a\nb",
        "a\x00b",
        "Lane - (General)",
        "_hidden",
        "a__b",
    ]
    names = names_for_loggers(odd)
    assert len(set(names)) == len(odd)
    assert all(name and name.replace("_", "").replace("-", "").isalnum() for name in names)
    assert names[0] == "Straße"
    assert names[10] == "Lane_-_General"


PROCESSES = """
import sys, torch
from pathlib import Path
from test_callbacks import Brightness, Pictures, sample, trainer
from early_fusion_seg.callbacks import ClassIoU, ResultsWriter, Throughput

folder, devices = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
strategy = "ddp" if devices > 1 else "auto"
options = dict(devices=devices, strategy=strategy, num_sanity_val_steps=0)  # Brightness does not reset its metrics
run = trainer(folder, Throughput(), ClassIoU(), ResultsWriter(), **options)
data = Pictures([sample(str(i), i) for i in range(4)])
run.fit(Brightness(), datamodule=data)
run.test(Brightness(), datamodule=data, verbose=False)
"""


@pytest.mark.slow
def test_two_processes_log_and_write_the_same_as_one(tmp_path: Path) -> None:
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for devices in ("1", "2"):
        command = [sys.executable, str(script), str(tmp_path / devices), devices]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    one, two = tmp_path / "1", tmp_path / "2"
    for name in ("val/IoU/dark", "test/IoU/bright"):
        assert [row[name] for row in rows(one, name)] == [row[name] for row in rows(two, name)] != []
    assert (one / "confusion.png").read_bytes() == (two / "confusion.png").read_bytes()
    assert len(rows(two, "train/data_wait")) == len(rows(one, "train/data_wait")) // 2 == 4  # steps in two epochs


# --- throughput


class SlowLoader(Pictures):
    """Advances a fake clock by 3 s for each batch."""

    def __init__(self, clock: "FakeClock", **options: Any) -> None:
        super().__init__([sample(str(i)) for i in range(12)], **options)
        self.clock = clock

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        clock = self.clock

        class WaitingLoader:
            def __len__(self) -> int:
                return len(loader)

            def __iter__(self) -> Iterator[Any]:
                for batch in loader:
                    clock.now += 3
                    yield batch

        return WaitingLoader()


class FakeClock:
    """A replacement of the module `time` that only tests advance."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class SlowStep(Brightness):
    """Advances a fake clock by 1 s for each step of the first epoch, by 2 s for each of the second."""

    def __init__(self, clock: FakeClock, at_first: int = 0) -> None:
        super().__init__()
        self.clock = clock
        self.at_first = at_first

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        self.clock.now += 1 + self.current_epoch + (self.at_first if index == 0 else 0)
        return super().training_step(batch, index)

    def on_validation_epoch_end(self) -> None:
        self.clock.now += 1000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr("early_fusion_seg.callbacks.throughput.time", clock)
    return clock


@pytest.mark.parametrize(("every", "accumulate", "steps"), [(1, 1, 12), (2, 1, 6), (1, 2, 6)])
def test_throughput_and_data_wait_measured_with_a_fake_clock(
    every: int, accumulate: int, steps: int, clock: FakeClock, tmp_path: Path
) -> None:
    options = {"log_every_n_steps": every, "accumulate_grad_batches": accumulate, "val_check_interval": 4}
    run = trainer(tmp_path, Throughput(), **options)
    run.fit(SlowStep(clock), datamodule=SlowLoader(clock, batch_size=2))  # 6 batches an epoch, validation also amid one
    logged = rows(tmp_path, "train/data_wait")
    assert len(logged) == steps
    speeds = [float(row["train/images_per_second"]) for row in logged]
    waits = [float(row["train/data_wait"]) for row in logged]
    assert min(speeds) > 0.1  # nothing of the 1000 s of a validation
    for row, speed, wait in zip(logged, speeds, waits, strict=True):
        assert speed == pytest.approx(2 * (1 - wait) / (1 + int(row["epoch"])))  # of these steps alone
    assert 0 <= min(waits) < max(waits) < 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_validation_all_loading_counts_as_data_wait(accumulate: int, clock: FakeClock, tmp_path: Path) -> None:
    every = 6 // accumulate
    run = trainer(tmp_path, Throughput(), max_epochs=1, log_every_n_steps=every, accumulate_grad_batches=accumulate)
    run.fit(SlowStep(clock, at_first=6), datamodule=SlowLoader(clock, batch_size=2))
    (row,) = rows(tmp_path, "train/data_wait")
    assert float(row["train/data_wait"]) == pytest.approx(6 * 3 / (6 * 3 + 6 * 1 + 6))
    assert float(row["train/images_per_second"]) == pytest.approx(12 / 30)
    assert "train/gpu_memory_gib" not in row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_memory_is_logged(tmp_path: Path) -> None:
    trainer(tmp_path, Throughput(), accelerator="gpu").fit(Brightness(), datamodule=Pictures([sample("a")]))
    assert all(float(row["train/gpu_memory_gib"]) > 0 for row in rows(tmp_path, "train/data_wait"))


# --- results


def test_results_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [sample(str(i), i) for i in range(3)]
    writer = ResultsWriter(tmp_path / "run", "x.ckpt", {"a": 1})
    trainer(tmp_path, writer).test(Brightness(), datamodule=Pictures(samples), verbose=False)
    assert (tmp_path / "run" / "results.json").is_file()
    results = writer.results
    assert results is not None
    truth = np.concatenate([s["mask"].numpy().ravel() for s in samples])
    predicted = np.concatenate([(s["image"][0].numpy() > 127).ravel() for s in samples])
    for c, name in enumerate(("dark", "bright")):
        iou = ((truth == c) & (predicted == c)).sum() / ((truth == c) | (predicted == c)).sum()
        assert results["per_class"][name] == pytest.approx(iou)
    assert results["pixel_accuracy"] == pytest.approx((truth == predicted).mean())
    assert (results["images"], results["partial"], results["inference"]) == (3, False, None)
    assert (results["checkpoint"], results["config"], results["data"]) == ("x.ckpt", {"a": 1}, "Pictures")
    facts = {"name": "brightness", "weights": "hub", "package": None, "fingerprint": "00" * 32, "license": "CC0"}
    assert results["encoder"] == facts
    printed = capsys.readouterr().out
    assert "bright" in printed
    assert "license of the weights: CC0" in " ".join(printed.split())
    assert "results.json" in printed


def test_results_go_to_the_log_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    writer = ResultsWriter()
    trainer(tmp_path, writer).validate(Brightness(), datamodule=Pictures([sample("a")]), verbose=False)
    assert (tmp_path / "results.json").is_file()
    assert writer.results is not None
    assert (writer.results["split"], writer.results["seed"], writer.results["checkpoint"]) == ("val", None, None)


def test_fit_writes_no_results(tmp_path: Path) -> None:
    writer = ResultsWriter()
    trainer(tmp_path, writer).fit(Brightness(), datamodule=Pictures([sample("a")]))
    assert writer.results is None
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("limit", [2, 0.5])
def test_limited_batches_make_the_results_partial(limit: float, tmp_path: Path) -> None:
    writer = ResultsWriter()
    data = Pictures([sample(str(i)) for i in range(4)])
    trainer(tmp_path, writer, limit_test_batches=limit).test(Brightness(), datamodule=data, verbose=False)
    assert writer.results is not None
    assert (writer.results["images"], writer.results["partial"]) == (2, True)


def test_a_limit_above_the_number_of_batches_gives_complete_results(tmp_path: Path) -> None:
    writer = ResultsWriter()
    data = Pictures([sample("a")])
    trainer(tmp_path, writer, limit_test_batches=9).test(Brightness(), datamodule=data, verbose=False)
    assert writer.results is not None
    assert writer.results["partial"] is False


class SkipsFirstImage(Brightness):
    def test_step(self, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        return self.score(batch, "test") if index else {"prediction": self.label(batch)}


def test_an_image_that_was_not_scored_is_an_error(tmp_path: Path) -> None:
    data = Pictures([sample("a"), sample("b")])
    with pytest.raises(UserError, match="1 images were scored, but the test split has 2"):
        trainer(tmp_path, ResultsWriter()).test(SkipsFirstImage(), datamodule=data, verbose=False)
    assert not (tmp_path / "results.json").exists()


def test_an_image_scored_twice_is_an_error_even_if_batches_are_limited(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_test_batches=1)
    run.test(Brightness(), datamodule=Pictures([sample("a"), sample("b")]), verbose=False)
    with pytest.raises(UserError, match="3 images"):
        check_images(run, "test", 3)


# --- predictions


def predict(folder: Path, samples: list[dict[str, Any]]) -> PredictionWriter:
    writer = PredictionWriter(folder)
    trainer(folder.parent, writer, logger=False).predict(
        Brightness(), datamodule=Pictures(samples), return_predictions=False
    )
    return writer


def test_predictions_are_written_as_indexed_masks_and_overlays(tmp_path: Path) -> None:
    one = sample("sub/a.jpg", 1, (6, 9))
    predict(tmp_path / "out", [one, sample("a.png", 2), sample("a.jpg", 3)])
    files = (f"{kind}/{key}.png" for kind in ("masks", "overlays") for key in ("sub/a.jpg", "a.png", "a.jpg"))
    assert pngs(tmp_path / "out") == sorted([*files, "labels.csv", "legend.png", "summary.csv"])
    expected = (one["image"][0].numpy() > 127).astype(np.uint8)
    with Image.open(tmp_path / "out" / "masks" / "sub" / "a.jpg.png") as mask:
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), expected)
        np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), np.array(PALETTE, np.uint8)[expected])
    with Image.open(tmp_path / "out" / "overlays" / "sub" / "a.jpg.png") as shown:
        picture = one["image"].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(np.asarray(shown), overlay(picture, expected, PALETTE))


def test_each_prediction_is_written_before_the_next_image_is_read(tmp_path: Path) -> None:
    class LazySamples:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict[str, Any]:
            assert (tmp_path / "out" / "overlays" / "0.png").exists() == (index == 1)
            return sample(str(index))

    predict(tmp_path / "out", LazySamples())


@pytest.mark.filterwarnings("ignore:predict returned None")  # for an image that cannot be read
def test_errors_of_unreadable_images_are_collected(tmp_path: Path) -> None:
    samples = [{"key": "b.txt", "error": "b.txt is not an image"}, sample("a.png")]
    assert predict(tmp_path / "out", samples).unreadable == ["b.txt is not an image"]
    assert pngs(tmp_path / "out" / "masks") == ["a.png.png"]


def test_a_prediction_that_cannot_be_named_is_reported_and_the_others_are_written(tmp_path: Path) -> None:
    long = "\u5199" * 83 + ".jpg"  # 253 bytes
    problems = predict(tmp_path / "out", [sample("a"), sample(long), sample("b")]).unreadable
    assert len(problems) == 1
    assert problems[0].endswith(f"masks/{long}.png cannot be written (File name too long); rename the image")
    assert pngs(tmp_path / "out/masks") == pngs(tmp_path / "out/overlays") == ["a.png", "b.png"]


def test_a_panel_that_cannot_be_named_is_left_out_with_a_warning(tmp_path: Path) -> None:
    data = Pictures([sample("a"), sample("x" * 252)])
    with pytest.warns(UserWarning, match=r"a panel is left out: .*xx\.png cannot be written \(File name too long\)"):
        trainer(tmp_path, PanelLogger()).validate(Brightness(), datamodule=data, verbose=False)
    assert pngs(tmp_path / "panels") == ["val/a.png"]


def test_predictions_and_panels_are_not_predicted_again(tmp_path: Path) -> None:
    predict(tmp_path / "out", [sample("a"), sample("sub/b")])
    trainer(tmp_path / "run", PanelLogger()).validate(Brightness(), datamodule=Pictures([sample("a")]), verbose=False)
    Image.new("RGB", (3, 3)).save(tmp_path / "photo.png")
    Image.new("RGB", (3, 3)).save(tmp_path / "out" / "photo.png")
    source = FolderDataModule(tmp_path).source("predict")
    assert [source.key(i) for i in range(len(source))] == ["out/photo.png", "photo.png"]
    assert len(FolderDataModule(tmp_path / "out" / "masks").source("predict")) == 2  # where it is asked for


@pytest.mark.parametrize("key", ["../a", "/a", "b/../../../a"])
def test_nothing_is_written_outside_of_the_folder(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="outside of"):
        predict(tmp_path / "out", [sample(key)])
    assert pngs(tmp_path) == ["out/labels.csv", "out/legend.png"]


def test_a_symbolic_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="outside of"):
        path_inside(tmp_path / "out", "link/a.png")


def test_unreadable_images_are_collected_in_a_process_group(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        writer = PredictionWriter(tmp_path)
        writer.unreadable = ["a is no image"]
        writer.on_predict_end(trainer(tmp_path, logger=False), Brightness())
        assert writer.unreadable == ["a is no image"]
    finally:
        torch.distributed.destroy_process_group()


# --- helpers


def test_to_pixels_converts_floats_and_bytes() -> None:
    floats = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1)
    assert to_pixels(floats).tolist() == [[[0, 128, 255]]]
    assert to_pixels(floats.half()).tolist() == [[[0, 128, 255]]]
    assert to_pixels(floats * 3 - 1).tolist() == [[[0, 128, 255]]]
    assert to_pixels(torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1)).tolist() == [[[1, 2, 3]]]


def test_scores_in_metrics_csv_equal_the_results(tmp_path: Path) -> None:
    class Logging(Brightness):
        def on_test_epoch_end(self) -> None:
            self.log("test/mIoU", self.metrics["test"].compute()["miou"].float())

    writer = ResultsWriter()
    trainer(tmp_path, writer).test(Logging(), datamodule=Pictures([sample("a")]), verbose=False)
    with (tmp_path / "metrics.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert writer.results is not None
    assert float(row["test/mIoU"]) == pytest.approx(writer.results["miou"])


def test_unreadable_images_of_all_processes_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(values: list[list[str]], own: list[str]) -> None:
        values[:] = [own, ["b is no image"]]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    writer = PredictionWriter(tmp_path)
    writer.unreadable = ["a is no image"]
    writer.on_predict_end(trainer(tmp_path, logger=False), Brightness())
    assert writer.unreadable == ["a is no image", "b is no image"]


def test_the_empty_batch_of_a_process_without_images_is_no_error(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path)
    writer.on_predict_batch_end(trainer(tmp_path, logger=False), Brightness(), None, {"key": []}, 0)
    assert writer.unreadable == []


# --- slow bfloat16


@pytest.mark.parametrize(
    ("precision", "lacking", "warned"), [("bf16-mixed", True, 1), ("bf16-true", False, 0), ("32-true", True, 0)]
)
def test_bfloat16_on_a_processor_without_its_instructions_gives_a_warning(
    precision: Any, lacking: bool, warned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("early_fusion_seg.callbacks.slow_bfloat16.lacks_bfloat16", lambda: lacking)
    run = trainer(tmp_path, SlowBfloat16Warning(), precision=precision)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.validate(Brightness(), datamodule=Pictures([sample("a")]), verbose=False)
    assert sum("--trainer.precision 32-true" in str(w.message) for w in caught) == warned


@pytest.mark.usefixtures("elsewhere")
def test_the_command_line_warns_of_slow_bfloat16(
    camvid: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("early_fusion_seg.callbacks.slow_bfloat16.lacks_bfloat16", lambda: True)
    data = ["--config=camvid", f"--data.root={camvid}", f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'run'}"]
    with pytest.warns(UserWarning, match="this processor has no instructions for bfloat16"):
        assert main(["validate", *data, *QUICK, *QUIET, "--trainer.precision=bf16-mixed"]) == 0


# --- validation at the end


@pytest.mark.parametrize(
    ("options", "validated"),
    [
        ({"max_steps": 3, "max_epochs": -1}, [3]),
        ({"max_epochs": 2, "check_val_every_n_epoch": 5}, [8]),
        ({"max_epochs": 2}, [4, 8]),
    ],
)
def test_training_ends_with_a_validation(options: dict[str, Any], validated: list[int], tmp_path: Path) -> None:
    class Counting(Brightness):
        steps: list[int]

        def on_validation_epoch_end(self) -> None:
            self.steps.append(self.global_step)

    model = Counting()
    model.steps = []
    run = trainer(tmp_path, ValidateAtEnd(), num_sanity_val_steps=0, **options)
    run.fit(model, datamodule=Pictures([sample(str(i)) for i in range(4)]))
    assert model.steps == validated
