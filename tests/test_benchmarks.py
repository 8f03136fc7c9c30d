"""The benchmark scripts in their quick form; nothing here depends on the speed of the machine."""

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from early_fusion_seg import FrozenEncoder, ReverseHRNet
from early_fusion_seg.encoder.onednn_blocks import lacks_bfloat16

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
PAGE = BENCHMARKS.parents[1] / "docs" / "benchmarks.md"
needs_peers = pytest.mark.skipif(
    find_spec("segmentation_models_pytorch") is None, reason="the peers come with the extra bench"
)


def quick(script: str, output: Path, *options: str, picture: bool = True) -> dict[str, list[dict[str, object]]]:
    """Run a script and return the tables of its JSON."""
    page = PAGE.read_text()
    words = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick", "--output", str(output), *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    assert PAGE.read_text() == page
    assert (output / f"benchmark_{script}.png").exists() == picture
    if picture:
        with Image.open(output / f"benchmark_{script}.png") as drawn:
            assert drawn.width > 100
    record = json.loads((output / f"{script}.json").read_text())
    assert {"title", "text", "command", "machine", "date"} < set(record)
    return record["rows"]


def test_the_page_is_made_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    page = importlib.import_module("page")
    assert {path.stem for path in BENCHMARKS.glob("*.json")} <= {*page.SCRIPTS, *page.IN_PAGES}
    assert page.page() == PAGE.read_text()
    for script, path in page.IN_PAGES.items():
        assert page.with_section(path, script) == path.read_text()


def test_the_page_shows_every_picture_and_each_is_small():
    pictures = list((PAGE.parent / "images").glob("benchmark_*.png"))
    assert pictures
    for picture in pictures:
        assert any(f"(images/{picture.name})" in path.read_text() for path in PAGE.parent.glob("*.md"))
        assert picture.stat().st_size < 60_000


@pytest.mark.slow
def test_inference(tmp_path):
    rows = quick("inference", tmp_path)
    assert [row["peer"] for row in rows["Prediction"]] == ["torchvision fcn_resnet50"]
    encoder = {(row["what"], row["peer"]): row for row in rows["Encoder"]}
    assert encoder["encoder, float32", "timm"]["difference"] < 1e-4
    assert (("encoder, bfloat16", "timm") in encoder) != lacks_bfloat16()
    assert [row["images"] for row in rows["Memory over many images"]] == list(range(1, 11))


@pytest.mark.slow
def test_several_heads(tmp_path):
    rows = quick("inference", tmp_path, "--parts", "heads", picture=False)["Several heads"]
    names = [f"{encoder}, heads: {n}" for encoder in ("resnet50", "tf_efficientnet_lite0") for n in (1, 2, 4)]
    assert [row["what"] for row in rows] == names
    assert [row["met"] is None for row in rows] == [True, False, True, True, True, True]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime comes with the extra onnx")
def test_export(tmp_path):
    rows = quick("export", tmp_path)
    assert [(row["what"], row["peer"]) for row in rows["Time"]] == [
        ("resnet18, onnxruntime", "eager"),
        ("resnet18, pt2", "eager"),
    ]
    assert all(row["cpu ratio"] > 0 for row in rows["Time"])
    (facts,) = rows["Share of the encoder, and size of the files"]
    assert min(facts["onnx (MB)"], facts["pt2 (MB)"]) > 40  # 4 bytes for each of 11 million parameters of the encoder


@pytest.mark.slow
def test_evaluation(tmp_path):
    rows = quick("evaluation", tmp_path)  # which ends with an error where the matrices differ
    cases = ["uint8, 256x512", "int64, 256x512", "uint8, 256x512, deterministic", "uint8, 64x128, deterministic"]
    assert [row["what"] for row in rows["Memory of an update"]] == cases
    compared = [row["what"] for row in rows["Time of an update"] if row["peer"] == "torchmetrics"]
    assert compared == [cases[0], cases[1], cases[3]]
    (large,) = rows["Memory of one large image"]
    assert large["pixels that differ"] == 0


@pytest.mark.slow
@needs_peers
def test_memory(tmp_path):
    rows = quick("memory", tmp_path, "--peers", "Unet", "PSPNet", "hrnet_w18")
    peers = {row["network"]: row["saved / ours"] for row in rows["Against the peers, an image of 512x512"]}
    assert list(peers) == ["ours", "PSPNet, frozen", "Unet, frozen", "hrnet_w18, trained end to end"]
    assert peers["Unet, frozen"] > 1 / 0.65  # bytes, not seconds: equal on every machine
    flops = {row["network"]: row["GFLOPs"] for row in rows["Against the peers, an image of 512x512"]}
    assert flops["PSPNet, frozen"] < flops["hrnet_w18, trained end to end"] < flops["ours"] < flops["Unet, frozen"]
    own = {row["network"]: row["saved / ours"] for row in rows["Ours in other settings"]}
    met = [row["met"] for table in rows.values() for row in table if row["met"] is not None]
    assert met == [True] * 7  # Unet, three of ours, three exponents
    assert own["activation checkpointing"] < 0.6
    assert own["171 classes"] < 1.15
    assert all(row["exponent"] is None or row["exponent"] < 1.05 for row in rows["Growth"])


@pytest.mark.slow
@needs_peers
def test_train_step(tmp_path):
    rows = quick("train_step", tmp_path, "--peers", "Unet", "fcn_resnet50", "hrnet_w18")
    peers = ["Unet", "fcn_resnet50", "hrnet_w18", "Unet on our encoder", "the encoder alone"]
    expected = ["ours, activation checkpointing", *peers]
    assert [row["peer"] for row in rows["Training steps"]] == (1 if lacks_bfloat16() else 2) * expected
    assert {row["part"] for row in rows["Where the time of a step goes"]} >= {"encoder, forward", "head, backward"}
    assert len(rows["Growth, float32"]) == 3


@pytest.mark.slow
@needs_peers
def test_street_scenes(tmp_path):
    (caption, rows), *others = quick("street_scenes", tmp_path, "--peers", "Unet", picture=False).items()
    assert (caption, others) == ("512x1024", [])
    networks = {str(row["network"]).split(":")[0]: row for row in rows[:2]}
    assert networks["Unet"]["met"] == (networks["ours"]["images / s"] > networks["Unet"]["images / s"])
    assert networks["Unet"]["peak (GB)"] > 4 * 32.5e6 / 1e9  # its parameters, in float32


@pytest.mark.slow
@needs_peers
def test_from_scratch(tmp_path):
    rows = quick("from_scratch", tmp_path, "--peers", "Unet", picture=False)["CamVid"]
    assert [row["network"] for row in rows] == ["ours", "Unet"]
    assert all(0 <= row["val mIoU (%)"] <= 100 for row in rows)


@pytest.mark.slow
def test_data(tmp_path):
    rows = quick("data", tmp_path, picture=False)
    assert next(row["data set"] for row in rows["A training sample"]) == "Cityscapes"
    assert all(row["ratio"] > 0 for row in rows["A training sample"])
    assert [row["images"] for row in rows["Listing"]] == [100]


@pytest.mark.slow
@needs_peers
def test_heads(tmp_path):
    log = tmp_path / "log.jsonl"
    options = ["--heads", "default", "--peers", "FPN", "linear", "--parts", "1", "--log", str(log)]
    rows = quick("heads", tmp_path, *options, picture=False)
    heads = ["default", "FPN", "linear"]
    held_out, steps, time, thin = rows.values()
    for row, head in zip(held_out, heads, strict=True):
        assert row["head"] == head
        tried = [value for name, value in row.items() if name.startswith("lr ") and value is not None]
        assert len(tried) >= 3
        assert all(0 <= value <= 100 for value in tried)
        assert (row["dropout 0.1"] is not None) == (head == "FPN")
    for table in (steps, time, thin):
        assert [row["head"] for row in table] == heads
    assert steps[0]["time"] == 1
    assert {row["steps"] for row in steps} == {3}
    assert time[2]["steps"] > 3  # a linear head is faster than ours
    assert steps[0]["default minus it"] == "0.0 ± 0.0"
    trainings = log.read_text()
    assert quick("heads", tmp_path, *options, picture=False) == rows  # resumed: nothing is trained or timed again
    assert log.read_text() == trainings


@pytest.mark.slow
@needs_peers
def test_freezing(tmp_path):
    log = tmp_path / "log.jsonl"
    names = ["ours, frozen", "ours, frozen random weights", "Unet, fine-tuned"]
    options = ["--networks", *names, "--encoder_rates", "0", "1e-3", "--log", str(log)]
    rows = quick("freezing", tmp_path, *options)
    val, held_out = rows.values()
    assert [row["network"] for row in val] == names
    assert [row["network"] for row in held_out] == names[2:]
    frozen, random, unet = val
    assert frozen["time"] == 1
    assert random["saved (MiB)"] == frozen["saved (MiB)"] < unet["saved (MiB)"]
    assert frozen["weights to store (MB)"] < random["weights to store (MB)"]  # random weights are stored
    assert frozen["encoder lr"] is None
    trainings = log.read_text().splitlines()
    assert len(trainings) == 2 * len(names) + 2
    again = quick("freezing", tmp_path, *options)["Val"]
    assert [row["of each seed"] for row in again] == [row["of each seed"] for row in val]
    assert log.read_text().splitlines() == trainings  # resumed: nothing is trained again


@needs_peers
def test_thirds_of_train_are_contiguous_in_each_video(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    thirds = importlib.import_module("camvid_training").thirds
    keys = ["b_2", "a_1", "a_3", "b_1", "a_2", "b_3"]
    assert [[keys[i] for i in part] for part in thirds(keys)] == [["a_1", "b_1"], ["a_2", "b_2"], ["a_3", "b_3"]]


@needs_peers
def test_a_training_that_was_interrupted_goes_on_as_if_it_had_not_been(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    training = importlib.import_module("camvid_training").Training
    encoder = FrozenEncoder("resnet18", weights="random")
    batches = [(torch.full((2, 3, 32, 32), i, dtype=torch.uint8), torch.full((2, 32, 32), i)) for i in range(4)]

    def start():
        torch.manual_seed(0)
        head = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(64, 11, 1))
        return training([OnFirstMap(head).train()], [1e-2], encoder, len(batches))

    whole, first, second = start(), start(), start()
    for batch in batches:
        whole.step(*batch)
    for batch in batches[:2]:
        first.step(*batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[second.done :]:
        second.step(*batch)
    for a, b in zip(whole.heads[0].parameters(), second.heads[0].parameters(), strict=True):
        assert torch.equal(a, b)


@needs_peers
@pytest.mark.parametrize("freeze", [True, False])
def test_an_encoder_that_is_not_frozen_is_trained_with_its_own_rate(freeze, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    encoder = FrozenEncoder("resnet18", weights="random", freeze=freeze)
    before = encoder.state_hash()
    head = OnFirstMap(nn.Conv2d(64, 11, 1)).train()
    training = importlib.import_module("camvid_training").Training([head], [0.0], encoder, 4, encoder_rate=1e-2)
    weight = head.head.weight.detach().clone()
    for _ in range(2):  # the first step of the warmup has the rate 0
        training.step(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 32, 32, dtype=torch.long))
    assert (encoder.state_hash() == before) == freeze
    assert torch.equal(head.head.weight, weight)


class OnFirstMap(nn.Module):
    """A head that takes the finest map only."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, maps, images):
        return self.head(maps[0])


@needs_peers
def test_heads_has_the_packages_default(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    heads = importlib.import_module("heads")
    encoder = FrozenEncoder("resnet18", weights="random")
    default = ReverseHRNet(encoder.channels, encoder.strides, heads.K)
    assert str(heads.make_head("default", encoder, 0)) == str(default)


@needs_peers
@pytest.mark.parametrize("encoder", ["resnet18", "mobilenetv3_small_100"])
def test_every_head_gives_logits_on_the_encoders_maps(encoder, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    heads = importlib.import_module("heads")
    frozen = FrozenEncoder(encoder, weights="random")
    images = torch.rand(2, 3, 64, 96)
    maps = frozen(images)
    for name in [*heads.HEADS, *heads.PEERS]:
        n, k, h, w = heads.make_head(name, frozen, 0)(maps, images).shape
        assert (n, k) == (2, heads.K)
        assert 64 % h == 96 % w == 0


@needs_peers
def test_the_interval_of_a_mean(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    interval = importlib.import_module("heads").interval
    assert interval([40.0]) == "40.0"
    assert interval([40.0, 42.0, 44.0]) == "42.0 ± 5.0"  # 4.303 * 2 / sqrt(3)


def test_only_our_resampling_of_a_vision_transformers_maps_shifts_nothing(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("vision_transformers")
    shifts = {way: script.shift(way, source=14, target=8) for way in script.WAYS}
    assert shifts.pop("ours") < 1e-3
    assert min(shifts.values()) > 5


@pytest.mark.slow
def test_observe():
    words = [sys.executable, str(BENCHMARKS / "observe.py"), "--steps", "31", "--repeats", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if "with" in line and "of a step" in line]) == 4


@needs_peers
def test_live_bytes_are_those_of_the_storages_that_are_alive(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    live_bytes = importlib.import_module("memory").LiveBytes
    x = torch.ones(1000)
    with live_bytes([x]) as live:
        a = x + 1  # 4000 bytes
        b = a.view(10, 100)  # the same storage
        assert live.alive() == 4000
        c = b * 2
        assert live.alive() == 8000
        del a, b
        assert live.alive() == 4000
        x.mul_(2)
        assert (live.alive(), live.peak) == (4000, 8000)
        del c
    assert live.alive() == 0


def test_the_tables_of_encoders_are_what_timm_says(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    encoders, cells = importlib.import_module("encoders"), importlib.import_module("page").cells
    rows = [encoders.facts(name) for name in encoders.ENCODERS]
    shown = table_rows(PAGE.with_name("encoders.md"))
    for row in rows:
        name, *columns = cells(row)
        assert shown[name][: len(columns)] == columns
        assert (len(shown[name]) > len(columns)) == ("reason" not in row)  # the times follow
    readme = table_rows(BENCHMARKS.parents[1] / "README.md")
    named = [row for row in rows if row["encoder"] in readme]
    assert len(named) >= 4
    for row in named:
        assert readme[row["encoder"]] == cells({key: row[key] for key in ("weights", "license", "parameters (M)")})


def table_rows(page: Path) -> dict[str, list[str]]:
    """Return the other cells of each table row of a page by the first cell."""
    lines = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("| ")]
    return {name.strip(" `"): [cell.strip() for cell in row] for name, *row in lines}


@pytest.mark.slow
def test_encoders(tmp_path):
    rows = quick("encoders", tmp_path, picture=False)["Encoders"]
    (reference,) = [row for row in rows if row["encoder"] == "resnet50.a1_in1k"]
    assert reference["time, float32"] == 1
    assert all(row["time, float32"] > 0 for row in rows)
