"""The package where neither wandb nor tensorboard is installed."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cli_runs import fit_args


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to all installed packages but these two."""
    site = tmp_path_factory.mktemp("site")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.startswith(("wandb", "tensorboard")):
            (site / path.name).symlink_to(path)
    return site


def run(site: Path, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the packages of `site` alone: -S leaves out those of the environment."""
    paths = [str(Path(__file__).parents[1]), str(site)]
    code = f"""
import importlib.util, sys
sys.path += {paths}
print(*map(importlib.util.find_spec, ("wandb", "tensorboard")))
from early_fusion_seg.__main__ import main
sys.exit(main({list(args)}))"""
    return subprocess.run([sys.executable, "-S", "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_package_trains_without_them(site: Path, camvid: Path, tmp_path: Path) -> None:
    done = run(site, tmp_path, *fit_args(camvid, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("None None\n")
    assert (tmp_path / "run" / "metrics.csv").is_file()


@pytest.mark.parametrize(
    ("logger", "command"),
    [("tensorboard", "pip install 'early-fusion-seg[tensorboard]'"), ("wandb", "pip install wandb")],
)
def test_a_logger_that_is_not_installed_is_named(
    site: Path, camvid: Path, tmp_path: Path, logger: str, command: str
) -> None:
    done = run(site, tmp_path, *fit_args(camvid, tmp_path / "run"), "--logger", logger)
    assert done.returncode == 2
    assert f"--logger {logger} needs {logger}, which is not installed: {command}" in done.stderr
    assert "Traceback" not in done.stderr
