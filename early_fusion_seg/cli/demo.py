"""`early-fusion-seg demo`: train and test on synthetic scenes, in a few minutes on two cores; nothing is downloaded.

The encoder is a frozen EfficientNet-Lite0 with the pretrained weights of the extra `lite` or, where they are not
installed, a frozen ResNet-18 with random weights. Only the head is trained.
"""

import argparse
import shlex
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rich
import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from torch import Tensor, nn

from early_fusion_seg.callbacks import ResultsWriter, to_pixels
from early_fusion_seg.callbacks.narrow_progress_bar import NarrowProgressBar
from early_fusion_seg.cli.arguments import demo_parser
from early_fusion_seg.cli.messages import echo
from early_fusion_seg.cli.output import RUNS, output_folder
from early_fusion_seg.cli.quiet_lightning import quiet_lightning
from early_fusion_seg.data.synthetic import SyntheticDataModule
from early_fusion_seg.encoder import FrozenEncoder
from early_fusion_seg.encoder.bundled_weights import find_bundled_weights
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.atomic import replace_file
from early_fusion_seg.io.run_folder import RunFolder
from early_fusion_seg.metrics import class_iou
from early_fusion_seg.segmenter import ReverseHRNetSeg
from early_fusion_seg.visualize import panel

SIZE = (96, 128)
TEST_SCENES = 100
BATCH_SIZE = 8
PANELS = 4
PRETRAINED = "tf_efficientnet_lite0"
INTRODUCTION = (
    "Training a reverse HRNet on {scenes} synthetic street scenes of {width}x{height} pixels, on the feature maps of "
    "the frozen encoder {encoder} ({precision}). Nothing is downloaded."
)


def main(args: list[str]) -> int:
    """Run the demo.

    Args:
        args: Command line arguments after `demo`.

    Returns:
        0.

    Raises:
        UserError: A number is out of range.
    """
    options = demo_parser().parse_args(args)
    if options.epochs < 1 or options.scenes < BATCH_SIZE:
        raise UserError(
            f"--epochs is {options.epochs} and --scenes {options.scenes}; expected at least 1 and at least {BATCH_SIZE}"
        )
    with quiet_lightning(), RunFolder(output_folder(options.output), RUNS) as folder:
        run(options, folder.path)
    return 0


def run(options: argparse.Namespace, folder: Path) -> None:
    """Train, test, and draw panels."""
    start = time.monotonic()
    data = SyntheticDataModule(
        SIZE,
        options.scenes,
        test_scenes=TEST_SCENES,
        seed=options.seed,
        batch_size=BATCH_SIZE,
        eval_batch_size=BATCH_SIZE,
        num_workers=0,  # training uses both cores already
    )
    seed_everything(options.seed)
    model = build_model(data)
    precision = faster_precision()
    encoder = describe_encoder(model.network.encoder)
    introduction = INTRODUCTION.format(
        scenes=options.scenes, height=SIZE[0], width=SIZE[1], encoder=encoder, precision=precision
    )
    rich.get_console().print(introduction, highlight=False)
    checkpoint = folder / "model.ckpt"
    trainer = Trainer(
        max_epochs=options.epochs,
        precision=precision,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=[NarrowProgressBar(), ResultsWriter(folder, str(checkpoint), vars(options))],
    )
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(checkpoint)
    trainer.test(model, datamodule=data, verbose=False)
    write_panels(model, data, folder / "panels")
    echo(_conclusion(model, folder, time.monotonic() - start))


def build_model(data: SyntheticDataModule) -> ReverseHRNetSeg:
    """Make the network of the demo: a frozen encoder, and a head that trains in two minutes on two cores."""
    return ReverseHRNetSeg.for_data(data, **choose_encoder(), lr=6e-3, warmup_steps=20)


def choose_encoder() -> dict[str, Any]:
    """Return the model options: the pretrained encoder if its package is installed, else a random one.

    On random filters the head is deeper than the default, because it has to learn more.
    """
    try:
        find_bundled_weights(PRETRAINED).version()
    except UserError as error:
        echo(f"{error}. A ResNet-18 with random weights is used instead.")
        head = {"width": 32, "hr_modules": [2, 0, 0, 0, 0], "blocks": 1}
        return {"encoder": "resnet18", "encoder_weights": "random"} | head
    return {"encoder": PRETRAINED, "encoder_weights": "bundled"}


def describe_encoder(encoder: FrozenEncoder) -> str:
    """Return the name of the encoder and the source of its weights, with their package and license if bundled."""
    if encoder.package is None:
        return f"{encoder.name} with {encoder.source} weights"
    return f"{encoder.name} with pretrained weights from {encoder.package}, license {encoder.license}"


def write_panels(model: ReverseHRNetSeg, data: SyntheticDataModule, folder: Path) -> None:
    """Draw the first scenes of the test split with their predictions."""
    scenes = data.dataset("test")
    for i in range(min(PANELS, len(scenes))):
        sample = scenes[i]
        image, truth = to_pixels(sample["image"]), sample["mask"].numpy()
        prediction = model.predict(image)
        assert isinstance(prediction, np.ndarray)  # one image gives one label map
        picture = Image.fromarray(panel(image, truth, prediction, data.palette, data.class_names))
        replace_file(folder / f"{sample['key']}.png", picture.save)


def constant_scores(confusion: Tensor) -> tuple[int, float, float]:
    """Score the prediction of the most frequent class at every pixel.

    Args:
        confusion: (K, K + 1) pixel counts, one row per class of the ground truth.

    Returns:
        The class, its mIoU and its pixel accuracy, 0..1.
    """
    counts = confusion.sum(1)
    constant = torch.zeros_like(confusion)
    most_frequent = int(counts.argmax())
    constant[:, most_frequent] = counts
    return most_frequent, float(class_iou(constant).nanmean()), float(counts.max() / counts.sum())


def faster_precision() -> Literal["bf16-mixed", "32-true"]:
    """Return "bf16-mixed" if bfloat16 convolutions are clearly faster than float32 on this machine, else "32-true"."""
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return "bf16-mixed"
    images = torch.rand(4, 32, 64, 64).to(memory_format=torch.channels_last)
    conv = nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # while other processes run, two threads would wait for each other
    slow = _seconds(conv, images)
    fast = _seconds(conv.bfloat16(), images.bfloat16())
    torch.set_num_threads(threads)
    return "bf16-mixed" if fast < 0.7 * slow else "32-true"


@torch.no_grad()
def _seconds(conv: nn.Module, images: Tensor) -> float:
    """Return the seconds of a convolution: the least of thirty runs, so that interruptions do not count."""
    times = []
    for _ in range(30):
        start = time.perf_counter()
        conv(images)
        times.append(time.perf_counter() - start)
    return min(times)


def _conclusion(model: ReverseHRNetSeg, folder: Path, seconds: float) -> str:
    metrics = model.metrics["test"]
    most_frequent, miou, accuracy = constant_scores(metrics.confusion)  # type: ignore[arg-type]  # a Module's attribute
    bundled = f" --model.encoder {PRETRAINED} --model.encoder_weights bundled" if model.network.encoder.package else ""
    checkpoint = shlex.quote(str(folder / "model.ckpt"))
    constant = f"mIoU {100 * miou:.1f} %, pixel accuracy {100 * accuracy:.1f} %"
    return "\n".join(
        [
            f"for comparison, {model.class_names[most_frequent]} at every pixel: {constant}",
            f"{seconds:.0f} s; model.ckpt, results.json, confusion.png and panels/ are in {folder}",
            f"next: early-fusion-seg predict FOLDER_OF_IMAGES --ckpt_path {checkpoint}",
            f"  or: early-fusion-seg fit --config camvid --data.root PATH{bundled}   (pretrained encoder, real images)",
        ]
    )
