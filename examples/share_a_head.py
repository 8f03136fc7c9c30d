"""Make a small checkpoint of a trained head, for predict, validate and test: 16-bit weights, no optimizer.

    python examples/share_a_head.py runs/mine/last.ckpt head.ckpt

The encoder's weights are not in the file if they can be loaded again from timm's hub or a package. A training cannot
resume from the file.
"""

import sys
from pathlib import Path

import torch

from early_fusion_seg.encoder.encoder_checkpoint import read_checkpoint

KEPT = ("format", "hyper_parameters", "encoder", "epoch", "global_step", "pytorch-lightning_version")


def main(source: str, target: str) -> None:
    checkpoint = read_checkpoint(source)
    weights = checkpoint["state_dict"]
    halves = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    torch.save({key: checkpoint[key] for key in KEPT} | {"state_dict": halves}, target)
    print(f"{target}: {Path(target).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
