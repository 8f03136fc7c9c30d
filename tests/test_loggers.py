"""What command line runs log to CSV, TensorBoard and W&B. W&B runs offline, and its run file is parsed."""

import csv
import json
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runs import QUICK, QUIET, command, fit_args
from PIL import Image

from early_fusion_seg.__main__ import main

pytestmark = pytest.mark.usefixtures("elsewhere")
SCORES = {"val/mIoU", "val/loss", "val/IoU/Road"} | {
    f"train/{name}" for name in ("loss", "lr", "images_per_second", "data_wait")
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def evaluate_args(entry: str, camvid: Path, checkpoint: Path, output: Path, *more: str) -> list[str]:
    data = ["--config=camvid", f"--data.root={camvid}", f"--output={output}", f"--ckpt_path={checkpoint}"]
    return [entry, *data, *QUICK, QUIET[0], *more]


def csv_columns(run: Path) -> set[str]:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return set(csv.DictReader(file).fieldnames or ())


def tensorboard(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run), size_guidance={"images": 0}).Reload()


def text(events: Any, tag: str) -> str:
    return str(events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode())


# --- the run file of W&B: `Record` messages in the log format of LevelDB


def records(content: bytes) -> Iterator[bytes]:
    """Join the fragments of each record: checksum, length, kind (1: whole, 4: last), content; in blocks of 32 KiB."""
    place, parts = 7, b""  # after the header of the file
    while place + 7 <= len(content):
        if (left := -place % 32768) < 7 and left:
            place += left  # too short for another header
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def nested(items: Any) -> dict[str, Any]:
    """Convert the items of a record to nested dicts; images and tables have several items each."""
    row: dict[str, Any] = {}
    for item in items:
        *parents, last = item.nested_key or [item.key]
        place = row
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return row


class WandbRun:
    """Contents of a run file: `history`, one dict per log call, and `config`."""

    def __init__(self, folder: Path) -> None:
        import wandb
        from wandb.proto.wandb_internal_pb2 import Record

        wandb.finish()
        wandb.teardown()
        (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
        self.files = path.parent / "files"
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        for content in records(path.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "run":
                self.run = record.run
            for update in (record.run.config.update, record.config.update):
                self.config |= {item.key: json.loads(item.value_json) for item in update}
            if record.WhichOneof("record_type") == "history":
                self.history.append(nested(record.history.item))

    def values(self, key: str) -> list[Any]:
        return [row[key] for row in self.history if key in row]


def test_records_are_joined_across_blocks() -> None:
    whole, first, middle, last = b"a" * 100, b"b" * (32768 - 7 - 107 - 7), b"c" * (32768 - 7), b"d" * 9
    content = b":W&B" + b"\0" * 3
    for kind, part in ((1, whole), (2, first), (3, middle), (4, last)):
        content += struct.pack("<IHB", 0, len(part), kind) + part
    assert list(records(content)) == [whole, first + middle + last]
    padded = content[: 7 + 107] + struct.pack("<IHB", 0, 32768 - 7 - 107 - 7 - 3, 1) + b"e" * (32768 - 7 - 107 - 7 - 3)
    padded += b"\0" * 3 + struct.pack("<IHB", 0, 1, 1) + b"f"
    assert [record[:1] for record in records(padded)] == [b"a", b"e", b"f"]


# --- fit


@pytest.mark.usefixtures("offline")
def test_fit_logs_scores_panels_and_config_to_all_three_loggers(camvid: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--wandb.project=mine", "--wandb.name=a run", "--wandb.tags=[x, y]", "--wandb.entity=us"]
    assert main(fit_args(camvid, run, "--logger=[tensorboard, wandb]", "--trainer.max_epochs=1", *options)) == 0
    wandb = WandbRun(run)
    assert (wandb.run.project, wandb.run.display_name, list(wandb.run.tags)) == ("mine", "a run", ["x", "y"])
    assert wandb.run.entity == "us"
    assert csv_columns(run) >= SCORES
    events = tensorboard(run)
    assert set(events.Tags()["scalars"]) >= SCORES
    assert {key for row in wandb.history for key in row} >= SCORES
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        (written,) = (float(row["val/IoU/Road"]) for row in csv.DictReader(file) if row["val/IoU/Road"])
    assert wandb.values("val/IoU/Road") == pytest.approx([written])
    assert events.Scalars("val/IoU/Road")[0].value == pytest.approx(written)

    assert len(list((run / "panels" / "last").rglob("*.png"))) == len(events.Tags()["images"]) == 3
    (panels,) = wandb.values("panels/val")
    assert (panels["_type"], panels["count"]) == ("images/separated", 3)
    with Image.open(wandb.files / panels["filenames"][0]) as picture:
        assert min(picture.size) > 300

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    for part in ("model", "data", "trainer", "seed_everything", "logger"):
        assert wandb.config[part] == config[part]
    assert yaml.safe_load(text(events, "config").strip("`").removeprefix("yaml")) == config


def test_logger_tensorboard_adds_tensorboard_to_the_csv_file(camvid: Path, tmp_path: Path) -> None:
    assert main(fit_args(camvid, tmp_path / "run", "--logger=tensorboard", "--trainer.max_epochs=1")) == 0
    assert "val/mIoU" in tensorboard(tmp_path / "run").Tags()["scalars"]
    assert (tmp_path / "run" / "metrics.csv").is_file()
    assert not (tmp_path / "run" / "wandb").exists()


# --- validate and test


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("entry", "split"), [("validate", "val"), ("test", "test")])
def test_evaluation_logs_confusion_matrix_table_and_config_to_both(
    entry: str, split: str, camvid: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main(evaluate_args(entry, camvid, checkpoint, run, "--logger=[wandb, tensorboard]")) == 0
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    wandb, events = WandbRun(run), tensorboard(run)

    (table,) = wandb.values(f"results/{split}")
    content = json.loads((wandb.files / table["path"]).read_text(encoding="utf-8"))
    assert content["columns"] == ["class", "IoU"]
    assert dict(content["data"]) == results["per_class"]
    assert wandb.values(f"{split}/mIoU") == pytest.approx([results["miou"]])
    assert wandb.config["data"]["init_args"]["root"] == str(camvid)
    assert wandb.config["model"]["width"] == 4
    assert "| Road | " in text(events, f"results/{split}")

    (confusion,) = wandb.values("confusion")
    pictures = [run / "confusion.png", wandb.files / confusion["filenames"][0]]
    first, second = (Image.open(path).convert("RGB").tobytes() for path in pictures)
    assert first == second
    assert f"confusion/{split}" in events.Tags()["images"]


# --- W&B without an account or a connection


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.usefixtures("logged_out")
def test_wandb_without_an_account_is_reported_before_training(
    camvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_args(camvid, tmp_path / "run", "--logger=wandb")) == 2
    printed = capsys.readouterr().err
    assert "W&B does not start (" in printed
    assert "`wandb login`" in printed
    assert "WANDB_MODE=offline" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.slow
def test_wandb_without_a_connection_is_reported_before_training(camvid: Path, tmp_path: Path) -> None:
    address = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | address
    args = command(*fit_args(camvid, tmp_path / "run", "--logger=wandb"))  # W&B reads the timeout once per process
    done = subprocess.run(args, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "early-fusion-seg: error: W&B does not start (" in done.stderr
    assert "WANDB_MODE=offline" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_an_unknown_logger_is_named(camvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(fit_args(camvid, tmp_path / "run", "--logger=[tensorboard, mlflow]")) == 2
    printed = capsys.readouterr().err
    assert "mlflow" in printed
    assert "wandb" in printed
