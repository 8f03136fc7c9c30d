"""ONNX files: written by PyTorch's exporter, checked by `onnx.checker`, run by onnxruntime."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from early_fusion_seg.errors import UserError
from early_fusion_seg.export.parity import Run
from early_fusion_seg.io.atomic import replace_file

OPSET = 18
"""The lowest opset that PyTorch's exporter writes without conversion, and the first whose Resize can average."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
DIMENSIONS = {"image": ("n", None, "h", "w"), "labels": ("n", "h", "w"), "probabilities": ("n", None, "h", "w")}
"""Names of the free dimensions."""


def check_packages() -> None:
    """Check that the packages of the extra `onnx` are installed.

    Raises:
        UserError: One is not.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"--format onnx needs {missing[0]}, which is not installed: pip install 'early-fusion-seg[onnx]'"
        )


def write_onnx(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a traced graph with its metadata; it passes `onnx.checker` with `full_check`.

    Args:
        program: Result of `graph.trace`.
        path: The file.
        metadata: Name -> text.
    """
    import onnx

    outputs = ["labels", "probabilities"][: len(program.graph_signature.user_outputs)]
    exported = torch.onnx.export(
        program,
        dynamo=True,  # the exporter of torch.export; the older one handles free sizes badly
        opset_version=OPSET,
        input_names=["image"],
        output_names=outputs,
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    _tidy(model)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    replace_file(path, lambda part: onnx.save(model, part))


def _tidy(model: Any) -> None:
    """Name the free dimensions, and remove shapes inside the graph and notes of the exporter, in place.

    The shapes can be wrong for other sizes than the example's. The notes hold paths of this machine.
    """
    graph = model.graph
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    for entry in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del entry.metadata_props[:]
        entry.doc_string = ""
    for value in (*graph.input, *graph.output):
        for dimension, name in zip(value.type.tensor_type.shape.dim, DIMENSIONS[value.name], strict=True):
            if name is not None:
                dimension.dim_param = name


def load_onnx(path: Path) -> Run:
    """Return what runs a file on the CPU with onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        outputs: list[np.ndarray] = session.run(None, {"image": images.numpy()})
        return [torch.from_numpy(output) for output in outputs]

    return run
