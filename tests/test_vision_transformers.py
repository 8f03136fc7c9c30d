"""Plain vision transformers as encoders: one stride, four depths. See also test_resample.py and test_segmenter.py."""

import gc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from torch import nn

from early_fusion_seg import FrozenEncoder
from early_fusion_seg.errors import UserError
from early_fusion_seg.head import ReverseHRNet

TINY, DINOV2, DINOV3 = "vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"
REGISTERS = "vit_small_patch14_reg4_dinov2"
MODELS = (TINY, DINOV2, REGISTERS, DINOV3)


def weights_file(name: str, folder: Path) -> Path:
    """Write weights with norms, layer scales, position embeddings and tokens of which each matters."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for key, parameter in model.named_parameters():
        if "norm" in key or "gamma" in key:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif "token" in key or "pos_embed" in key:
            nn.init.normal_(parameter)
    path = folder / f"{name}.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def random_tiny() -> FrozenEncoder:
    return FrozenEncoder(TINY, weights="random")


@torch.no_grad()
def normed_tokens(name: str, path: Path, images: torch.Tensor, stride: int) -> list[torch.Tensor]:
    """Return what the blocks 3, 6, 9 and 12 of timm's model for this image size give, after its last norm, as maps."""
    model = timm.create_model(name, num_classes=0).eval()
    model.load_state_dict({k: v for k, v in load_file(path).items() if not k.startswith("head.")})
    model.set_input_size(images.shape[-2:])  # another way than that of the encoder, which keeps the native size
    outputs: list[torch.Tensor] = []
    for index in (2, 5, 8, 11):
        model.blocks[index].register_forward_hook(lambda _, __, out: outputs.append(out))
    model.forward_features(images)
    h, w = images.shape[-2] // stride, images.shape[-1] // stride
    return [model.norm(x)[:, -h * w :].transpose(1, 2).unflatten(2, (h, w)) for x in outputs]


@pytest.mark.parametrize(
    ("name", "size"),
    [(TINY, (224, 224)), *((name, size) for name in MODELS for size in ((61, 90), (112, 112)))],  # 224: its native size
)
def test_maps_are_the_normed_patch_tokens_of_four_blocks(name, size, tmp_path):
    path = weights_file(name, tmp_path)
    encoder = FrozenEncoder(name, weights=str(path))
    stride = 14 if "patch14" in name else 16
    assert encoder.strides == (stride,) * 4
    assert encoder.channels == (192 if name == TINY else 384,) * 4

    images = torch.randn(1, 3, *size)
    padding = [(0, 0), (0, 0), *((0, -n % stride) for n in size)]
    padded = torch.from_numpy(np.pad(images.numpy(), padding, mode="edge"))
    expected = normed_tokens(name, path, padded, stride)
    for ours, theirs in zip(encoder(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [TINY, DINOV2, DINOV3, "deit_tiny_distilled_patch16_224"])
def test_a_random_vision_transformer_has_maps_that_differ_by_pixel_channel_image_and_depth(name):
    maps = FrozenEncoder(name, weights="random")(torch.rand(2, 3, 96, 96))
    for m in maps:
        for axes in ((2, 3), (1,), (0,)):
            assert float((m - m.mean(axes, keepdim=True)).norm() / m.norm()) > 0.1, axes
    for a, b in pairwise(maps):
        assert float((a - b).norm() / b.norm()) > 0.1


def test_layer_scales_of_a_random_vision_transformer_are_one():
    for name in (DINOV2, DINOV3):
        encoder = FrozenEncoder(name, weights="random", freeze=False)
        gammas = [p for n, p in encoder.named_parameters() if "gamma" in n]
        assert len(gammas) == 24
        assert all(bool((g == 1).all()) for g in gammas)


def test_dropout_and_drop_path_are_off_and_nothing_is_kept_for_backward():
    encoder = FrozenEncoder(TINY, weights="random")
    model = encoder.model.model
    model.pos_drop.p = model.blocks[0].mlp.drop1.p = 0.5
    model.blocks[1].drop_path1 = DropPath(0.5)
    before = encoder.state_hash()
    nn.ModuleList([encoder]).train()
    images, saved = torch.rand(4, 3, 64, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        maps = encoder(images)
    assert saved == []
    assert not any(m.requires_grad for m in maps)
    assert all(torch.equal(a, b) for a, b in zip(maps, encoder(images), strict=True))
    assert encoder.state_hash() == before
    model.train()
    assert not torch.equal(maps[-1], encoder(images)[-1])  # with dropout on, the maps differ


@pytest.mark.parametrize("name", [TINY, DINOV3])
def test_images_of_many_sizes_change_and_leave_nothing(name):
    encoder = FrozenEncoder(name, weights="random")
    weights = {key: value.clone() for key, value in encoder.timm_state_dict().items()}

    def tensors() -> int:
        gc.collect()
        return sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects())

    first = encoder(torch.ones(1, 3, 40, 70))[-1]
    before = tensors()
    for n in range(1, 9):
        encoder(torch.ones(1, 3, 16 * n, 5 * n))
    assert tensors() == before
    assert torch.equal(encoder(torch.ones(1, 3, 40, 70))[-1], first)
    assert all(torch.equal(weights[key], value) for key, value in encoder.model.model.state_dict().items())


@pytest.mark.parametrize("name", [DINOV2, DINOV3])
def test_low_precision_maps_are_close_to_float32(name):
    encoder = FrozenEncoder(name, weights="random")
    images = torch.rand(1, 3, 60, 90)
    expected = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(images)
    low = encoder.bfloat16()(images.bfloat16())
    for a, b, exact in zip(mixed, low, expected, strict=True):
        assert b.dtype == torch.bfloat16
        assert float((a - exact).norm()) < 0.02 * float(exact.norm())
        assert float((b.float() - exact).norm()) < 0.02 * float(exact.norm())


@pytest.mark.parametrize("name", [TINY, DINOV2, DINOV3])
def test_all_parameters_of_an_unfrozen_vision_transformer_are_trained(name):
    encoder = FrozenEncoder(name, weights="random", freeze=False)
    sum(m.square().sum() for m in encoder(torch.rand(1, 3, 40, 40))).backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_weights_have_timms_keys_and_can_be_loaded_again(random_tiny):
    weights = random_tiny.timm_state_dict()
    shapes = {k: v.shape for k, v in timm.create_model(TINY).state_dict().items() if not k.startswith("head.")}
    assert {k: v.shape for k, v in weights.items()} == shapes
    copy = FrozenEncoder(TINY, weights="checkpoint")
    copy.load_timm_state_dict(weights)
    assert copy.fingerprint() == random_tiny.fingerprint()
    images = torch.rand(1, 3, 40, 40)
    assert torch.equal(copy(images)[0], random_tiny(images)[0])


# --- the head with maps of one stride


@pytest.mark.parametrize("stride", [14, 16])
@pytest.mark.parametrize(("h", "w"), [(224, 336), (180, 240), (101, 131)])
def test_streams_from_maps_of_one_stride_are_aligned_with_the_pixels(stride, h, w):
    def ramp(s: int) -> torch.Tensor:
        y, x = ((torch.arange(-(-n // s)) + 0.5) * s for n in (h, w))
        return (y[:, None] + x[None, :])[None, None]

    head = ReverseHRNet((1,) * 4, (stride,) * 4, num_classes=1, width=4, hr_modules=[0] * 5, blocks=0)
    head.adapt = nn.ModuleDict({str(s): nn.Identity() for s in (4, 8, 16, 32)})
    head.stem = nn.AvgPool2d(2, ceil_mode=True)
    streams = head([ramp(stride)] * 4, ramp(1), classify=False)
    for s, stream in zip((2, 4, 8, 16, 32), streams, strict=True):
        expected = ramp(s)
        assert stream.shape == expected.shape
        part = (..., slice(32 // s, (h - 32) // s), slice(32 // s, (w - 32) // s))
        assert stream[part].numel() > 0
        torch.testing.assert_close(stream[part], expected[part])


def test_deeper_maps_become_coarser_streams():
    head = ReverseHRNet((1,) * 4, (16,) * 4, num_classes=1, extra_stream=False, width=4, hr_modules=[0] * 4, blocks=0)
    head.adapt = nn.ModuleDict({name: nn.Identity() for name in head.adapt})
    maps = [torch.full((1, 1, 4, 6), float(depth)) for depth in range(4)]
    streams = head(maps, torch.rand(1, 3, 64, 96), classify=False)
    assert head.strides == [4, 8, 16, 32]
    assert head.stem is None
    for depth, (s, stream) in enumerate(zip(head.strides, streams, strict=True)):
        assert stream.shape == (1, 1, 64 // s, 96 // s)
        assert bool((stream == depth).all())


@pytest.mark.parametrize("plan", ["early", "progressive"])
def test_all_parameters_of_the_head_get_a_gradient(plan):
    head = ReverseHRNet((6,) * 4, (14,) * 4, num_classes=3, plan=plan, width=8)
    logits = head([torch.rand(2, 6, 5, 7) for _ in range(4)], torch.rand(2, 3, 65, 97))
    assert logits.shape == (2, 3, 33, 49)
    logits.square().sum().backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sequencer2d_s", r"strides \(7, 14, 14\), expected strictly increasing strides, or a single one"),
        ("vit_relpos_small_patch16_224", r"does not accept images of any size \(Input height .* match"),
    ],
)
def test_what_is_neither_a_pyramid_nor_a_plain_vision_transformer_is_refused(name, message):
    with pytest.raises(UserError, match=f"{name} cannot be the encoder: .*{message}.*; use a .* or a plain ViT"):
        FrozenEncoder(name, weights="random")
