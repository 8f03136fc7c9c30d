"""Time of exported files on the CPU, in onnxruntime and in PyTorch, against the model itself.

    python examples/benchmarks/export.py      # writes export.json, then docs/benchmarks.md

A drawn image of 512x1024, 19 classes, float32, random weights. The model's `Predictor.labels` runs in eager mode, with
the residual blocks of a ResNet fused in oneDNN, and computes labels a few rows at a time. The encoder alone is timed
too, to see where the time goes.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from measure import FASTER, Row, bars_of, compared, in_turns, options, publish
from rich.progress import Progress

from early_fusion_seg import InferenceSettings, ReverseHRNetSeg
from early_fusion_seg.export.graph import ImageToLabels, trace
from early_fusion_seg.export.onnx import write_onnx
from early_fusion_seg.export.parity import sample_images
from early_fusion_seg.export.program import load_program, write_program
from early_fusion_seg.segmenter import predictor_of_heads

K, SIZE, SMALL = 19, (512, 1024), (64, 96)
ENCODERS = ("resnet50", "tf_efficientnet_lite0")
TEXT = """\
Label maps of one image of 512x1024, 19 classes, default head, float32, random weights: the exported `.onnx` in
onnxruntime (CPU, as many threads as PyTorch) and the exported `.pt2` in PyTorch, "ours", against the predictor of the
model in eager mode. The share of the encoder is its time in eager mode over that of the label map. Medians of
interleaved runs; the goal is that a file is not slower."""


def session(path: Path) -> onnxruntime.InferenceSession:
    """Load an ONNX file with the number of threads of PyTorch."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def encoder_rows(chosen: Any, encoder: str, folder: Path, progress: Progress) -> tuple[list[Row], Row]:
    """Export a model and time it; return the comparisons, and where the time of the eager path goes."""
    model = ReverseHRNetSeg(num_classes=K, encoder=encoder, encoder_weights="random").eval()
    program = trace(ImageToLabels(model.network))
    write_onnx(program, folder / "model.onnx", {})
    write_program(program, folder / "model.pt2", {})
    (images,) = sample_images([(1, *(SMALL if chosen.quick else SIZE))])
    works = {
        "eager": partial(predictor_of_heads([model], InferenceSettings(window=None)).labels, images),
        "onnxruntime": partial(session(folder / "model.onnx").run, None, {"image": images.numpy()}),
        "pt2": partial(load_program(folder / "model.pt2"), images),
        "encoder": partial(model.network.encoder, torch.randn(images.shape)),
    }
    times = in_turns(works, chosen.repeats, chosen.device, progress, encoder)
    rows = [
        row
        for file in ("onnxruntime", "pt2")
        for row in compared(f"{encoder}, {file}", {"ours": times[file], "eager": times["eager"]}, {"eager": 1.0})
    ]
    facts = {"encoder": encoder, "share of the encoder": times["encoder"][0] / times["eager"][0]}
    sizes = {f"{kind} (MB)": (folder / f"model.{kind}").stat().st_size / 1e6 for kind in ("onnx", "pt2")}
    return rows, facts | sizes


def main() -> None:
    chosen = options(__doc__ or "")
    rows: list[Row] = []
    shares: list[Row] = []
    with Progress() as progress, tempfile.TemporaryDirectory() as folder:
        for encoder in ("resnet18",) if chosen.quick else ENCODERS:
            timed, share = encoder_rows(chosen, encoder, Path(folder), progress)
            rows += timed
            shares.append(share)
    tables = {"Time": rows, "Share of the encoder, and size of the files": shares}
    publish("export", "Exported files", TEXT, tables, bars_of(rows), FASTER, chosen)


if __name__ == "__main__":
    main()
