import numpy as np
import pytest
import torch
import torch.nn.functional as F

from early_fusion_seg.logits import row_upsample


@pytest.mark.parametrize(("parts", "mib"), [(1, 16), (2, 8)])
@pytest.mark.parametrize(("n", "k", "size"), [(1, 19, (1024, 2048)), (8, 171, (512, 640)), (16, 11, (48, 64))])
def test_chunks_cover_all_rows_once_and_have_a_limited_size(n, k, size, parts, mib):
    covered = np.zeros((n, size[0]), dtype=int)
    chunks = list(row_upsample.row_chunks(n, k, size, parts))
    for images, start, stop in chunks:
        covered[images, start:stop] += 1
        assert covered[images, start:stop].size * k * size[1] * 4 <= mib * 2**20
    assert (covered == 1).all()
    assert len(chunks) <= 1.5 * n * k * size[0] * size[1] * 4 / (mib * 2**20) + 1


def test_a_chunk_has_several_images_if_32_rows_of_each_fit():
    assert next(iter(row_upsample.row_chunks(2, 19, (512, 512)))) == (slice(0, 2), 0, 215)
    images, start, stop = next(iter(row_upsample.row_chunks(8, 171, (512, 640))))
    assert (images, start, stop) == (slice(0, 1), 0, 38)


@pytest.mark.parametrize(("low", "high"), [((5, 7), (20, 28)), ((5, 7), (13, 9)), ((6, 4), (6, 4)), ((9, 9), (4, 5))])
def test_upsampled_rows_equal_those_of_the_whole_upsampled_tensor(low, high):
    x = torch.randn(2, *low, 3, generator=torch.Generator().manual_seed(0))  # (n, h, w, K)
    whole = F.interpolate(x.movedim(-1, 1), size=high, mode="bilinear").movedim(1, -1)
    for start in range(high[0]):
        for stop in range(start + 1, high[0] + 1):
            first, last = row_upsample.source_rows(low[0], low[0] / high[0], start, stop)
            rows = row_upsample.upsample_rows(x[:, first:last], low[0], high, start, stop)
            torch.testing.assert_close(rows, whole[:, start:stop], rtol=1e-4, atol=1e-5)
