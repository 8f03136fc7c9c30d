"""Fixtures for all tests: no network except this machine, one thread per worker, a temporary cache."""

import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import SIZE, fit_args

from early_fusion_seg.__main__ import main
from early_fusion_seg.data import class_pixel_counts
from early_fusion_seg.data.camvid import fake_camvid_segnet

SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")  # set by Lightning

torch.set_num_threads(1)  # tests run in parallel with pytest-xdist


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect
    lookup = socket.getaddrinfo

    def checked_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not _is_loopback(address[0]):
            raise AssertionError(f"a test opened a connection to {address}")
        connect(self, address)

    def checked_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host is not None and not _is_loopback(host):
            raise AssertionError(f"a test looked up {host}")
        return lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", checked_connect)
    monkeypatch.setattr(socket, "getaddrinfo", checked_lookup)


@pytest.fixture(autouse=True)
def seeded_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed the order of training images, which is random without a seed."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Use a temporary cache folder. XDG_CACHE_HOME stays as it is, because matplotlib reads its list of fonts there."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_pixel_counts, "cache_folder", lambda: folder)
        yield folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that run commands: an empty working directory, and environment variables of the seed that are reset."""
    monkeypatch.chdir(tmp_path)
    for name in SEEDS:
        monkeypatch.setenv(name, "0")


@pytest.fixture(scope="session")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fake replica of CamVid with three images in each split."""
    return fake_camvid_segnet(tmp_path_factory.mktemp("data") / "camvid", images=3, size=SIZE)


@pytest.fixture(scope="session")
def trained(camvid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run of two epochs; tests must not change it."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    with pytest.MonkeyPatch.context() as patch:
        for name in SEEDS:
            patch.setenv(name, "0")
        assert main(fit_args(camvid, run)) == 0
    return run


@pytest.fixture
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "best.ckpt"


def _is_loopback(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in ("localhost", "", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
