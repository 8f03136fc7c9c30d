"""What commands print: names and paths as they are, on any terminal."""

import io
import json
import sys
from pathlib import Path

import pytest
import rich
from toy_folder import folder_data

from early_fusion_seg.__main__ import main
from early_fusion_seg.io import download
from early_fusion_seg.io.terminal import plain

MARKUP = ["sign [back]", "left/right [/both]", "[red]", ":car:", "Kätzchen 猫"]
CSV = "\n".join(f"{i},{i},{name},#{i:06}" for i, name in enumerate(MARKUP))


@pytest.mark.parametrize("name", MARKUP)
def test_a_text_is_printed_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rich.get_console().print(plain(name))
    assert capsys.readouterr().out == f"{name}\n"


def test_class_names_and_paths_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = folder_data(Path("[data] :car:"), {"train": ["x"], "val": ["y"]}, CSV)
    assert main(["doctor", "folder", f"--data.root={data}"]) == 0
    printed = capsys.readouterr().out
    assert f"{data}: a folder with a label CSV" in printed
    assert all(name in printed for name in MARKUP)
    predicted = data / "masks/val"
    assert main(["evaluate", "folder", f"--data.root={data}", f"--predictions={predicted}", "--output=[/old]"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in MARKUP)
    assert "written: [/old]/results.json\n" in printed


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_characters_that_the_terminal_lacks_are_escaped(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder_data(tmp_path / "猫", {"train": ["x"], "val": ["y"]}, CSV)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    out = tmp_path / "out"
    args = ["evaluate", "folder", f"--data.root={data}", f"--predictions={data / 'masks/val'}", f"--output={out}"]
    assert main(args) == 0
    assert main(["doctor", "folder", f"--data.root={data}"]) == 0
    assert main(["fake-data", "voc", str(tmp_path / "猫 2"), "--images=1"]) == 0
    assert main(["submit", "voc", f"--data.root={tmp_path / '猫 2'}", f"--check={data}"]) == 1
    assert main(["evaluate", "voc", "--data.root=猫", "--predictions=x"]) == 2
    terminal.flush()
    printed = terminal.buffer.getvalue().decode(encoding)
    assert printed.count("K\\xe4tzchen \\u732b" if encoding == "ascii" else "Kätzchen \\u732b") >= 2
    assert f"--data.root '{tmp_path}/\\u732b 2'" in printed
    assert "Kätzchen 猫" in json.loads((out / "results.json").read_bytes())["per_class"]


def test_the_progress_of_a_download_shows_the_name_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    download._write_response(io.BytesIO(b"abc"), tmp_path / "a [v2] :car:.zip.part", 0, 3)
    assert "a [v2] :car:.zip" in capsys.readouterr().err
