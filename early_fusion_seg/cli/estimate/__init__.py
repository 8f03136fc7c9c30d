"""`early-fusion-seg estimate`: measure the time and memory that `fit` needs with the same options."""

from early_fusion_seg.cli.estimate.command import main

__all__ = ["main"]
