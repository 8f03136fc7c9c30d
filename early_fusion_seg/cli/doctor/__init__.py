"""`early-fusion-seg doctor DATASET`: check the files of a data set and print how to fix them."""

from early_fusion_seg.cli.doctor.command import main

__all__ = ["main"]
