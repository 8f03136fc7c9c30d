"""`early-fusion-seg estimate`: measure what `fit` would take with the same options, from a few real steps."""

from early_fusion_seg.cli.estimate.command import main

__all__ = ["main"]
