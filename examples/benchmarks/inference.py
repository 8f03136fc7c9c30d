"""Time of prediction against torchvision, of the encoder against timm, of several heads, and memory over 1,000 images.

    python examples/benchmarks/inference.py      # writes inference.json, then docs/benchmarks.md
    python examples/benchmarks/inference.py --parts heads --output FOLDER

1. A folder with a drawn image of 1024x2048: `Trainer.predict` with the data module and the writer of `early-fusion-seg
   predict` (masks and overlays) against torchvision's fcn_resnet50 in a minimal loop: decode, normalize, forward,
   argmax, write the mask. Both read in the main process; 19 classes; random weights, made beforehand.
2. `FrozenEncoder` against timm's model with the same weights, which is not folded and not in channels_last; and a
   matrix product with as many operations, for comparison.
3. The resident memory after each tenth of 1,000 small images.
4. `MultiHead` with 1, 2 and 4 heads: label maps of an image of 512x1024, and the size of a head's weights.
5. One image whole, in windows, mirrored and at several sizes: the time over that of the whole image, and over the
   pixels that pass the network. Time and memory of images of 2 to 300 megapixels.
"""

import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
from lightning.pytorch import Callback, Trainer
from measure import FASTER, Peak, Row, bars_of, compared, in_fresh_process, in_turns, options, publish, resident, timed
from PIL import Image
from rich.progress import Progress
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation import fcn_resnet50
from torchvision.transforms.functional import normalize

from early_fusion_seg import FolderDataModule, FrozenEncoder, InferenceSettings, MultiHead, ReverseHRNetSeg
from early_fusion_seg.callbacks import PredictionWriter
from early_fusion_seg.data.synthetic.street import scene
from early_fusion_seg.inference.windows import axes

K, SIZE, SMALL = 19, (1024, 2048), (128, 256)
LARGEST_DIFFERENCE = 1e-4
PARTS = ("prediction", "encoder", "memory", "heads", "passes", "large")
LARGEST_SHARE, LARGEST_HEAD = 0.35, 10.0  # of a further head: time over that of one model, and MB
LARGEST_COST = 1.25  # of windows: time over that of the whole image, for as many pixels
LARGEST_EXTRA = 1536  # MiB beside a large image
PASSES = {  # name -> settings
    "whole": InferenceSettings(window=None),
    "windows of 512": InferenceSettings(window=512),
    "windows of 1024": InferenceSettings(window=1024),
    "flip": InferenceSettings(window=None, flip=True),
    "scales 0.75, 1, 1.25": InferenceSettings(window=None, scales=(0.75, 1.0, 1.25)),
}
LARGE = ((1024, 2048), (5000, 10000), (15000, 20000))
TEXT = """\
Prediction of a folder with one image of 1024x2048, 19 classes: `Trainer.predict` as `early-fusion-seg predict` runs it
(default network; masks and overlays) against torchvision's fcn_resnet50 in a plain loop (decode, normalize, forward,
argmax, mask). Forward pass of the encoder with 2 images of 512x512: ResNet-50 with folded batch norms and channels_last
against timm's model with the same weights, and against a matrix product with as many operations. Resident memory is
that of predicting 1,000 images of 128x256 with a ResNet-18. Several heads: label maps of an image of 512x1024 by
`MultiHead` in float32; the share of a further head is the time that it adds, over that of one model (goal: 0.35), and
its file without the encoder has at most 10 MB in float16, as examples/share_a_head.py writes it. Passes: label maps of
an image of 1024x2048; "pixels" is the pixels that pass the network, and "time" the processor time, over those of the
whole image. Large images: EfficientNet-Lite0, one call in a fresh process; memory is the peak of the process beside
image and model, the label map included. Medians of
interleaved runs: milliseconds are wall-clock time, and goals are for processor time, which other work on the machine
does not lengthen."""


def write_images(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Draw street scenes with camera noise."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        image = cv2.resize(scene(i, size[0] // 2, size[1] // 2)[0], size[::-1], interpolation=cv2.INTER_LINEAR)
        noisy = np.clip(image + random.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i:04}.png")
    return sorted(folder.iterdir())


def predict(model: ReverseHRNetSeg, images: Path, output: Path, device: str, *callbacks: Callback) -> None:
    """Predict a folder like the command."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    accelerator = "cpu" if device == "cpu" else "gpu"
    trainer = Trainer(accelerator, devices=1, callbacks=[PredictionWriter(output), *callbacks], **quiet)
    trainer.predict(model, datamodule=FolderDataModule(images, num_workers=0), return_predictions=False)


@torch.inference_mode()
def predict_by_torchvision(model: torch.nn.Module, images: Path, output: Path, device: str) -> None:
    """Predict a folder in a minimal loop."""
    output.mkdir(exist_ok=True)
    for path in sorted(images.iterdir()):
        pixels = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device) / 255
        logits = model(normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))["out"]
        Image.fromarray(logits.argmax(1)[0].to("cpu", torch.uint8).numpy()).save(output / f"{path.name}.png")


def prediction_rows(chosen: Any, folder: Path, progress: Progress) -> list[Row]:
    """Time the prediction of a folder in turns."""
    size = (64, 128) if chosen.quick else SIZE
    (path,) = write_images(folder / "images", 1, size)
    model = ReverseHRNetSeg(num_classes=K, encoder="resnet50", encoder_weights="random")
    works: dict[str, Callable[[], Any]] = {
        "ours": partial(predict, model, folder / "images", folder / "ours", chosen.device)
    }
    if "torchvision" in chosen.peers:
        peer = fcn_resnet50(weights=None, weights_backbone=None, num_classes=K).eval().to(chosen.device)
        works["torchvision fcn_resnet50"] = partial(
            predict_by_torchvision, peer, folder / "images", folder / "peer", chosen.device
        )
    times = in_turns(works, chosen.repeats, chosen.device, progress, "prediction")
    written = np.array(Image.open(folder / "ours" / "masks" / f"{path.stem}.png"))
    if not np.array_equal(written, model.to(chosen.device).predict(path)):
        raise SystemExit("the written mask differs from the one of model.predict")
    return compared(f"predict {size[0]}x{size[1]}", times, {peer: 3.0 for peer in works if peer != "ours"})


@torch.inference_mode()
def encoder_rows(chosen: Any, progress: Progress) -> list[Row]:
    """Time the forward pass of the encoder in turns, in float32 and, where supported, under bf16 autocast."""
    encoder = FrozenEncoder("resnet50", weights="random").to(chosen.device)
    images = torch.randn(2, 3, *((64, 64) if chosen.quick else (512, 512)), device=chosen.device)
    peer = timm.create_model("resnet50", features_only=True, pretrained=False).eval()
    unused = peer.load_state_dict(encoder.timm_state_dict(), strict=False)
    assert not unused.missing_keys
    peer.to(chosen.device)
    with FlopCounterMode(display=False) as flops:
        encoder(images)
    side = 256 if chosen.quick else 2048
    left = torch.randn(max(1, flops.get_total_flops() // (2 * side**2)), side, device=chosen.device)
    right = torch.randn(side, side, device=chosen.device)
    works = {"ours": lambda: encoder(images), "timm": lambda: peer(images), "matrix product": lambda: left @ right}
    rows = []
    for bf16 in chosen.bf16:
        with torch.autocast(torch.device(chosen.device).type, torch.bfloat16, enabled=bf16):
            times = in_turns(works, chosen.repeats, chosen.device, progress, "encoder")
            apart = difference(encoder(images), peer(images))
        if not bf16 and apart > LARGEST_DIFFERENCE:
            raise SystemExit(f"the maps differ by {apart:.2g} of the largest value")
        what = f"encoder, {'bfloat16' if bf16 else 'float32'}"
        rows += compared(what, times, {"timm": None if bf16 else 2.0, "matrix product": None})
        rows[-2] |= {"difference": apart}
        rows[-1] |= {"difference": None}
    return rows


def difference(maps: list[Tensor], others: list[Tensor]) -> float:
    """Return the largest difference relative to the largest value of each map."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(maps, others, strict=True))


class Memory(Callback):
    """Record the resident memory after each tenth of the images."""

    def __init__(self, images: int) -> None:
        self.every = images // 10
        self.rows: list[Row] = []

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, i: int, *_: int) -> None:
        if (i + 1) % self.every == 0:
            self.rows.append({"images": i + 1, "resident memory (MiB)": resident()})


def memory_rows(chosen: Any, folder: Path) -> list[Row]:
    """Record the memory while many small images are predicted."""
    count = 10 if chosen.quick else 1000
    write_images(folder / "many", count, (32, 64) if chosen.quick else SMALL)
    memory = Memory(count)
    model = ReverseHRNetSeg(num_classes=K, encoder="resnet18", encoder_weights="random")
    predict(model, folder / "many", folder / "many_out", chosen.device, memory)
    return memory.rows


def heads_rows(chosen: Any, progress: Progress) -> list[Row]:
    """Time the label maps of 1, 2 and 4 heads in turns, in processor time."""
    rows = []
    size = (64, 128) if chosen.quick else (512, 1024)
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for encoder in ("resnet50", "tf_efficientnet_lite0"):
        models = [ReverseHRNetSeg(K, encoder=encoder, encoder_weights="random") for _ in range(4)]
        predictors = {n: MultiHead(models[:n]).to(chosen.device).predictor() for n in (1, 2, 4)}
        works = {str(n): partial(predictor.predictions, image) for n, predictor in predictors.items()}
        times = in_turns(works, chosen.repeats, chosen.device, progress, f"heads on {encoder}")
        sizes = {dtype: megabytes(models[0].network.head.to(dtype)) for dtype in (torch.float32, torch.float16)}
        for n in predictors:
            share = (times[str(n)][1] / times["1"][1] - 1) / (n - 1) if n > 1 else None
            row = {
                "what": f"{encoder}, heads: {n}",
                "time (ms)": 1000 * times[str(n)][0],
                "share of a further head": share,
            }
            row |= {
                "goal": LARGEST_SHARE if n == 2 and encoder == "resnet50" else None,
                "head (MB)": sizes[torch.float32],
            }
            row |= {"in float16 (MB)": sizes[torch.float16]}
            reached = (share or 0) <= LARGEST_SHARE and row["in float16 (MB)"] <= LARGEST_HEAD
            rows.append(row | {"met": None if row["goal"] is None else reached})
    return rows


def passes_rows(chosen: Any, progress: Progress) -> list[Row]:
    """Time an image whole, in windows and in several passes, in turns."""
    h, w = (96, 160) if chosen.quick else SIZE
    image = torch.randint(0, 256, (1, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = ReverseHRNetSeg(K, encoder="resnet50", encoder_weights="random").to(chosen.device)
    works: dict[str, Callable[[], Any]] = {}
    for name, settings in PASSES.items():
        model.inference = settings
        works[name] = partial(model.predictor().labels, image)
    times = in_turns(works, chosen.repeats, chosen.device, progress, "passes")
    rows = []
    for name, settings in PASSES.items():
        time, pixels = times[name][1] / times["whole"][1], pixels_passed(settings, h, w) / (h * w)
        goal = LARGEST_COST if "windows" in name else None
        row = {"what": name, "time": time, "pixels": pixels, "time / pixels": time / pixels, "goal": goal}
        rows.append(row | {"met": None if goal is None else time / pixels <= goal})
    return rows


def pixels_passed(settings: InferenceSettings, h: int, w: int) -> float:
    """Return the number of pixels that pass the network."""
    window = settings.windows((h, w)) or (h, w)
    sides = [axes(length, side, settings.overlap, 1.0, 32) for length, side in zip((h, w), window, strict=True)]
    rows, cols = (sum(axis.stop - axis.start for axis in windows) for windows in sides)
    return rows * cols * sum(factor**2 for factor, _ in settings.passes)


def segment_large(size: tuple[int, int], encoder: str) -> tuple[float, float]:
    """Return the seconds for an image, and the peak memory in MiB beside image and model."""
    predictor = ReverseHRNetSeg(K, encoder=encoder, encoder_weights="random").predictor()
    predictor.labels(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    peak = Peak("cpu")
    _, (seconds, _) = timed(partial(predictor.labels, image), "cpu")
    return seconds, peak.extra()


def large_rows(chosen: Any, progress: Progress) -> list[Row]:
    """Segment images of growing size, each in a fresh process, on the CPU."""
    sizes, encoder = (((64, 96), (96, 160)), "resnet18") if chosen.quick else (LARGE, "tf_efficientnet_lite0")
    rows = []
    for size in progress.track(sizes, description="large images"):
        seconds, extra = in_fresh_process(segment_large, size, encoder)
        megapixels = size[0] * size[1] / 1e6
        row = {"what": f"{size[1]}x{size[0]}", "megapixels": megapixels, "s / megapixel": seconds / megapixels}
        rows.append(row | {"memory (MiB)": extra, "goal": LARGEST_EXTRA, "met": extra <= LARGEST_EXTRA})
    return rows


def megabytes(head: torch.nn.Module) -> float:
    """Return the size of a file with the weights of a head."""
    with io.BytesIO() as file:
        torch.save(head.state_dict(), file)
        return file.tell() / 1e6


def main() -> None:
    parts = {"nargs": "*", "choices": PARTS, "default": list(PARTS), "help": "default: all; fewer need --output"}
    chosen = options(__doc__, ["torchvision", "timm"], parts=parts)
    if set(chosen.parts) != set(PARTS) and chosen.output is None and not chosen.quick:
        raise SystemExit("some parts alone would replace the tables of all; give --output FOLDER")
    warnings.filterwarnings("ignore")  # advice on workers and loggers would break up the progress bar
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as name, Progress(transient=True) as progress:
        works: dict[str, tuple[str, Callable[[], list[Row]]]] = {
            "memory": ("Memory over many images", lambda: memory_rows(chosen, Path(name))),  # in a process that is new
            "prediction": ("Prediction", lambda: prediction_rows(chosen, Path(name), progress)),
            "encoder": ("Encoder", lambda: encoder_rows(chosen, progress) if "timm" in chosen.peers else []),
            "heads": ("Several heads", lambda: heads_rows(chosen, progress)),
            "passes": ("Passes", lambda: passes_rows(chosen, progress)),
            "large": ("Large images", lambda: large_rows(chosen, progress)),
        }
        tables = {title: work() for part, (title, work) in works.items() if part in chosen.parts}
    bars = bars_of([row for rows in tables.values() for row in rows if "cpu ratio" in row])
    publish("inference", "Predicting", TEXT, tables, bars, FASTER, chosen)


if __name__ == "__main__":
    main()
