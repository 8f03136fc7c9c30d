"""Logits computed a few rows at a time, so that the full-resolution tensor (n, K, H, W) is never stored.

`lazy_logits.py` has the features and classifiers from which rows of logits are computed. `row_upsample.py` has the
bilinear upsampling of a range of rows. `chunked_loss.py` has the autograd functions that sum a loss over chunks.
"""

from early_fusion_seg.logits.lazy_logits import Chunk, LazyLogits, as_lazy_logits

__all__ = ["Chunk", "LazyLogits", "as_lazy_logits"]
