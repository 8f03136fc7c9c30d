"""`early-fusion-seg doctor DATASET`: check the files of a data set, and explain how to fix what is wrong."""

from early_fusion_seg.cli.doctor.command import main

__all__ = ["main"]
