import csv
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cli_runs import QUICK, QUIET, SIZE, command, epochs_logged, fit_args, torch_epoch, without_output
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from early_fusion_seg import FrozenEncoder, ReverseHRNetSeg
from early_fusion_seg.__main__ import main
from early_fusion_seg.cli.metrics_csv import continue_metrics_csv
from early_fusion_seg.cli.output import best_and_last, make_loggers, output_folder, report_checkpoint
from early_fusion_seg.data.camvid import fake_camvid_segnet

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_fit_writes_config_metrics_checkpoints_and_panels(trained: Path) -> None:
    found = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= found
    assert not (trained / "checkpoints" / "last.ckpt").is_symlink()
    panels = [path for path in found if path.startswith("panels/") and path.endswith(".png")]
    assert len(panels) == 2 * 3  # the best and the last validation, images
    config = yaml.safe_load((trained / "config.yaml").read_text(encoding="utf-8"))
    assert config["model"]["width"] == 4
    assert config["trainer"]["max_epochs"] == 2
    assert config.get("output") is None  # a rerun must not overwrite this run
    with (trained / "metrics.csv").open(encoding="utf-8") as file:
        columns = set(csv.DictReader(file).fieldnames or ())
    assert {"train/loss", "train/lr", "val/mIoU", "val/pixel_accuracy", "val/loss"} <= columns
    assert [column for column in columns if "lr" in column] == ["train/lr"]


@pytest.mark.parametrize(("more", "steps"), [
    (["--trainer.max_epochs=1"], 3),
    (["--trainer.max_epochs=-1", "--trainer.max_steps=6"], 6),
    (["--trainer.max_epochs=-1", "--trainer.max_steps=4"], 4),  # in the middle of an epoch
])  # fmt: skip
def test_each_run_ends_with_a_validation(more: list[str], steps: int, camvid: Path, tmp_path: Path) -> None:
    one_each = ["--data.batch_size=1", "--data.crop_size=48", "--trainer.check_val_every_n_epoch=5"]
    assert main(fit_args(camvid, tmp_path / "run", *one_each, *more)) == 0
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == steps
    assert len(epochs_logged(tmp_path / "run")) == 1


def test_a_run_with_ema_resumes_only_with_ema(
    camvid: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, ema = tmp_path / "run", "--ema_decay=0.9"
    assert main(fit_args(camvid, run, ema, "--model.activation_checkpointing=true")) == 0
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    name, weight = next(iter(content["head_in_training"].items()))
    assert not torch.equal(weight, content["state_dict"][f"network.head.{name}"])
    longer = ["--trainer.max_epochs=3", "--model.activation_checkpointing=true", f"--ckpt_path={last}"]
    assert main(fit_args(camvid, run, *longer)) == 2
    assert "last.ckpt was saved with --ema_decay; resume with it" in capsys.readouterr().err
    assert main(fit_args(camvid, run, ema, *longer)) == 0
    assert torch_epoch(last) == 2
    without = trained / "checkpoints" / "last.ckpt"
    assert main(fit_args(camvid, tmp_path / "new", ema, "--trainer.max_epochs=3", f"--ckpt_path={without}")) == 2
    assert "last.ckpt was saved without --ema_decay; resume without it" in capsys.readouterr().err


def test_a_checkpoint_holds_plain_types_and_the_classes_of_the_data(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    assert content["hyper_parameters"]["class_names"][0] == "Sky"
    assert content["hyper_parameters"]["absent"] == "zero"
    assert ReverseHRNetSeg.load_from_checkpoint(checkpoint).num_classes == 11


def test_class_weights_are_stored_as_numbers(tmp_path: Path) -> None:
    camvid = fake_camvid_segnet(tmp_path / "camvid", images=3, size=SIZE)
    run, last = tmp_path / "run", tmp_path / "run/checkpoints/last.ckpt"
    args = [*fit_args(camvid, run, "--trainer.max_epochs=1"), "--data.rare_class_share=0.5"]
    assert main([*args, "--class_weights=median"]) == 0
    masks = [np.asarray(Image.open(path)) for path in sorted((camvid / "trainannot").iterdir())]
    counts = np.array([[(mask == c).sum() for c in range(11)] for mask in masks])
    with np.errstate(invalid="ignore"):
        share = np.array([counts[:, c].sum() / counts[counts[:, c] > 0].sum() for c in range(11)])
    expected = np.where(share > 0, np.nanmedian(share) / share, 1)
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config.get("class_weights") is None  # a rerun uses the numbers
    assert config["model"]["class_weights"] == pytest.approx(expected.tolist())
    with np.load(run / "class_pixel_counts.npz") as index:
        np.testing.assert_array_equal(index["counts"], counts)

    assert main([*args[:-1], "--class_weights=median", "--trainer.max_epochs=2", f"--ckpt_path={last}"]) == 0  # resumes
    (tmp_path / "mine.yaml").write_text(
        "class_weights: median\n", encoding="utf-8"
    )  # an option of fit, accepted by the others
    validate = ["validate", "--config=camvid", f"--config={tmp_path / 'mine.yaml'}", f"--data.root={camvid}"]
    assert main([*validate, f"--ckpt_path={last}", f"--output={tmp_path}"]) == 0
    camvid.rename(tmp_path / "gone")
    model = ReverseHRNetSeg.load_from_checkpoint(last)  # without the data
    assert model.hparams["class_weights"] == config["model"]["class_weights"]
    assert model.loss.class_weights.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_run_resumes_in_its_own_folder(camvid: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(fit_args(camvid, run, "--trainer.max_epochs=1")) == 0
    last = run / "checkpoints" / "last.ckpt"
    before = torch.load(last, weights_only=True)
    assert main(without_output(fit_args(camvid, run, "--trainer.max_epochs=3", f"--ckpt_path={last}"))) == 0
    after = torch.load(last, weights_only=True)
    assert (before["epoch"], after["epoch"]) == (0, 2)
    assert after["global_step"] == 3 * before["global_step"]
    assert epochs_logged(run) == [0, 1, 2]
    assert sorted(path.name for path in run.glob("metrics*")) == ["metrics.csv"]
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_run_resumed_in_another_folder_warns_that_best_ckpt_stays(
    camvid: Path, trained: Path, tmp_path: Path
) -> None:
    last = trained / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match="the best checkpoint so far stays where it is"):
        assert main(fit_args(camvid, tmp_path / "b", "--trainer.max_epochs=3", f"--ckpt_path={last}")) == 0
    assert epochs_logged(tmp_path / "b") == [2]


def test_the_checkpoints_of_another_run_are_not_replaced(
    camvid: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = ["--trainer.max_epochs=3", f"--ckpt_path={trained / 'checkpoints' / 'last.ckpt'}"]
    for more in ([], other):
        assert main(fit_args(camvid, run, *more)) == 2
        message = capsys.readouterr().err
        assert f"{run}/checkpoints has the checkpoints of another run (best.ckpt, last.ckpt)" in message
        assert f"--ckpt_path {run}/checkpoints/last.ckpt" in message
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_fit_that_never_began_leaves_no_folder(camvid: Path, tmp_path: Path) -> None:
    args = without_output(fit_args(camvid, tmp_path))
    for wrong in ("--data.root=/none", "--model.encoder_weights=/none.pth", "--trainer.devices=-7", "--ema_decay=7"):
        assert main([*args, wrong]) == 2
    assert list(tmp_path.glob("runs/fit/*")) == []


def test_an_encoder_file_may_move_after_training(camvid: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "encoder.safetensors", tmp_path / "run"
    save_file(FrozenEncoder("test_resnet", "random").timm_state_dict(), file)
    encoder = [f"--model.encoder_weights={file}", "--model.encoder=test_resnet"]
    assert main([*fit_args(camvid, run, *encoder), "--trainer.max_epochs=1"]) == 0
    file.unlink()
    last = f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    assert main([*fit_args(camvid, run, *encoder), last]) == 0
    assert epochs_logged(run)[-1] == 1
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["encoder_weights"] == str(file)
    output = f"--output={tmp_path / 'val'}"
    given = ["--data=CamVidDataModule", f"--data.root={camvid}", *QUICK, *QUIET]
    assert main(["validate", *given, last, output]) == 0


@pytest.mark.parametrize("limit", ["--trainer.max_epochs=2", "--trainer.max_steps=2", "--trainer.max_time=00:00:00:00"])
def test_a_finished_run_is_not_resumed(
    limit: str, camvid: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, longer = trained / "checkpoints" / "last.ckpt", "--trainer.max_epochs=9"
    assert main(fit_args(camvid, tmp_path / "run", longer, limit, f"--ckpt_path={last}")) == 2
    assert "nothing is left to train; raise max_" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_best_and_last_are_those_of_the_newest_run(
    camvid: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (0, 1, 10):
        shutil.copytree(trained, tmp_path / "runs" / "fit" / f"version_{number}")  # with the times of the files
    newest = tmp_path / "runs" / "fit" / "version_1" / "checkpoints"
    for path in newest.iterdir():
        path.touch()
    data = ["--config=camvid", f"--data.root={camvid}", *QUICK, QUIET[0]]
    assert main(["validate", *data, "--ckpt_path=best"]) == 0
    assert "--ckpt_path best: runs/fit/version_1/checkpoints/best.ckpt" in capsys.readouterr().out
    assert main(["validate", *data, "--ckpt_path=bst.ckpt"]) == 2
    message = capsys.readouterr().err
    assert "there is no checkpoint bst.ckpt; existing ones: runs/fit/version_1/checkpoints/" in message
    more = ["--ckpt_path=last", "--trainer.max_epochs=3"]
    assert main([*without_output(fit_args(camvid, tmp_path)), *more]) == 0
    assert torch_epoch(newest / "last.ckpt") == 2


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")  # the command line hides it
def test_a_row_that_is_logged_again_is_in_metrics_csv_once(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    before = "epoch,step,train/loss,val/mIoU\n0,9,0.5,\n0,9,,0.1\n1,19,0.4,\n"
    metrics.write_text(before, encoding="utf-8")
    with continue_metrics_csv(tmp_path, loggers := make_loggers("csv", tmp_path)):
        assert metrics.read_text(encoding="utf-8") == before
        loggers[0].log_metrics({"epoch": 1, "train/loss": 0.4, "train/new": 1}, 19)
        loggers[0].log_metrics({"epoch": 1, "train/loss": 0.3}, 29)
        loggers[0].save()
    with metrics.open(encoding="utf-8") as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert rows == [
        {"epoch": "0", "step": "9", "train/loss": "0.5"},
        {"epoch": "0", "step": "9", "val/mIoU": "0.1"},
        {"epoch": "1", "step": "19", "train/loss": "0.4"},
        {"epoch": "1", "step": "19", "train/loss": "0.4", "train/new": "1"},
        {"epoch": "1", "step": "29", "train/loss": "0.3"},
    ]


def test_fit_ends_with_the_iou_of_each_class_and_the_next_commands(
    camvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    args = ["--trainer.max_epochs=1", "--trainer.profiler=simple", "--data.batch_size=3"]
    assert main([arg for arg in fit_args(camvid, tmp_path / "a run", *args) if "log_every" not in arg]) == 0
    captured = capsys.readouterr()
    assert "Bicyclist" in captured.out
    assert "validate --config 'a run/config.yaml' --ckpt_path 'a run/checkpoints/best.ckpt'" in captured.out
    assert "FIT Profiler Report" in caplog.text
    with (tmp_path / "a run" / "metrics.csv").open(encoding="utf-8") as file:
        assert sum(bool(row["train/loss"]) for row in csv.DictReader(file)) == 1  # the epoch has one step


def test_home_is_expanded_and_a_remote_output_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert output_folder("~/run") == tmp_path / "home" / "run"
    assert output_folder(None) is None
    assert main(["demo", "--output=s3://bucket/run"]) == 2
    assert "s3://bucket/run is a remote address" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_resume_that_is_refused_keeps_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    camvid = fake_camvid_segnet(tmp_path / "camvid", images=6, size=SIZE)
    run, last = tmp_path / "run", tmp_path / "run/checkpoints/last.ckpt"
    small = ["--data.crop_size=48", "--trainer.check_val_every_n_epoch=9", "--trainer.num_sanity_val_steps=0"]
    args = [*fit_args(camvid, run, *small), "--data.batch_size=1"]
    assert main([*args, "--trainer.max_epochs=1"]) == 0
    state = torch.load(last, weights_only=True)
    state["CamVidDataModule"]["train"]["batches"] = 1  # as in the middle of an epoch
    state["CamVidDataModule"]["train"]["epoch"] = 1
    torch.save(state, last)
    metrics = (run / "metrics.csv").read_bytes()
    (run / "metrics_2.csv").touch()
    assert main([*args, "--data.batch_size=2", f"--ckpt_path={last}"]) == 2
    assert "Resume with the same images, batch size, processes and seed" in capsys.readouterr().err
    assert (run / "metrics.csv").read_bytes() == metrics
    assert sorted(path.name for path in run.glob("metrics*")) == ["metrics.csv", "metrics_2.csv"]
    assert main([*args, f"--ckpt_path={last}"]) == 0
    assert (run / "metrics.csv").read_bytes().startswith(metrics)


class DecreasingScore(BoringModel):
    first = 0.0

    def on_validation_epoch_end(self) -> None:
        self.log("val/mIoU", torch.tensor(self.first - float(self.current_epoch)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"encoder": {}, "hyper_parameters": {}}  # like a checkpoint of ReverseHRNetSeg

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(RandomDataset(32, 2), num_workers=0)

    val_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # two vectors need no workers
def test_last_ckpt_is_of_the_last_epoch_and_best_ckpt_of_the_best(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 3, "logger": False, "enable_progress_bar": False}
    trainer = Trainer(
        callbacks=[*best_and_last(tmp_path, 200)], enable_model_summary=False, accelerator="cpu", **options
    )
    trainer.fit(DecreasingScore())
    assert [torch_epoch(tmp_path / "checkpoints" / f"{name}.ckpt") for name in ("best", "last")] == [0, 2]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",  # two vectors need no workers
    "ignore:Checkpoint directory .* is not empty",  # Lightning's
)
def test_best_ckpt_is_replaced_by_a_better_one_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    best = tmp_path / "moved" / "checkpoints" / "best.ckpt"
    for first, expected in ((0.5, 0.5), (0.2, 0.5), (0.7, 0.7)):  # a run in a folder that was moved
        model = DecreasingScore()
        model.first = first
        own = ModelCheckpoint(best.parent, "{epoch}", monitor="val/mIoU", mode="max", save_top_k=2)
        callbacks = [own, *best_and_last(best.parents[1], 200)]
        options["default_root_dir"] = best.parents[1]
        trainer = Trainer(callbacks=callbacks, enable_model_summary=False, **options)
        trainer.fit(model)
        report_checkpoint(trainer)
        *hints, line = capsys.readouterr().out.splitlines()
        assert line == f"best val/mIoU {100 * expected:.1f} %: {best}"
        assert "validate --config moved/config.yaml --ckpt_path moved/checkpoints/best.ckpt" in hints[0]
        state = torch.load(best, weights_only=True)["callbacks"]
        (score,) = (value["best_model_score"] for name, value in state.items() if name.startswith("BestCheckpoint"))
        assert score == pytest.approx(expected)


def test_run_folders_are_numbered(camvid: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "fit" / "version_4").mkdir(parents=True)
    (tmp_path / "runs" / "fit" / "version_old").mkdir()
    args = without_output(fit_args(camvid, tmp_path))
    assert main([*args, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]) == 0
    assert (tmp_path / "runs" / "fit" / "version_5" / "metrics.csv").is_file()


def test_logging_and_checkpointing_can_be_turned_off(camvid: Path, tmp_path: Path) -> None:
    off = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.max_epochs=1"]
    assert main(fit_args(camvid, tmp_path / "run", f"--trainer.default_root_dir={tmp_path / 'root'}", *off)) == 0
    assert not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["config.yaml"]


@pytest.mark.slow
def test_a_run_killed_within_an_epoch_resumes(tmp_path: Path) -> None:
    camvid = fake_camvid_segnet(tmp_path / "camvid", images=24, size=SIZE)  # 12 steps an epoch
    run = tmp_path / "run"
    last = run / "checkpoints" / "last.ckpt"
    args = fit_args(camvid, run, "--trainer.max_epochs=1000", "--trainer.limit_val_batches=1")
    with subprocess.Popen(command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not last.exists() or torch_epoch(last) < 1:
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    epoch = torch_epoch(last)
    more = [f"--ckpt_path={last}", f"--trainer.max_epochs={epoch + 3}"]
    assert main(without_output(fit_args(camvid, run, *more))) == 0
    *before, first, second = epochs_logged(run)
    assert (first, second) == (epoch + 1, epoch + 2)
    assert set(before) <= set(range(epoch + 1))  # those that were written when it was killed
    assert torch_epoch(last) == epoch + 2


def test_seed_everything_true_draws_a_seed(camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    for run in ("a", "b"):
        monkeypatch.delenv("PL_GLOBAL_SEED")
        assert main(fit_args(camvid, tmp_path / run, "--seed_everything=true", "--trainer.fast_dev_run=true")) == 0
        seeds.append(int(os.environ["PL_GLOBAL_SEED"]))
    assert seeds[0] != seeds[1]
