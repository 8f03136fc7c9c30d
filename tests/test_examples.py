import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from early_fusion_seg import ReverseHRNetSeg
from early_fusion_seg.__main__ import main
from early_fusion_seg.data import built_in_datasets
from early_fusion_seg.data.camvid import fake_camvid_segnet
from early_fusion_seg.data.folder import fake_folder

ROOT = Path(__file__).parents[1]
TINY = ["--model.encoder", "resnet18", "--model.encoder_weights", "random", "--model.width", "8"]
SHORT = ["--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false", "--data.crop_size", "32"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def run_script(name: str, *args: str) -> None:
    old = sys.argv
    sys.argv = [name, *args]
    try:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    finally:
        sys.argv = old


@pytest.mark.filterwarnings("ignore")  # scripts do not silence Lightning's warnings
def test_train_in_python(tmp_path):
    run_script("train_in_python.py", "--max_steps", "1", "--output", str(tmp_path))
    assert (tmp_path / "panel.png").stat().st_size > 1000


@pytest.mark.filterwarnings("ignore")  # scripts do not silence Lightning's warnings
def test_own_network(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_script("own_network.py", "--max_steps", "2")
    assert "val/mIoU" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_share_a_head(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data", "SyntheticDataModule", "--data.train_scenes", "4", "--data.val_scenes", "2", *TINY, *SHORT]
    assert main(["fit", *options, "--output", "run"]) == 0
    (last,) = Path("run").glob("**/last.ckpt")
    run_script("share_a_head.py", str(last), "head.ckpt")
    trained, shared = (ReverseHRNetSeg.load_from_checkpoint(path) for path in (last, "head.ckpt"))
    for name, weight in trained.network.head.state_dict().items():
        expected = weight.half() if weight.is_floating_point() else weight
        assert torch.equal(shared.network.head.state_dict()[name], expected.to(weight.dtype))
    stored = torch.load("head.ckpt", weights_only=True)
    assert {value.dtype for value in stored["state_dict"].values()} == {torch.float16, torch.int64}
    capsys.readouterr()
    assert main(["fit", *options, "--ckpt_path", "head.ckpt", "--output", "again"]) != 0
    assert "no optimizer state, so a training cannot resume from it" in capsys.readouterr().err


def test_train_ddp(tmp_path):
    options = ["--devices", "2", "--max_steps", "2", "--scenes", "5", "--output", str(tmp_path)]
    script = str(ROOT / "examples" / "train_ddp.py")
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "process(es)," in line]  # only one process prints
    assert re.fullmatch(r"2 process\(es\), 2 steps: \d+\.\d % mIoU on 5 images", line.strip())
    assert json.loads((tmp_path / "results.json").read_text())["images"] == 5  # Lightning's sampler would repeat one
    assert (tmp_path / "last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # scripts do not silence Lightning's warnings
@pytest.mark.parametrize("kind", ["camvid", "cityscapes", "coco", "mapillary", "voc"])
def test_torchvisions_network_trains_with_each_data_module(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fake-data", kind, "data", "--images", "2", "--size", "48", "64"]) == 0
    run_script("torchvision_fcn.py", built_in_datasets()[kind].__name__, "data", "64", "1")
    assert list(tmp_path.rglob("*.ckpt"))


def test_example_scripts_are_short():
    lengths = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "examples").glob("*.py")}
    assert lengths
    assert max(lengths.values()) <= 60
    lengths = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "examples" / "deploy").glob("*.py")}
    assert lengths.keys() == {"onnx_predict.py", "pt2_predict.py"}
    assert max(lengths.values()) <= 40


def test_python_in_the_readme_runs():
    (code,) = blocks(ROOT / "README.md", "python")
    scope: dict[str, object] = {}
    exec(code, scope)
    assert scope["logits"].shape == (1, 11, 90, 120)
    assert scope["labels"].shape == (90, 120)
    assert scope["sample"]["image"].shape == (3, 90, 120)


def readme_commands(word: str) -> list[list[str]]:
    """Return the arguments of the early-fusion-seg commands in the block with `word`."""
    (block,) = [b for b in blocks(ROOT / "README.md", "bash") if word in b]
    return [line.split()[1:] for line in block.splitlines() if line.startswith("early-fusion-seg")]


def test_other_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert [main(command) for command in readme_commands("fake-data")] == [0, 0, 0]
    assert "mIoU" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of training batches")  # the replica is tiny
@pytest.mark.parametrize("word", ["CAMVID", "DATA"])
def test_commands_of_the_readme_run(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if word == "CAMVID":
        fake_camvid_segnet(Path("CAMVID"))
        shutil.copytree("CAMVID/val", "FOLDER_OF_IMAGES")
    else:
        fake_folder(Path("DATA"))
        (labels,) = blocks(ROOT / "README.md", "csv")
        assert labels.splitlines()[0] == Path("DATA/labels.csv").read_text().splitlines()[0]
        images = next(p for p in Path("DATA/images").rglob("*") if p.is_file()).parent
        shutil.copytree(images, "NEW_PHOTOGRAPHS")
    fit, validate, predict = readme_commands(f"{word} " if word == "DATA" else word)
    assert main([*fit, *SHORT, *TINY]) == 0
    assert main([*validate, "--trainer.enable_progress_bar", "false"]) == 0
    assert main([*predict, "--trainer.enable_progress_bar", "false"]) == 0
    assert Path("runs/validate/version_0/results.json").exists()
    assert list(Path("runs/predict/version_0/masks").rglob("*.png"))
