"""Time of exported files on the CPU, by onnxruntime and by PyTorch, against our own path.

    python examples/benchmarks/export.py      # writes export.json, then docs/benchmarks.md

A drawn image of 512x1024, 19 classes, float32, random weights. "Ours" is `Predictor.labels`: the network in eager mode,
with the residual blocks of a ResNet fused in oneDNN, and the labels computed a few rows at a time. The encoder alone is
timed too, to see where the time goes.
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

K, SIZE, SMALL = 19, (512, 1024), (64, 96)
ENCODERS = ("resnet50", "tf_efficientnet_lite0")
TEXT = """\
Label maps of one image of 512x1024, 19 classes, default head, float32, random weights: the model's own predictor in
eager mode against the exported `.onnx` in onnxruntime (CPU, as many threads as PyTorch has) and the exported `.pt2` in
PyTorch. "Share of the encoder" is the time of the encoder in eager mode over that of our label map. Medians of
interleaved runs; the goal is that a file is not slower than our own path (ratio at most 1)."""


def session(path: Path) -> onnxruntime.InferenceSession:
    """Load an ONNX file with the number of threads of PyTorch."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def encoder_rows(chosen: Any, encoder: str, folder: Path, progress: Progress) -> tuple[list[Row], Row]:
    """Export a model and time it; return the comparisons, and where the time of ours goes."""
    model = ReverseHRNetSeg(num_classes=K, encoder=encoder, encoder_weights="random").eval()
    with torch.inference_mode(False):
        program = trace(ImageToLabels(model.network))
        write_onnx(program, folder / "model.onnx", {})
        write_program(program, folder / "model.pt2", {})
    (images,) = sample_images([(1, *(SMALL if chosen.quick else SIZE))])
    loaded = session(folder / "model.onnx")
    normalized = torch.randn(images.shape)
    works = {
        "ours": partial(model.predictor(InferenceSettings(window=None)).labels, images),
        "onnxruntime": partial(loaded.run, None, {"image": images.numpy()}),
        "torch.export": partial(load_program(folder / "model.pt2"), images),
        "encoder": partial(model.network.encoder, normalized),
    }
    times = in_turns(works, chosen.repeats, chosen.device, progress, encoder)
    sizes = {name: (folder / f"model.{name}").stat().st_size / 1e6 for name in ("onnx", "pt2")}
    share = {"encoder": encoder, "share of the encoder": times["encoder"][0] / times["ours"][0]}
    share |= {f"{name} (MB)": size for name, size in sizes.items()}
    # A goal of `compared` is the least ratio peer / ours; here it would be the largest, so it is judged apart.
    rows = compared(f"label map, {encoder}", times, {"onnxruntime": None, "torch.export": None})
    return [row | {"goal": 1.0, "met": row["cpu ratio"] <= 1.0} for row in rows], share


def main(arguments: list[str] | None = None) -> None:
    chosen = options(__doc__ or "", arguments=arguments)
    rows: list[Row] = []
    shares: list[Row] = []
    with Progress() as progress, tempfile.TemporaryDirectory() as folder:
        for encoder in ("resnet18",) if chosen.quick else ENCODERS:
            compared_rows, share = encoder_rows(chosen, encoder, Path(folder), progress)
            rows += compared_rows
            shares.append(share)
    tables = {"Time": rows, "Where the time goes": shares}
    publish("export", "Exported files", TEXT, tables, bars_of(rows), FASTER, chosen)


if __name__ == "__main__":
    main()
