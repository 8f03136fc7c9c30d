import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from early_fusion_seg import ReverseHRNetSeg
from early_fusion_seg.__main__ import main, plain_message
from early_fusion_seg.cli.checkpoint import refuse_other_classes
from early_fusion_seg.cli.output import best_and_last
from early_fusion_seg.data.fake import fake_camvid_segnet, fake_folder
from early_fusion_seg.errors import MissingFileError, UserError

TINY_MODEL = ["--model.encoder=resnet18", "--model.encoder_weights=random", "--model.width=4", "--model.blocks=1"]
QUICK = ["--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--data.num_workers=0"]
LOOK = "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"
SIZE = (36, 48)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # set by Lightning; undone with the test
        monkeypatch.setenv(name, "0")


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_camvid_segnet(tmp_path_factory.mktemp("data") / "camvid", images=3, size=SIZE)


def fit_args(camvid: Path, output: Path, *more: str) -> list[str]:
    data = [f"--data.root={camvid}", "--data.crop_size=[32,32]", "--data.batch_size=2", f"--output={output}"]
    epochs = ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1"]
    return ["fit", "--config=camvid", *data, *epochs, *TINY_MODEL, *QUICK, *LOOK, *more]


@pytest.fixture(scope="module")
def trained(camvid: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        run = tmp_path_factory.mktemp("runs") / "trained"
        assert main(fit_args(camvid, run)) == 0
    return run


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "best.ckpt"


def epochs_logged(run: Path) -> list[int]:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return sorted({int(row["epoch"]) for row in csv.DictReader(file) if row["val/mIoU"]})


# --- what needs no run


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in ("demo", "fit", "validate", "test", "predict"))
    assert main([]) == 0
    assert capsys.readouterr().out == text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("early-fusion-seg ")


def test_demo_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    demo = SimpleNamespace(main=lambda args: given.append(args) or 7)
    monkeypatch.setattr("early_fusion_seg.commands.demo", demo, raising=False)
    assert main(["demo", "--output", "x"]) == 7
    assert given == [["--output", "x"]]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_of_a_command_is_short(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert len(text.splitlines()) < 110
    assert "--data.help" in text
    assert "-->" not in text
    assert "--trainer.accelerator" not in text
    assert ("--model.width" in text) == (command == "fit")


def printed_config(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def test_print_config_shows_the_recipe_and_leaves_out_what_the_trainer_does_anyway(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = printed_config(["fit", "--config", "camvid", "--model.width", "16"], capsys)
    assert config["data"]["class_path"] == "early_fusion_seg.CamVidDataModule"
    assert config["data"]["init_args"]["batch_size"] == 8
    assert config["model"]["width"] == 16
    assert config["model"]["plan"] == "early"
    assert config["trainer"]["max_epochs"] == 100
    assert "accelerator" not in config["trainer"]


def test_a_printed_config_means_the_same_when_it_is_given_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = printed_config(["fit", "--config=camvid", "--data.root=x", "--trainer.max_epochs=7"], capsys)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert printed_config(["fit", "-c", "my.yaml"], capsys) == config


def test_a_file_wins_over_a_recipe_of_its_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "camvid").write_text("model: {width: 5}\n", encoding="utf-8")
    assert printed_config(["fit", "--config", "camvid"], capsys)["model"]["width"] == 5


def test_every_value_of_a_recipe_can_be_overridden(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config=camvid", "--data.crop_size=[64,96]", "--data.batch_size=2", "--trainer.max_epochs=3"]
    config = printed_config([*args, "--trainer.check_val_every_n_epoch=5"], capsys)
    assert config["data"]["init_args"]["crop_size"] == [64, 96]
    assert config["data"]["init_args"]["batch_size"] == 2
    assert config["trainer"]["max_epochs"] == 3
    assert config["trainer"]["check_val_every_n_epoch"] == 5


@pytest.mark.parametrize("recipe", ["camvid", "synthetic"])
def test_recipes_are_short_and_valid(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(sys.modules["early_fusion_seg"].__path__[0]) / "recipes" / f"{recipe}.yaml"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 25
    assert printed_config(["fit", "--config", recipe], capsys)["data"]["class_path"].startswith("early_fusion_seg.")


@pytest.mark.parametrize("name", ["CamVidDataModule", "early_fusion_seg.CamVidDataModule"])
def test_data_classes_go_by_short_and_by_full_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(["fit", "--data", name, "--data.root", "x"], capsys)
    assert config["data"]["class_path"] == "early_fusion_seg.CamVidDataModule"
    assert config["data"]["init_args"]["root"] == "x"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(command: str, args: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("early_fusion_seg.cli.run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["fit"])


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise MissingFileError("there is no file a.png\nexpected: b")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_from_a_worker_is_said_like_any_other(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        next(iter(DataLoader(Broken(), num_workers=workers)))
    assert plain_message(caught.value) == "there is no file a.png\nexpected: b"


# --- what is wrong, in one sentence

CAMVID = ["--config=camvid", "--data.root={camvid}", "--data.crop_size=[32,32]", *TINY_MODEL]
WRONG: list[tuple[str, list[str], str]] = [
    ("no command", ["fti"], "there is no command 'fti'; the commands are demo, fit"),
    ("no data", ["fit"], "required: data; the data classes are CamVidDataModule, "),
    ("abstract data", ["fit", "--data.root=x"], "the data classes are CamVidDataModule, "),
    ("unknown data", ["fit", "--data=Nope"], "data: there is no data class Nope; the data classes are "),
    ("no root", ["fit", "--config=camvid"], "data: CamVidDataModule: the following arguments are required: root"),
    ("wrong root", ["fit", "--config=camvid", "--data.root=/none", *TINY_MODEL], "/none is not a folder"),
    ("data key", ["fit", *CAMVID, "--data.rooot=x"], "CamVidDataModule: Option 'rooot' is not accepted"),
    ("data value", ["fit", *CAMVID, "--data.scale=abc"], "data.scale: CamVidDataModule: expected float. Got value"),
    ("data union", ["fit", *CAMVID, "--data.crop_size=abc"], "data.crop_size: CamVidDataModule: expected int; "),
    ("data refuses", ["fit", *CAMVID, "--data.batch_size=-1"], "batch_size is -1; it must be above 0"),
    ("model key", ["fit", *CAMVID, "--model.widht=3"], "unrecognized arguments: --model.widht=3; early-fusion-seg fit"),
    ("model value", ["fit", *CAMVID, "--model.width=abc"], "model.width: expected int. Got value: abc"),
    ("model word", ["fit", *CAMVID, "--model.plan=abc"], "model.plan: expected one of ['early', 'progressive']"),
    ("model refuses", ["fit", *CAMVID, "--model.encoder=nope"], "nope"),
    ("linked", ["fit", *CAMVID, "--model.class_names=[a]"], "model.class_names comes from the data, so leave it out"),
    ("no weights", ["fit", *CAMVID, "--model.encoder_weights=/none.pth"], "/none.pth"),
    ("key", ["fit", *CAMVID, "--foo=3"], "unrecognized arguments: --foo=3"),
    ("value missing", ["fit", "--config"], "expected one argument"),
    ("trainer key", ["fit", *CAMVID, "--trainer.nope=1"], "unrecognized arguments: --trainer.nope=1"),
    ("trainer value", ["fit", *CAMVID, "--trainer.max_epochs=x"], "trainer.max_epochs: expected int; Given"),
    ("trainer refuses", ["fit", *CAMVID, "--trainer.max_epochs=-5"], "`max_epochs` must be a non-negative integer"),
    ("devices", ["fit", *CAMVID, *QUICK, "--trainer.devices=-7"], "the trainer refuses its settings: "),
    ("logger", ["fit", *CAMVID, "--logger=nope"], "logger: expected one of ['csv', 'tensorboard', 'wandb']"),
    ("recipe", ["fit", "--config=nope"], "--config nope: there is no such file, and the recipes are camvid, synthetic"),
    ("broken yaml", ["fit", "--config=broken.yaml"], "Problems parsing config"),
    ("yaml key", ["fit", "--config=key.yaml"], "Group 'model' does not accept option 'widht'"),
    ("resume missing", ["fit", *CAMVID, "--ckpt_path=none.ckpt"], "there is no checkpoint none.ckpt"),
    ("resume last", ["fit", *CAMVID, "--ckpt_path=last"], "there is no checkpoint last"),
    ("resume best", ["fit", *CAMVID, "--ckpt_path=best"], "there is no checkpoint best"),
    ("resume cut", ["fit", *CAMVID, "--ckpt_path=cut.ckpt"], "cut.ckpt is damaged or no checkpoint"),
    ("resume other", ["fit", *CAMVID, "--ckpt_path=other.ckpt"], "other.ckpt was not written by ReverseHRNetSeg"),
    ("resume changed", ["fit", *CAMVID, "--model.width=8", "--ckpt_path={ckpt}"], "model.width is 8, but 4 in "),
    ("no checkpoint", ["test", "--config=camvid", "--data.root={camvid}"], "test needs --ckpt_path FILE"),
    ("missing", ["test", "--config=camvid", "--data.root={camvid}", "--ckpt_path=none.ckpt"], "no checkpoint none"),
    ("cut", ["validate", "--config=camvid", "--data.root={camvid}", "--ckpt_path=cut.ckpt"], "cut.ckpt is damaged"),
    ("remote", ["predict", "--data.root=.", "--ckpt_path=https://a.b/c.ckpt"], "c.ckpt is a remote address"),
    ("model differs", ["predict", "--data.root=.", "--ckpt_path={ckpt}", "--model.width=8"], "model.width is 8, but 4"),
    ("model unknown", ["predict", "--data.root=.", "--ckpt_path={ckpt}", "--model.nope=8"], "model.nope is not a "),
    ("encoder gone", ["predict", "--data.root=.", "--ckpt_path={ckpt}", "--model.encoder_weights=/n.pth"], "/n.pth"),
    ("folder missing", ["predict", "--data.root=/none", "--ckpt_path={ckpt}"], "/none is not a folder"),
    ("other classes", ["validate", "--data=FolderDataModule", "--data.root={folder}", "--ckpt_path={ckpt}"],
     "class 0 is 'ground' in the data, but 'Sky' in "),
    ("other classes to predict", ["predict", "--data.root={folder}", "--ckpt_path={ckpt}"], "class 0 is 'ground'"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "sentence"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_said_in_one_sentence(
    args: list[str], sentence: str, camvid: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    (tmp_path / "broken.yaml").write_text("model:\n  width: [3\n", encoding="utf-8")
    (tmp_path / "key.yaml").write_text("data: CamVidDataModule\nmodel:\n  widht: 3\n", encoding="utf-8")
    folder = fake_folder(tmp_path / "folder", images=1)
    names = {"camvid": str(camvid), "ckpt": str(checkpoint), "folder": str(folder)}
    assert main([arg.format(**names) if "{" in arg else arg for arg in args]) != 0
    captured = capsys.readouterr()
    assert captured.err.startswith("early-fusion-seg: error: ")
    assert sentence in captured.err.splitlines()[0]
    assert "Traceback" not in captured.err + captured.out


def test_data_with_fewer_classes_is_refused() -> None:
    refuse_other_classes(["a", "b"], ["a", "b"], "x.ckpt")
    with pytest.raises(UserError, match=r"the data has 1 classes, but x\.ckpt has 2"):
        refuse_other_classes(["a"], ["a", "b"], "x.ckpt")


# --- fit


def test_fit_leaves_config_scores_checkpoints_and_panels(trained: Path) -> None:
    found = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= found
    assert not (trained / "checkpoints" / "last.ckpt").is_symlink()
    panels = [path for path in found if path.startswith("panels/")]
    assert len(panels) == 2 * 3  # epochs, images
    config = yaml.safe_load((trained / "config.yaml").read_text(encoding="utf-8"))
    assert config["model"]["width"] == 4
    assert config["trainer"]["max_epochs"] == 2
    assert config.get("output") is None  # a rerun must not overwrite this run
    with (trained / "metrics.csv").open(encoding="utf-8") as file:
        columns = set(csv.DictReader(file).fieldnames or ())
    assert {"train/loss", "val/mIoU", "val/pixel_accuracy", "val/loss"} <= columns
    assert any(column.startswith("lr-") for column in columns)


def test_a_checkpoint_holds_plain_types_and_the_classes_of_the_data(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    assert content["hyper_parameters"]["class_names"][0] == "Sky"
    assert content["hyper_parameters"]["absent"] == "zero"
    assert ReverseHRNetSeg.load_from_checkpoint(checkpoint).num_classes == 11


def without_output(args: list[str]) -> list[str]:
    return [arg for arg in args if not arg.startswith("--output")]


def test_a_run_goes_on_from_its_checkpoint_in_its_own_folder(camvid: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(fit_args(camvid, run, "--trainer.max_epochs=1")) == 0
    first = (run / "metrics.csv").read_bytes()
    last = run / "checkpoints" / "last.ckpt"
    before = torch.load(last, weights_only=True)
    assert main(without_output(fit_args(camvid, run, "--trainer.max_epochs=3", f"--ckpt_path={last}"))) == 0
    after = torch.load(last, weights_only=True)
    assert (before["epoch"], after["epoch"]) == (0, 2)
    assert after["global_step"] == 3 * before["global_step"]
    assert epochs_logged(run) == [1, 2]
    assert (run / "metrics_1.csv").read_bytes() == first
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_run_goes_on_elsewhere_and_says_that_its_best_stays_behind(
    camvid: Path, trained: Path, tmp_path: Path
) -> None:
    last = trained / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        assert main(fit_args(camvid, tmp_path / "b", "--trainer.max_epochs=3", f"--ckpt_path={last}")) == 0
    assert epochs_logged(tmp_path / "b") == [2]


def test_a_rerun_into_the_same_folder_keeps_the_earlier_scores(camvid: Path, tmp_path: Path) -> None:
    args = fit_args(camvid, tmp_path / "run", "--trainer.max_epochs=1")
    assert main(args) == 0
    with pytest.warns(UserWarning, match="Checkpoint directory .* is not empty"):
        assert main(args) == 0
    assert epochs_logged(tmp_path / "run") == [0]
    assert (tmp_path / "run" / "metrics_1.csv").is_file()


def test_fewer_epochs_than_are_done_is_an_error_not_a_traceback(
    camvid: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = trained / "checkpoints" / "last.ckpt"
    assert main(fit_args(camvid, trained, "--trainer.max_epochs=1", f"--ckpt_path={last}")) == 2
    assert "trainer.max_epochs is 1, but" in capsys.readouterr().err


class GettingWorse(BoringModel):
    def on_validation_epoch_end(self) -> None:
        self.log("val/mIoU", torch.tensor(-float(self.current_epoch)))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(RandomDataset(32, 2), num_workers=0)

    val_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # two vectors need none
def test_the_last_checkpoint_is_that_of_the_last_epoch_not_of_the_best(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 3, "logger": False, "enable_progress_bar": False}
    trainer = Trainer(callbacks=[*best_and_last(tmp_path)], enable_model_summary=False, accelerator="cpu", **options)
    trainer.fit(GettingWorse())
    assert [torch_epoch(tmp_path / "checkpoints" / f"{name}.ckpt") for name in ("best", "last")] == [0, 2]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_runs_are_numbered_below_runs(camvid: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "fit" / "version_4").mkdir(parents=True)
    (tmp_path / "runs" / "fit" / "version_old").mkdir()
    args = without_output(fit_args(camvid, tmp_path))
    assert main([*args, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]) == 0
    assert (tmp_path / "runs" / "fit" / "version_5" / "metrics.csv").is_file()


def test_logging_and_checkpointing_can_be_switched_off(camvid: Path, tmp_path: Path) -> None:
    off = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.max_epochs=1"]
    assert main(fit_args(camvid, tmp_path / "run", f"--trainer.default_root_dir={tmp_path / 'root'}", *off)) == 0
    assert not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["config.yaml"]


def test_tensorboard_is_one_flag_away(camvid: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(fit_args(camvid, tmp_path / "run", "--logger=tensorboard", "--trainer.max_epochs=1")) == 0
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    assert len(events.Tags()["images"]) == 3
    assert "val/mIoU" in events.Tags()["scalars"]
    assert (tmp_path / "run" / "metrics.csv").is_file()


def test_wandb_is_one_flag_away_and_needs_no_account_offline(
    camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    assert main(fit_args(camvid, tmp_path / "run", "--logger=wandb", "--trainer.max_epochs=1")) == 0
    wandb.finish()
    wandb.teardown()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/panels/val*.png"))) == 3


# --- validate and test


def run_validate(camvid: Path, checkpoint: Path, output: Path, *more: str, command: str = "validate") -> dict[str, Any]:
    data = ["--config=camvid", f"--data.root={camvid}", f"--output={output}"]
    assert main([command, *data, f"--ckpt_path={checkpoint}", *QUICK, LOOK[0], *more]) == 0
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
def test_scores_are_those_that_numpy_counts(
    command: str, split: str, camvid: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_validate(camvid, checkpoint, tmp_path / "run", command=command)
    miou, per_class = numpy_scores(ReverseHRNetSeg.load_from_checkpoint(checkpoint).eval(), camvid, split)
    assert results["miou"] == pytest.approx(miou, abs=1e-9)
    for value, expected in zip(results["per_class"].values(), per_class, strict=True):
        assert value is None if np.isnan(expected) else value == pytest.approx(expected, abs=1e-9)
    assert list(results["per_class"])[:2] == ["Sky", "Building"]
    assert (results["split"], results["images"], results["partial"]) == (split, 3, False)
    assert (results["absent"], results["scale"], results["seed"]) == ("zero", 1.0, 0)
    assert results["checkpoint"] == str(checkpoint)
    assert results["encoder"]["name"] == "resnet18"
    assert results["config"]["model"]["width"] == 4
    assert results["config"]["data"]["init_args"]["root"] == str(camvid)
    assert len(list((tmp_path / "run" / "panels" / split).glob("*.png"))) == 3
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("Bicyclist", "mIoU", "licence", "results.json"))


def test_a_limited_validation_says_that_it_is_partial(camvid: Path, checkpoint: Path, tmp_path: Path) -> None:
    results = run_validate(camvid, checkpoint, tmp_path / "run", "--trainer.limit_val_batches=2")
    assert (results["images"], results["partial"]) == (2, True)


def test_the_config_of_a_run_serves_to_score_it(trained: Path, tmp_path: Path) -> None:
    args = ["test", f"--config={trained / 'config.yaml'}", f"--ckpt_path={trained / 'checkpoints' / 'last.ckpt'}"]
    assert main([*args, f"--output={tmp_path / 'run'}"]) == 0
    assert (tmp_path / "run" / "results.json").is_file()


def test_an_encoder_file_that_has_moved_is_named_again(camvid: Path, tmp_path: Path) -> None:
    import timm

    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet18").state_dict(), weights)
    run = tmp_path / "run"
    assert main(fit_args(camvid, run, f"--model.encoder_weights={weights}", "--trainer.max_epochs=1")) == 0
    moved = weights.rename(tmp_path / "moved.pth")
    best = run / "checkpoints" / "best.ckpt"
    data = ["--config=camvid", f"--data.root={camvid}", f"--ckpt_path={best}", *QUICK]
    assert main(["validate", *data]) == 2
    assert main(["validate", *data, f"--model.encoder_weights={moved}"]) == 0


# --- predict


def image(path: Path, size: tuple[int, int] = (21, 33), mode: str = "RGB", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    ramp = np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, 0)
    Image.fromarray(ramp).convert("RGB").convert(mode).save(path, **options)


def predict(folder: Path, checkpoint: Path, output: Path, *more: str) -> int:
    return main(["predict", f"--data.root={folder}", f"--ckpt_path={checkpoint}", f"--output={output}", *QUICK, *more])


def test_predict_keeps_the_tree_and_every_image(checkpoint: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in ("a.jpg", "a.png", "deep/er/b.webp", "c.tif"):
        image(photos / name)
    image(photos / "grey.png", mode="L")
    image(photos / "tiny.png", size=(1, 1))
    assert predict(photos, checkpoint, tmp_path / "out") == 0
    names = {path.relative_to(photos).as_posix() for path in photos.rglob("*") if path.is_file()}
    for kind in ("masks", "overlays"):
        written = {p.relative_to(tmp_path / "out" / kind).as_posix() for p in (tmp_path / "out" / kind).rglob("*.png")}
        assert written == {f"{name}.png" for name in names}
    model = ReverseHRNetSeg.load_from_checkpoint(checkpoint).eval()
    with Image.open(tmp_path / "out" / "masks" / "a.png.png") as mask:
        assert mask.mode == "P"
        assert mask.size == (33, 21)
        np.testing.assert_array_equal(np.asarray(mask), model.predict(photos / "a.png"))
        colours = np.array(mask.getpalette()).reshape(-1, 3)[:11]
    np.testing.assert_array_equal(colours, model.palette)
    with Image.open(tmp_path / "out" / "overlays" / "deep" / "er" / "b.webp.png") as overlay:
        assert overlay.size == (33, 21)


def test_masks_follow_the_orientation_in_which_an_image_is_shown(checkpoint: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image(tmp_path / "photos" / "turned.jpg", exif=exif)
    assert predict(tmp_path / "photos", checkpoint, tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "masks" / "turned.jpg.png") as mask:
        assert mask.size == (21, 33)


def test_what_is_no_image_is_named_and_the_others_are_done(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    image(photos / "a.png")
    image(photos / "z.png")
    (photos / "notes.txt").write_text("not an image", encoding="utf-8")
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:60])
    assert predict(photos, checkpoint, tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert str(photos / "notes.txt") in errors
    assert str(photos / "cut.png") in errors
    assert "a.png is" not in errors.replace("cut.png", "")
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["a.png.png", "z.png.png"]


# --- as its own process


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "early_fusion_seg", *args]


def test_as_a_module_with_clean_streams(checkpoint: Path, tmp_path: Path) -> None:
    image(tmp_path / "photos" / "a.png")
    args = command("predict", f"--data.root={tmp_path / 'photos'}", f"--ckpt_path={checkpoint}", *QUICK, LOOK[0])
    done = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "written: runs/predict/version_0\n"
    assert (tmp_path / "runs" / "predict" / "version_0" / "masks" / "a.png.png").is_file()


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_goes_on(tmp_path: Path) -> None:
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
    assert epochs_logged(run) == [epoch + 1, epoch + 2]
    assert torch_epoch(last) == epoch + 2


def torch_epoch(path: Path) -> int:
    return int(torch.load(io.BytesIO(path.read_bytes()), weights_only=True)["epoch"])
