"""PT2 files: torch.export's own format, which PyTorch runs without this package."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from early_fusion_seg.export.parity import Run
from early_fusion_seg.io.atomic import replace_file

METADATA = "metadata.json"
"""Name of the extra file with the metadata."""


def write_program(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a traced graph with its metadata.

    Args:
        program: Result of `graph.trace`.
        path: The file.
        metadata: Name -> text.
    """
    text = json.dumps(dict(metadata), indent=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found in the group")  # said of weights in channels_last
        replace_file(path, lambda part: torch.export.save(program, part, extra_files={METADATA: text}))


def load_program(path: Path) -> Run:
    """Return what runs a file with PyTorch."""
    module = torch.export.load(path).module()

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            outputs = module(images)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    return run
