import numpy as np
import pytest
import torch
import torch.nn.functional as F

from early_fusion_seg.resample import resample

SIZES = [(112, 224), (180, 240), (101, 67), (1, 15)]  # the first is a multiple of each stride


def centers(pixels: int, stride: int) -> torch.Tensor:
    """Return the pixel coordinates of the centers of the cells of one axis."""
    return (torch.arange(-(-pixels // stride)) + 0.5) * stride


def coordinates(h: int, w: int, stride: int) -> torch.Tensor:
    """Return a map (1, 2, ceil(h / stride), ceil(w / stride)) of the y and x of its cell centers."""
    return torch.stack(torch.meshgrid(centers(h, stride), centers(w, stride), indexing="ij"))[None]


@pytest.mark.parametrize("source", [14, 16, 8, 7, 32])
@pytest.mark.parametrize("target", [4, 8, 16, 32])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_a_map_of_coordinates_has_the_coordinates_of_the_new_cells(source, target, h, w):
    out = resample(coordinates(h, w, source), source, target, (h, w))
    expected = coordinates(h, w, target)
    assert out.shape == expected.shape
    for axis, pixels in enumerate((h, w)):
        ours, theirs = out[0, axis], expected[0, axis]
        first, last = source / 2, centers(pixels, source)[-1]  # values are constant beyond the outermost centers
        if target < 2 * source:
            torch.testing.assert_close(ours, theirs.clamp(first, last))
        else:
            inside = (theirs - target / 2 >= first - source / 2) & (theirs + target / 2 <= last)
            torch.testing.assert_close(ours[inside], theirs[inside])
            assert bool(((ours >= first) & (ours <= last)).all())


def test_the_coordinates_inside_are_many():
    """At the largest size, the average at stride 32 of a map of stride 14 is exact in all but the border cells."""
    out = resample(coordinates(480, 480, 14), 14, 32, (480, 480))[0, 1, 0]
    torch.testing.assert_close(out[1:-1], centers(480, 32)[1:-1])


@pytest.mark.parametrize(("source", "target", "factor"), [(16, 32, 2), (8, 32, 4)])
def test_a_coarser_stride_has_the_averages_of_whole_cells(source, target, factor):
    x = torch.randn(2, 3, 8, 12)
    expected = x.numpy().reshape(2, 3, 8 // factor, factor, 12 // factor, factor).mean((3, 5))
    out = resample(x, source, target, (8 * source, 12 * source))
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), [(14, 4), (14, 16), (16, 4)])
def test_a_map_is_interpolated_at_the_centers_of_the_new_cells(source, target):
    """Compared with grid_sample, which takes the coordinates of each point."""
    h, w = 101, 130
    x = torch.randn(1, 2, -(-h // source), -(-w // source))
    y_x = coordinates(h, w, target)
    extent = torch.tensor([x.shape[-1], x.shape[-2]]) * source
    points = 2 * y_x.flip(1).permute(0, 2, 3, 1) / extent - 1
    expected = F.grid_sample(x, points, mode="bilinear", padding_mode="border", align_corners=False)
    torch.testing.assert_close(resample(x, source, target, (h, w)), expected, rtol=1e-4, atol=1e-5)


def test_a_map_of_the_same_stride_is_returned_as_it_is():
    x = torch.randn(1, 2, 7, 5)
    assert resample(x, 16, 16, (101, 80)) is x
