"""Logits a few rows at a time: the full-resolution tensor (n, K, H, W) is never made.

`lazy_logits.py` holds the features and classifiers from which rows of logits are computed, `row_upsample.py` the
bilinear upsampling of a range of rows, `chunked_loss.py` the autograd functions that sum a loss over chunks of rows.
"""

from early_fusion_seg.logits.lazy_logits import Chunk, LazyLogits, as_lazy_logits

__all__ = ["Chunk", "LazyLogits", "as_lazy_logits"]
