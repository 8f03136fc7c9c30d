import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_lazy_logits import SIZES as LAZY_SIZES
from test_lazy_logits import example as lazy_example
from test_lazy_logits import plain
from test_losses import SIZES, example

from early_fusion_seg.inference import upsampled_argmax
from early_fusion_seg.logits import row_upsample


@pytest.fixture(params=[1, 500, 2**22])
def _chunk_sizes(request, monkeypatch):
    monkeypatch.setattr(row_upsample, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunk_sizes")
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_label_maps_of_logits_equal_argmax_of_full_resolution_logits(low, high):
    logits, _, up = example(low, high)
    labels = upsampled_argmax(logits, high)
    assert labels.dtype == torch.uint8
    first, second = up.topk(2, dim=1).values.unbind(1)
    clear = (first - second > 1e-4).detach().numpy()  # rounding may break a tie either way
    assert np.array_equal(labels.numpy()[clear], up.argmax(1).numpy()[clear])
    assert clear.mean() > 0.99


@pytest.mark.usefixtures("_chunk_sizes")
@pytest.mark.parametrize(("low", "high"), LAZY_SIZES)
def test_label_maps_of_lazy_logits_equal_argmax_of_full_resolution_logits(low, high):
    lazy = lazy_example(low)
    up = F.interpolate(plain(lazy), size=high, mode="bilinear")
    first, second = up.topk(2, dim=1).values.unbind(1)
    clear = first - second > 1e-4  # rounding may break a tie either way
    assert torch.equal(upsampled_argmax(lazy, high)[clear].long(), up.argmax(1)[clear])
    assert clear.float().mean() > 0.9


def test_no_images_give_no_label_maps():
    assert upsampled_argmax(torch.zeros(0, 3, 4, 4), (8, 8)).shape == (0, 8, 8)
