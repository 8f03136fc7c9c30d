import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from early_fusion_seg.encoder.same_padding import SameConv2d, replace_same_convolutions


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (1, 2, 1), (4, 3, 1), (3, 1, 2)])
def test_values_are_those_of_timms_module(kernel, stride, dilation):
    timms = Conv2dSame(2, 3, kernel, stride, dilation=dilation)
    for h, w in [(1, 1), (2, 5), (6, 7), (12, 11)]:
        x = torch.randn(2, 2, h, w)
        expected = timms(x)
        model = nn.Sequential(Conv2dSame(2, 3, kernel, stride, dilation=dilation))
        model[0].load_state_dict(timms.state_dict())
        replace_same_convolutions(model)
        assert type(model[0]) is SameConv2d
        assert torch.equal(model(x), expected)
