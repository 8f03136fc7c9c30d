import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from cli_runs import QUICK, TINY_MODEL
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, Dataset

from early_fusion_seg.__main__ import main, plain_message
from early_fusion_seg.cli.load_model import check_classes_match
from early_fusion_seg.data.folder import fake_folder
from early_fusion_seg.errors import MissingFileError, UserError

pytestmark = pytest.mark.usefixtures("elsewhere")

FOLDER = Path(sys.modules["early_fusion_seg"].__path__[0]) / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in ("demo", "fit", "validate", "test", "predict"))
    assert main([]) == 0
    assert capsys.readouterr().out == text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("early-fusion-seg ")


def test_main_passes_arguments_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    demo = SimpleNamespace(main=lambda args: given.append(args) or 7)
    monkeypatch.setitem(sys.modules, "early_fusion_seg.cli.demo", demo)
    assert main(["demo", "--output", "x"]) == 7
    assert given == [["--output", "x"]]


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_waiting_threads_sleep_soon_unless_the_user_chooses(given: dict[str, str], expected: str) -> None:
    code = (
        "import os; from early_fusion_seg.__main__ import main\n"
        "main(['--help']); print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == expected


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_of_a_command_is_short(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert len(text.splitlines()) < 140
    assert f"\nexample: early-fusion-seg {command} " in text
    assert "--data.help" in text
    assert "-->" not in text
    assert "--trainer.accelerator" not in text
    for option in ("--model.width", "--save_every_n_steps", "--ema_decay", "--class_weights"):
        assert (option in text) == (command == "fit")


def printed_config(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def test_print_config_shows_the_recipe_without_default_trainer_arguments(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = printed_config(["fit", "--config", "camvid", "--model.width", "16"], capsys)
    assert config["data"]["class_path"] == "early_fusion_seg.CamVidDataModule"
    assert config["data"]["init_args"]["batch_size"] == 8
    assert config["model"]["width"] == 16
    assert config["model"]["plan"] == "early"
    assert config["trainer"]["max_epochs"] == 100
    assert "accelerator" not in config["trainer"]


@pytest.mark.parametrize(("blocks", "expected"), [("2", 2), ("[0,1,2,2,2]", [0, 1, 2, 2, 2])])
def test_blocks_are_one_number_or_a_list(
    blocks: str, expected: int | list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = printed_config(["fit", "--config", "camvid", "--model.blocks", blocks], capsys)
    assert config["model"]["blocks"] == expected


def test_a_printed_config_can_be_passed_as_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = printed_config(["fit", "--config=camvid", "--data.root=x", "--trainer.max_epochs=7"], capsys)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert printed_config(["fit", "-c", "my.yaml"], capsys) == config


def test_a_file_takes_precedence_over_a_recipe_of_its_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "camvid").write_text("model: {width: 5}\n", encoding="utf-8")
    assert printed_config(["fit", "--config", "camvid"], capsys)["model"]["width"] == 5


def test_every_value_of_a_recipe_can_be_overridden(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config=camvid", "--data.crop_size=[64,96]", "--data.batch_size=2", "--trainer.max_epochs=3"]
    config = printed_config([*args, "--trainer.check_val_every_n_epoch=5"], capsys)
    assert config["data"]["init_args"]["crop_size"] == [64, 96]
    assert config["data"]["init_args"]["batch_size"] == 2
    assert config["trainer"]["max_epochs"] == 3
    assert config["trainer"]["check_val_every_n_epoch"] == 5


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_short_and_valid(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = FOLDER / f"{recipe}.yaml"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 25
    assert printed_config(["fit", "--config", recipe], capsys)["data"]["class_path"].startswith("early_fusion_seg.")


@pytest.mark.parametrize("name", ["CamVidDataModule", "early_fusion_seg.CamVidDataModule"])
def test_data_classes_have_short_and_full_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(["fit", "--data", name, "--data.root", "x"], capsys)
    assert config["data"]["class_path"] == "early_fusion_seg.CamVidDataModule"
    assert config["data"]["init_args"]["root"] == "x"


@pytest.mark.parametrize("name", ["null", "true", "[x]", "~", "/x/a: b", "{a: 1}", "# x", "2", "- a"])
def test_a_root_that_looks_like_yaml_is_a_path(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--data.root", name], [f"--data.root={name}"], ["--data.init_args.root", name]):
        config = printed_config(["fit", "--data=FolderDataModule", *args, "--data.crop_size", "[32,64]"], capsys)
        assert config["data"]["init_args"]["root"] == name
        assert config["data"]["init_args"]["crop_size"] == [32, 64]
        predict = printed_config(["predict", *args, "--ckpt_path=x", "--output=null"], capsys)
        assert predict["data"]["init_args"]["root"] == name
        assert predict["output"] == "./null"
    assert main(["doctor", "folder", "--data.root", name]) != 0
    assert f"{name} is not a folder" in capsys.readouterr().out


def test_values_of_other_types_are_still_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--data.scale", "0.5", "--data.download=true", "--data.crop_size", "null", "--data.num_workers=3"]
    config = printed_config(["fit", "--config=camvid", "--data.root=x", *more], capsys)["data"]["init_args"]
    expected = {"scale": 0.5, "download": True, "crop_size": None, "num_workers": 3}
    assert {key: config[key] for key in expected} == expected


def test_a_data_module_in_the_current_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    text = "from early_fusion_seg import FolderDataModule\n\n\nclass Mine(FolderDataModule):\n    pass\n"
    (tmp_path / "module_here.py").write_text(text, encoding="utf-8")
    config = printed_config(["fit", "--data=module_here.Mine", "--data.root=x"], capsys)
    assert config["data"]["class_path"] == "module_here.Mine"
    assert main(["doctor", "--data=module_here.Mine", "--data.root=/none"]) != 0
    assert "/none is not a folder" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["option", "environment", "none"])
def test_the_traceback_of_a_reported_error_can_be_shown(
    way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(args: list[str]) -> int:
        assert args == ["--epochs", "3"]
        raise UserError("no such thing")

    monkeypatch.setattr("early_fusion_seg.cli.demo.main", broken)
    if way == "environment":
        monkeypatch.setenv("EARLY_FUSION_SEG_TRACEBACK", "1")
    assert main(["demo", "--epochs", "3", *(["--traceback"] if way == "option" else [])]) == 2
    message = capsys.readouterr().err
    assert ("Traceback" in message and "in broken" in message) == (way != "none")
    assert message.endswith("early-fusion-seg: error: no such thing\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("early_fusion_seg.cli.fit.main", broken)
    with pytest.raises(ZeroDivisionError):
        main(["fit"])


@pytest.mark.parametrize("lightning", [False, True])
def test_ctrl_c_is_one_line(
    lightning: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if lightning:
                sys.exit(1)
            raise

    monkeypatch.setattr("early_fusion_seg.cli.demo.main", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "early-fusion-seg: stopped by SIGINT\n"


def test_sigterm_in_any_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(args: list[str]) -> int:
        raise SIGTERMException

    monkeypatch.setattr("early_fusion_seg.cli.demo.main", stopped)
    assert main(["demo"]) == 143
    assert capsys.readouterr().err == "early-fusion-seg: stopped by SIGTERM\n"


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise MissingFileError("there is no file a.png\nexpected: b")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_has_the_same_message(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        next(iter(DataLoader(Broken(), num_workers=workers)))
    assert plain_message(caught.value) == "there is no file a.png\nexpected: b"


# --- errors of the user: one line

CAMVID = ["--config=camvid", "--data.root={camvid}", "--data.crop_size=[32,32]", *TINY_MODEL]
ERRORS: list[tuple[str, list[str], str]] = [
    ("no command", ["fti"], "unknown command 'fti'; did you mean fit? The commands are demo, fit"),
    ("no data", ["fit"], "required: data; the data modules are COCODataModule, CamVidDataModule, "),
    ("abstract data", ["fit", "--data.root=x"], "the data modules are COCODataModule, CamVidDataModule, "),
    ("unknown data", ["fit", "--data=Nope"], "data: unknown data module Nope; the data modules are "),
    ("no root", ["fit", "--config=camvid"], "data: CamVidDataModule: the following arguments are required: root"),
    ("wrong root", ["fit", "--config=camvid", "--data.root=/none", *TINY_MODEL], "/none is not a folder"),
    ("root 1e3", ["fit", "--data=FolderDataModule", "--data.root=1e3", *TINY_MODEL], "label CSV 1e3/labels.csv"),
    ("data key", ["fit", *CAMVID, "--data.rooot=x"], "'rooot' is not accepted; did you mean --data.root? "),
    ("data value", ["fit", *CAMVID, "--data.scale=abc"], "data.scale: CamVidDataModule: expected float. Got value"),
    ("data union", ["fit", *CAMVID, "--data.crop_size=abc"], "data.crop_size: CamVidDataModule: expected int; "),
    ("data refuses", ["fit", *CAMVID, "--data.batch_size=-1"], "batch_size is -1; expected a number above 0"),
    ("model key", ["fit", *CAMVID, "--model.widht=3"], "arguments: --model.widht=3; did you mean --model.width? "),
    ("model value", ["fit", *CAMVID, "--model.warmup_steps=abc"], "model.warmup_steps: expected int. Got value: abc"),
    ("model word", ["fit", *CAMVID, "--model.plan=abc"], "model.plan: expected one of ['early', 'progressive']"),
    ("model refuses", ["fit", *CAMVID, "--model.encoder=nope"], "nope"),
    ("both weights", ["fit", *CAMVID, "--class_weights=median", "--model.class_weights=[1,2]"],
     "--class_weights median and --model.class_weights are both given; leave one of them out"),
    ("kind of weights", ["fit", *CAMVID, "--class_weights=x"], "expected one of ['median', 'inverse-log']"),
    ("weights, no data", ["fit", "--config=camvid", "--data.root=/none", "--class_weights=median"], "/none is not a"),
    ("linked", ["fit", *CAMVID, "--model.class_names=[a]"], "model.class_names comes from the data, so leave it out"),
    ("no weights", ["fit", *CAMVID, "--model.encoder_weights=/none.pth"], "/none.pth"),
    ("key", ["fit", *CAMVID, "--foo=3"], "unrecognized arguments: --foo=3; early-fusion-seg fit --help lists"),
    ("value missing", ["fit", "--config"], "expected one argument"),
    ("trainer key", ["fit", *CAMVID, "--trainer.nope=1"], "unrecognized arguments: --trainer.nope=1"),
    ("trainer value", ["fit", *CAMVID, "--trainer.max_epochs=x"], "trainer.max_epochs: expected int; Given"),
    ("trainer refuses", ["fit", *CAMVID, "--trainer.max_epochs=-5"], "`max_epochs` must be a non-negative integer"),
    ("interval", ["fit", *CAMVID, *QUICK, "--trainer.val_check_interval=99"], "`val_check_interval` (99) must be less"),
    ("package", ["fit", *CAMVID, *QUICK, "--trainer.callbacks+=test_cli.NoPackage"], "No module named 'not_there'"),
    ("callback's metric", ["fit", *CAMVID, *QUICK, "--trainer.callbacks+=EarlyStopping",
     "--trainer.callbacks.monitor=nope", "--trainer.max_epochs=1"], "Early stopping conditioned on metric `nope`"),
    ("callback twice", ["fit", *CAMVID, *QUICK, "--trainer.callbacks+=Timer", "--trainer.callbacks+=Timer"],
     "more than one stateful callback"),
    ("strategy", ["fit", *CAMVID, *QUICK, "--trainer.strategy=fsdp"], "--trainer.strategy fsdp is not supported"),
    ("devices", ["fit", *CAMVID, *QUICK, "--trainer.devices=-7"], "the trainer does not accept its settings: "),
    ("logger", ["fit", *CAMVID, "--logger=nope"], "logger: expected one of ['csv', 'tensorboard', 'wandb']"),
    ("recipe", ["fit", "--config=nope"], "--config nope: no such file or recipe; the recipes are camvid"),
    ("broken yaml", ["fit", "--config=broken.yaml"], "Problems parsing config"),
    ("yaml key", ["fit", "--config=key.yaml"], "accept option 'widht'; did you mean --model.width? "),
    ("resume missing", ["fit", *CAMVID, "--ckpt_path=none.ckpt"], "there is no checkpoint none.ckpt"),
    ("resume last", ["fit", *CAMVID, "--ckpt_path=last"], "there is no checkpoint last; existing ones: none"),
    ("resume best", ["fit", *CAMVID, "--ckpt_path=best"], "there is no checkpoint best; existing ones: none"),
    ("output", ["fit", *CAMVID, "--output=s3://a/b"], "--output s3://a/b is a remote address; give a local folder"),
    ("resume cut", ["fit", *CAMVID, "--ckpt_path=cut.ckpt"], "cut.ckpt is damaged or not a checkpoint"),
    ("resume other", ["fit", *CAMVID, "--ckpt_path=other.ckpt"], "other.ckpt was not written by ReverseHRNetSeg"),
    ("resume changed", ["fit", *CAMVID, "--model.width=8", "--ckpt_path={ckpt}"], "model.width is 8, but 4 in "),
    ("no checkpoint", ["test", "--config=camvid", "--data.root={camvid}"], "test needs --ckpt_path FILE"),
    ("missing", ["test", "--config=camvid", "--data.root={camvid}", "--ckpt_path=none.ckpt"], "no checkpoint none"),
    ("cut", ["validate", "--config=camvid", "--data.root={camvid}", "--ckpt_path=cut.ckpt"], "cut.ckpt is damaged"),
    ("remote", ["predict", "--data.root=.", "--ckpt_path=https://a.b/c.ckpt"], "c.ckpt is a remote address"),
    ("model differs", ["predict", "--data.root=.", "--ckpt_path={ckpt}", "--model.width=8"], "model.width is 8, but 4"),
    ("model unknown", ["predict", "--data.root=.", "--ckpt_path={ckpt}", "--model.nope=8"], "model.nope is not an "),
    ("encoder missing", ["predict", "--data.root=.", "--ckpt_path={ckpt}", "--model.encoder_weights=/n.pth"], "/n.pth"),
    ("two sources", ["predict", "a.jpg", "--ckpt_path", "x", "b.jpg"], "one SOURCE and got 2: a.jpg, b.jpg; put a"),
    ("no source", ["predict", "--ckpt_path", "x"], "predict needs SOURCE: a folder of images, an image, a pattern"),
    ("source twice", ["predict", "a.jpg", "--data.root=b.jpg"], "a.jpg and --data.root are both given"),
    ("no such class", ["predict", ".", "--ckpt_path={ckpt}", "--classes=[Cat]"], "classes has 'Cat'; the classes of"),
    ("folder missing", ["predict", "/none", "--ckpt_path={ckpt}"], "there are no images at /none; expected a folder"),
    ("other classes", ["validate", "--data=FolderDataModule", "--data.root={folder}", "--ckpt_path={ckpt}"],
     "class 0 is 'ground' in the data, but 'Sky' in "),
    ("other classes to predict", ["predict", "--data.root={folder}", "--ckpt_path={ckpt}"], "class 0 is 'ground'"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "sentence"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])
def test_a_user_error_is_one_line(
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
    assert (checkpoint.parents[1] / "metrics.csv").is_file()  # a refused run keeps the metrics of an earlier one


class NoPackage(Callback):
    def on_train_start(self, trainer: object, pl_module: object) -> None:
        import not_there  # type: ignore[import-not-found]  # noqa: F401


def test_data_with_fewer_classes_is_refused() -> None:
    check_classes_match(["a", "b"], ["a", "b"], "x.ckpt")
    with pytest.raises(UserError, match=r"the data has 1 classes, but x\.ckpt has 2"):
        check_classes_match(["a"], ["a", "b"], "x.ckpt")
