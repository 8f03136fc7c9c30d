import subprocess
import sys

import pytest

from early_fusion_seg.__main__ import main
from early_fusion_seg.cli.arguments import dataset_names
from early_fusion_seg.cli.datasets import datasets

FAST = ("calibrate", "demo", "doctor", "evaluate", "fake-data", "submit")


def test_help_of_commands_without_a_trainer_does_not_import_pytorch() -> None:
    code = (
        "import sys; from early_fusion_seg.__main__ import main\n"
        f"assert [main([command, '--help']) for command in {FAST}] == [0] * {len(FAST)}\n"
        "assert not {'torch', 'lightning', 'timm', 'albumentations'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for text in ("--epochs", "--full", "--predictions", "--images", "--check", "--data.root"):
        assert text in done.stdout


def test_names_of_data_sets_are_known_without_importing_them() -> None:
    assert dataset_names() == list(datasets())


@pytest.mark.parametrize(("typo", "command"), [("evalute", "evaluate"), ("train", None), ("fake_data", "fake-data")])
def test_an_unknown_command_names_the_nearest_one(
    typo: str, command: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([typo]) == 2
    error = capsys.readouterr().err
    assert f"unknown command {typo!r}" in error
    assert (f"did you mean {command}?" in error) == (command is not None)


def test_the_help_of_one_data_set_has_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "mapillary", "--help"])
    assert "--data.version" in capsys.readouterr().out
