import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from early_fusion_seg.errors import UserError
from early_fusion_seg.head import BasicBlock, ExchangeUnit, ReverseHRNet, default_modules, stage_strides

CHANNELS, STRIDES = (6, 8, 12, 16, 20), (2, 4, 8, 16, 32)


def maps(h: int, w: int, n: int = 2, strides=STRIDES, channels=CHANNELS) -> list[torch.Tensor]:
    return [torch.rand(n, c, -(-h // s), -(-w // s)) for c, s in zip(channels, strides, strict=True)]


def small(**options) -> ReverseHRNet:
    torch.manual_seed(0)
    return ReverseHRNet(CHANNELS, STRIDES, num_classes=5, **({"width": 8, "blocks": 1} | options))


def test_streams_of_the_stages_of_both_plans():
    assert stage_strides("early", STRIDES) == [[2, 4, 8, 16, 32], [2, 4, 8, 16], [2, 4, 8], [2, 4], [2]]
    assert stage_strides("progressive", STRIDES) == [[32], [16, 32], [8, 16, 32], [4, 8, 16, 32], [2, 4, 8, 16, 32]]


@pytest.mark.parametrize("plan", ["early", "progressive"])
@pytest.mark.parametrize("extra_stream", [True, False])
@pytest.mark.parametrize("counts", [1, 0])
def test_logits_have_the_finest_stride_and_every_parameter_gets_a_gradient(plan, extra_stream, counts):
    head = small(plan=plan, extra_stream=extra_stream, hr_modules=[counts] * (5 if extra_stream else 4))
    logits = head(maps(64, 96), torch.rand(2, 3, 64, 96))
    finest = 2 if extra_stream else 4
    assert logits.shape == (2, 5, 64 // finest, 96 // finest)
    logits.square().sum().backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


@given(h=st.integers(1, 70), w=st.integers(1, 70))
@settings(max_examples=15, deadline=None)
def test_images_of_any_size(h, w):
    head = small(hr_modules=[1, 0, 1, 0, 0]).eval()
    assert head(maps(h, w, n=1), torch.rand(1, 3, h, w)).shape[-2:] == (-(-h // 2), -(-w // 2))


class Copies(nn.Module):
    """Repeat a single channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, self.channels, 1, 1)


def ramps(h: int, w: int) -> dict[int, torch.Tensor]:
    """Return, for each stride, a map (ceil(h / s), ceil(w / s)) of the sum of the pixel coordinates of cell centers."""
    return {
        s: ((torch.arange(-(-h // s)) + 0.5) * s)[:, None] + ((torch.arange(-(-w // s)) + 0.5) * s)[None, :]
        for s in STRIDES
    }


def inside(stride: int, h: int, w: int) -> tuple:
    """Return the index of the cells between the centers of the coarsest cells, without effects of the border."""
    return ..., slice(32 // stride, (h - 32) // stride), slice(32 // stride, (w - 32) // stride)


@pytest.mark.parametrize(("h", "w"), [(180, 240), (101, 67), (96, 128)])
def test_streams_stay_aligned_with_the_pixels_if_no_stride_divides_the_size(h, w):
    streams = {s: x[None, None] for s, x in ramps(h, w).items()}
    head = small(hr_modules=[0] * 5)
    head.adapt = nn.ModuleDict({str(s): nn.Identity() for s in STRIDES})
    head.classifiers = nn.ModuleDict({str(s): nn.Conv2d(1, 1, 1) for s in STRIDES})
    for classifier in head.classifiers.values():
        nn.init.ones_(classifier.weight), nn.init.zeros_(classifier.bias)
    logits = head(list(streams.values()), torch.rand(1, 3, h, w))
    part = inside(2, h, w)
    assert logits[part].numel() > 0
    torch.testing.assert_close(logits[part], 5 * streams[2][part])


@pytest.mark.parametrize(("h", "w"), [(180, 240), (101, 99), (96, 128)])
def test_the_exchange_unit_keeps_streams_aligned(h, w):
    streams = {s: x[None, None] for s, x in ramps(h, w).items()}
    unit = ExchangeUnit(dict.fromkeys(STRIDES, 1), used_later=set(STRIDES))
    for i, name in enumerate(unit.up, start=1):
        unit.up[name] = Copies(i)
    for i, name in enumerate(unit.down):
        unit.down[name] = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), Copies(4 - i))
    for name in unit.further_down:
        source, target = map(int, name.split("_to_"))
        unit.further_down[name] = nn.AvgPool2d(target // source // 2, ceil_mode=True)
    for s, fused in unit(streams).items():
        part = inside(s, h, w)
        assert fused[part].numel() > 0
        torch.testing.assert_close(fused[part], 5 * streams[s][part])


def upsampled(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Upsample to stride 2 by factors of 2."""
    for _ in range((stride // 2).bit_length() - 1):
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
    return x


@pytest.mark.parametrize("plan", ["early", "progressive"])
def test_logits_equal_a_convolution_on_the_concatenated_last_features(plan):
    head = small(plan=plan, hr_modules=[1] * 5).eval()
    last: dict[int, torch.Tensor] = {}
    for name in head.adapt:
        head.adapt[name].register_forward_hook(lambda _, __, out, s=int(name): last.__setitem__(s, out.clone()))
    for module in head.stages:
        module.register_forward_hook(lambda _, __, out: last.update(out))
    features = maps(64, 64)
    with torch.no_grad():
        logits = head(features, torch.rand(2, 3, 64, 64))
        wide = torch.cat([upsampled(last[s], s) for s in STRIDES], 1)
        kernel = torch.cat([head.classifiers[str(s)].weight for s in STRIDES], 1)
        bias = sum(head.classifiers[str(s)].bias for s in STRIDES)
        torch.testing.assert_close(logits, F.conv2d(wide, kernel, bias), rtol=1e-4, atol=1e-5)


def test_each_module_returns_the_streams_of_its_stage():
    seen = []
    head = small(hr_modules=[2, 0, 1, 0, 1])
    for module in head.stages:
        module.register_forward_hook(lambda _, __, out: seen.append(list(out)))
    head(maps(32, 32), torch.rand(2, 3, 32, 32))
    assert seen == [[2, 4, 8, 16, 32], [2, 4, 8, 16, 32], [2, 4, 8], [2]]


def test_the_exchange_unit_computes_relu_of_the_sum_of_all_streams():
    """Each path is computed alone, with its channels of the shared convolution."""
    torch.manual_seed(0)
    widths = {4: 3, 8: 6, 16: 12}
    unit = ExchangeUnit(widths, used_later=set(widths)).eval()
    for norm in unit.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight), nn.init.normal_(norm.bias), nn.init.normal_(norm.running_mean)
    streams = {s: torch.randn(2, width, 32 // s, 32 // s) for s, width in widths.items()}

    def channels_of(module, x, first, last, **options):
        conv, norm = module
        out = F.conv2d(x, conv.weight[first:last], **options)
        numbers = (p[first:last] for p in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
        return F.batch_norm(out, *numbers)

    def up(source, first, last, times=1):
        x = channels_of(unit.up[str(source)], streams[source], first, last)
        for _ in range(times):
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
        return x

    with torch.no_grad():
        strided = {"stride": 2, "padding": 1}
        conv, norm = unit.further_down["4_to_16"][-1]
        twice = channels_of(unit.down["4"], streams[4], 6, 9, **strided).clamp(min=0)
        twice = norm(F.conv2d(twice, conv.weight, **strided))
        expected = {
            4: streams[4] + up(8, 0, 3) + up(16, 0, 3, times=2),
            8: streams[8] + channels_of(unit.down["4"], streams[4], 0, 6, **strided) + up(16, 3, 9),
            16: streams[16] + twice + channels_of(unit.down["8"], streams[8], 0, 12, **strided),
        }
        fused = unit({s: x.clone() for s, x in streams.items()})
    assert list(unit.further_down) == ["4_to_16"]
    for s in widths:
        torch.testing.assert_close(fused[s], expected[s].clamp(min=0))


def test_a_downward_path_has_a_norm_and_relu_after_each_step_but_the_last():
    torch.manual_seed(0)
    unit = ExchangeUnit({2: 3, 16: 8}, used_later={2, 16}).eval()
    x, coarse = torch.randn(1, 3, 16, 16), torch.randn(1, 8, 2, 2)
    path = unit.further_down["2_to_16"]
    with torch.no_grad():
        downsampled = x
        for conv, norm in (unit.down["2"][:2], path[1][:2], path[2][:2]):
            nn.init.constant_(norm.weight, 9.0)  # values far from 0, some of them negative
            downsampled = norm(F.conv2d(downsampled, conv.weight, stride=2, padding=1))
            downsampled = downsampled.clamp(min=0) if norm.num_features == 3 else downsampled
        torch.testing.assert_close(unit({2: x, 16: coarse})[16], (coarse + downsampled).clamp(min=0))


def test_an_exchange_unit_of_one_stream_applies_relu_and_keeps_its_input():
    stream = torch.randn(1, 3, 4, 4)
    before = stream.clone()
    torch.testing.assert_close(ExchangeUnit({4: 3}, used_later={4})({4: stream})[4], before.clamp(min=0))
    assert torch.equal(stream, before)


def test_a_stream_that_is_not_used_later_gets_nothing_from_finer_ones():
    torch.manual_seed(0)
    unit = ExchangeUnit({4: 4, 8: 8, 16: 16}, used_later={4, 8}).eval()
    streams = {s: torch.randn(1, s, 32 // s, 32 // s) for s in (4, 8, 16)}
    with torch.no_grad():
        before, after = unit(streams), unit(streams | {4: torch.randn(1, 4, 8, 8)})
    assert torch.equal(before[16], streams[16].clamp(min=0))
    assert torch.equal(after[16], before[16])
    assert not torch.equal(after[8], before[8])


@pytest.mark.parametrize(
    ("options", "downward"),
    [
        ({"hr_modules": [2, 0, 0, 0, 0]}, [{4, 8, 16, 32}, set()]),
        ({"hr_modules": [1, 0, 1, 0, 1]}, [{4, 8}, set(), set()]),
        ({"hr_modules": [0, 0, 1, 0, 1], "plan": "progressive"}, [{16, 32}, set()]),
        ({"hr_modules": [1, 0, 0, 0, 0]}, [set()]),
    ],
)
def test_only_streams_of_later_modules_get_downward_connections(options, downward):
    head = small(**options)
    for module, expected in zip(head.stages, downward, strict=True):
        widths = module.exchange_unit.widths
        streams = {s: torch.randn(1, width, 64 // s, 64 // s) for s, width in widths.items()}
        reached = set()
        with torch.no_grad():
            first = module.eval()(streams)
            for source in widths:
                changed = module(streams | {source: torch.randn_like(streams[source])})
                reached |= {s for s in widths if s > source and not torch.equal(first[s], changed[s])}
        assert reached == expected


def test_a_basic_block_adds_its_convolutions_to_its_input():
    torch.manual_seed(0)
    block = BasicBlock(4).eval()
    x = torch.randn(1, 4, 6, 6)
    first, norm = block.first[0], block.first[1]
    with torch.no_grad():
        inner = norm(F.conv2d(x, first.weight, padding=1)).clamp(min=0)
        inner = block.second[1](F.conv2d(inner, block.second[0].weight, padding=1))
        torch.testing.assert_close(block(x.clone()), (x + inner).clamp(min=0))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"width": 8}, [4, 8, 16, 32, 64]),
        ({"width": 8, "extra_stream": False}, [8, 16, 32, 64]),
        ({"width": 64}, [32, 64, 128, 256, 256]),
        ({"width": 260}, [130, 260, 260, 260, 260]),
        ({"width": [3, 5, 7, 6, 4]}, [3, 5, 7, 6, 4]),
    ],
)
def test_widths_double_with_the_stride_up_to_a_limit_or_are_given(options, expected):
    head = small(**options)
    assert [head.classifiers[str(s)].in_channels for s in head.strides] == expected
    assert head(maps(32, 32), torch.rand(2, 3, 32, 32)).shape == (2, 5, 32 // head.strides[0], 32 // head.strides[0])


def test_default_modules_of_both_plans_with_and_without_the_extra_stream():
    assert default_modules("early", STRIDES) == ([1, 0, 0, 0, 0], [0, 1, 1, 1, 1])
    assert default_modules("early", STRIDES[1:]) == ([1, 0, 0, 0], [1, 1, 1, 1])
    assert default_modules("progressive", STRIDES) == ([1] * 5, [0, 1, 1, 1, 1])
    stages = small(blocks=None, hr_modules=None).stages
    assert [[len(branch) for branch in module.branches.values()] for module in stages] == [[0, 1, 1, 1, 1]]


def test_without_an_encoder_map_of_stride_2_a_stem_makes_the_extra_stream():
    head = ReverseHRNet((8, 12), (4, 8), num_classes=3, width=8)
    assert head.strides == [2, 4, 8]
    images = torch.rand(1, 3, 33, 47, requires_grad=True)
    head.eval()(maps(33, 47, 1, (4, 8), (8, 12)), images).sum().backward()
    assert images.grad.any()
    assert small().stem is None


def test_strides_may_be_far_apart_and_maps_finer_than_the_head_are_ignored():
    head = ReverseHRNet((8, 12), (4, 16), num_classes=3, extra_stream=False, width=8)
    assert head(maps(64, 64, 2, (4, 16), (8, 12)), torch.rand(2, 3, 64, 64)).shape == (2, 3, 16, 16)
    head = ReverseHRNet((5, 6, 8), (1, 2, 4), num_classes=3, width=8)
    assert head.strides == [2, 4]
    assert head(maps(32, 32, 2, (1, 2, 4), (5, 6, 8)), torch.rand(2, 3, 32, 32)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 5}, "width=5"),
        ({"width": 0}, "width=0"),
        (
            {"width": [8, 8]},
            r"width=\[8, 8\]; expected one positive number, or one for each stride of \[2, 4, 8, 16, 32\]",
        ),
        ({"width": [8, 8, 8, 8, 0]}, "width="),
        ({"hr_modules": [1, 1]}, "expected 5 numbers"),
        ({"hr_modules": [1, 1, 1, 1, -1]}, "numbers of at least 0"),
        ({"blocks": [1, 1]}, r"blocks=\[1, 1\]; expected 5 numbers"),
        ({"blocks": -1}, "numbers of at least 0"),
        ({"plan": "late"}, 'expected "early" or "progressive"'),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        small(**options)


def test_strides_whose_ratio_is_not_a_power_of_two_are_refused():
    with pytest.raises(UserError, match=r"strides \[2, 6\]"):
        ReverseHRNet((4, 4), (2, 6), num_classes=2)


def test_the_number_of_residual_blocks_in_hr_modules():
    module = small(blocks=3, hr_modules=[1, 0, 0, 0, 0]).stages[0]
    assert [len(branch) for branch in module.branches.values()] == [3] * 5
    stages = small(blocks=[0, 1, 2, 2, 3], hr_modules=[1, 1, 0, 0, 0]).stages
    assert [len(branch) for branch in stages[0].branches.values()] == [0, 1, 2, 2, 3]
    assert [len(branch) for branch in stages[1].branches.values()] == [0, 1, 2, 2]


def test_adapt_is_a_convolution_a_norm_and_relu():
    head = small(hr_modules=[0] * 5, blocks=1).eval()
    features = maps(33, 47)
    for stride, channels, x in zip(STRIDES, CHANNELS, features, strict=True):
        conv, norm = head.adapt[str(stride)][0], head.adapt[str(stride)][1]
        assert conv.weight.shape == (8 * stride // 4, channels, 1, 1)
        with torch.no_grad():
            expected = norm(F.conv2d(x, conv.weight)).clamp(min=0)
            torch.testing.assert_close(head.adapt[str(stride)](x), expected)
        assert (expected == 0).any()


def test_activation_checkpointing_changes_only_the_memory():
    saved, gradients, statistics = [], [], []
    for activation_checkpointing in (False, True):
        head = small(hr_modules=[1, 1, 0, 0, 0], blocks=2, activation_checkpointing=activation_checkpointing)
        torch.manual_seed(1)
        features, images = maps(64, 96), torch.rand(2, 3, 64, 96)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.nbytes) or x, lambda x: x):
            loss = head(features, images).square().mean()
        loss.backward()
        saved.append(sum(sizes))
        gradients.append([p.grad for p in head.parameters()])
        statistics.append(dict(head.named_buffers()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(value, statistics[1][name]) for name, value in statistics[0].items())
    assert saved[1] < 0.5 * saved[0]
