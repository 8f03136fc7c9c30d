import pytest
import torch

from early_fusion_seg.encoder import FrozenEncoder
from early_fusion_seg.errors import UserError
from early_fusion_seg.head import ReverseHRNet
from early_fusion_seg.network import EarlyFusionNet


@pytest.fixture(scope="module")
def network() -> EarlyFusionNet:
    encoder = FrozenEncoder("resnet18", weights="random")
    return EarlyFusionNet(encoder, ReverseHRNet(encoder.channels, encoder.strides, 3, width=8, blocks=1)).eval()


def test_images_are_normalized_with_the_encoders_mean_and_std(network):
    images = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalized = (images.float() / 255 - mean) / std
    with torch.no_grad():
        expected = network.head(network.encoder(normalized), normalized)
        torch.testing.assert_close(network(images), expected)
        torch.testing.assert_close(network(images.float() / 255), expected)
        torch.testing.assert_close(network(images.double() / 255), expected)
    assert expected.shape == (2, 3, 20, 28)


def test_normalized_images_are_refused(network):
    with pytest.raises(UserError, match=r"range from -1\.5 to 0\.9; expected 0\.\.1"):
        network(torch.tensor([-1.5, 0.9, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    with pytest.raises(UserError, match=r"range from 0 to 200; expected 0\.\.1"):
        network(torch.tensor([0.0, 200.0, 3.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    with pytest.raises(UserError, match="nan"):
        network(torch.full((1, 3, 8, 8), torch.nan))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_other_dtypes_are_refused(network, dtype):
    with pytest.raises(UserError, match=f"images are {dtype}"):
        network(torch.zeros(1, 3, 8, 8, dtype=dtype))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 8, 8, 3), (0, 3, 8, 8), (1, 3, 0, 8)])
def test_other_shapes_are_refused(network, shape):
    with pytest.raises(UserError, match=r"expected \(n, 3, h, w\)"):
        network(torch.zeros(shape, dtype=torch.uint8))


def test_a_network_in_low_precision_takes_uint8_images_and_gives_float32_logits(network):
    encoder = FrozenEncoder("resnet18", weights="random")
    low = (
        EarlyFusionNet(encoder, ReverseHRNet(encoder.channels, encoder.strides, 3, width=8, blocks=1)).bfloat16().eval()
    )
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert [x.dtype for x in low.lazy_logits(images).features] == [torch.bfloat16] * 5
    assert low(images).dtype == torch.float32  # sums in low precision would lose small contributions


def test_the_stem_of_the_extra_stream_gets_normalized_images():
    encoder = FrozenEncoder("convnext_atto", weights="random")
    torch.manual_seed(0)
    network = EarlyFusionNet(encoder, ReverseHRNet(encoder.channels, encoder.strides, 3, width=8, blocks=1)).eval()
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalized = (images.float() / 255 - mean) / std
    seen = []
    network.head.stem.register_forward_hook(lambda _, args, out: seen.extend([*args, out]))
    with torch.no_grad():
        network(images)
        conv, norm = network.head.stem[0], network.head.stem[1]
        torch.testing.assert_close(seen[0], normalized)
        torch.testing.assert_close(seen[1], norm(torch.conv2d(normalized, conv.weight, None, 2, 1)).clamp(min=0))
    assert (seen[1] == 0).any()
