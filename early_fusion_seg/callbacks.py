"""The one place where Lightning meets drawing and files: panels, predictions and results.

The callbacks ask of a module what ReverseHRNetSeg has: `class_names`, `palette`, `ignore_index`, `metrics[split]`
and `network.encoder`, and evaluation steps that return `{"prediction": (n, h, w) uint8}`.

Shapes: n images of h x w pixels, (n, 3, h, w); labels (n, h, w); K classes.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import rich
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from early_fusion_seg.errors import UserError
from early_fusion_seg.images import write_indexed_png
from early_fusion_seg.report import EncoderFacts, Results, RunFacts, build_results, score_table, write_json
from early_fusion_seg.visualize import overlay, panel

Split = Literal["val", "test"]
Pixels = NDArray[np.uint8]


class PanelLogger(Callback):
    """Show the first images of a split as image, truth, prediction and errors, always the same ones.

    Panels go to each TensorBoard, W&B and CSV logger of the trainer; beside the CSV file they are PNGs.

    Args:
        count: Images per evaluation.
    """

    def __init__(self, count: int = 4) -> None:
        self.count = count
        self.panels: dict[str, Pixels] = {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Draw the images that are still wanted."""
        self._collect(trainer, pl_module, outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Draw the images that are still wanted."""
        self._collect(trainer, pl_module, outputs, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the panels to the loggers."""
        self._publish(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the panels to the loggers."""
        self._publish(trainer, "test")

    def _collect(self, trainer: Trainer, module: Any, outputs: Any, batch: Mapping[str, Any]) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        missing = self.count - len(self.panels)
        for i, key in enumerate(batch["key"][:missing]):
            self.panels[key] = panel(
                pixels(batch["image"][i]),
                batch["mask"][i].cpu().numpy(),
                outputs["prediction"][i].cpu().numpy(),
                module.palette,
                module.class_names,
                ignore_index=module.ignore_index,
            )

    def _publish(self, trainer: Trainer, split: Split) -> None:
        panels, self.panels = self.panels, {}
        if panels:  # empty on other ranks and in the sanity check
            for logger in trainer.loggers:
                send_panels(logger, panels, split, trainer.global_step)


def send_panels(logger: Logger, panels: Mapping[str, Pixels], split: Split, step: int) -> None:
    """Log pictures in the way that the logger has for them; loggers without one get none.

    Args:
        logger: TensorBoard, W&B, or CSV (PNG files in its folder).
        panels: (H, W, 3) uint8 by key.
        split: Part of the tag, or of the file's path.
        step: Optimiser steps done so far.
    """
    if isinstance(logger, TensorBoardLogger):
        for key, picture in panels.items():
            logger.experiment.add_image(f"panels/{split}/{key}", picture, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(f"panels/{split}", list(panels.values()), step, caption=list(panels))
    elif isinstance(logger, CSVLogger):
        folder = Path(logger.log_dir) / "panels" / (f"step-{step:06d}" if split == "val" and step else split)
        for key, picture in panels.items():
            replace_file(inside(folder, f"{key}.png"), Image.fromarray(picture).save)


class PredictionWriter(Callback):
    """Write each prediction as it comes: `masks/<key>.png`, indexed with the palette, and `overlays/<key>.png`.

    A key is a path relative to the images' folder, with its suffix, so that `a.jpg` and `a.png` do not collide.

    Args:
        folder: Where to write.

    Attributes:
        unreadable: Why files could not be read, of all processes once the prediction has ended.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.unreadable: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on one folder: each process has found the next free one for itself."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Write the masks and overlays of a batch, or take note of what could not be read."""
        if outputs is None:
            self.unreadable += batch["error"]
            return
        module = cast(Any, pl_module)
        for key, image, prediction in zip(batch["key"], batch["image"], outputs["prediction"], strict=True):
            labels: Pixels = prediction.cpu().numpy()
            picture = Image.fromarray(overlay(pixels(image), labels, module.palette))
            mask = inside(self.folder / "masks", f"{key}.png")
            replace_file(mask, partial(write_indexed_png, labels=labels, palette=module.palette))
            replace_file(inside(self.folder / "overlays", f"{key}.png"), picture.save)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect what the other processes could not read."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: list[list[str]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(gathered, self.unreadable)
            self.unreadable = [error for part in gathered for error in part]


class ResultsWriter(Callback):
    """Write `results.json` at the end of `validate` and `test`, and print the table.

    Args:
        folder: Where to write; default: the trainer's log folder.
        checkpoint: The file that the weights came from; default: the trainer's `ckpt_path`.
        config: Resolved configuration, plain types.

    Attributes:
        results: What was written last.

    Raises:
        UserError: The number of images scored is not that of the split, though nothing limited it.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        checkpoint: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.config = config or {}
        self.results: Results | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the scores of the validation split, unless this is a validation within `fit`."""
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the scores of the test split."""
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: Trainer, module: Any, split: Split) -> None:
        metrics = module.metrics[split]
        scores = metrics.compute()
        images = int(trainer.strategy.reduce(metrics.images.clone(), reduce_op="sum"))
        partial = check_images(trainer, split, images)
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        self.results = build_results(scores, module.class_names, self._facts(trainer, module, split, images, partial))
        if trainer.is_global_zero:
            write_json(self.results, folder / "results.json")
            show_results(self.results, folder / "results.json")

    def _facts(self, trainer: Trainer, module: Any, split: Split, images: int, partial: bool) -> RunFacts:
        data = cast(Any, trainer).datamodule
        encoder = module.network.encoder
        checkpoint = self.checkpoint or trainer.ckpt_path
        seed = os.environ.get("PL_GLOBAL_SEED")  # where Lightning's seed_everything leaves it
        return RunFacts(
            data=type(data).__name__,
            split=split,
            images=images,
            partial=partial,
            absent=module.metrics[split].absent,
            pred_void=module.metrics[split].pred_void,
            scale=getattr(data, "scale", None),  # data modules of other projects need not have one
            checkpoint=None if checkpoint is None else str(checkpoint),
            predictions=None,
            encoder=EncoderFacts(
                name=encoder.name,
                weights=encoder.source,
                fingerprint=encoder.fingerprint(),
                licence=encoder.licence,
            ),
            seed=None if seed is None else int(seed),
            precision=str(trainer.precision),
            config=self.config,
        )


@rank_zero_only
def show_results(results: Results, path: Path | str | None) -> None:
    """Print the table, where the results are, and the licence under which the encoder's weights stand."""
    console = rich.get_console()  # the one of Lightning's progress bar, so that they do not overwrite each other
    console.print(score_table(results))
    if encoder := results["encoder"]:
        of_weights = f"weights: {encoder['weights']}, their licence: {encoder['licence'] or 'none stated'}"
        console.print(f"encoder {encoder['name']}, {of_weights}", soft_wrap=True)
    if path is not None:
        console.print(f"written: {path}", soft_wrap=True)


def check_images(trainer: Trainer, split: Split, images: int) -> bool:
    """Compare the number of images scored with the size of the split.

    Returns:
        Whether the trainer limited the batches, so that only a part was scored.

    Raises:
        UserError: They differ and nothing limited it.
    """
    loader: Any = trainer.test_dataloaders if split == "test" else trainer.val_dataloaders
    limit = trainer.limit_test_batches if split == "test" else trainer.limit_val_batches
    expected = len(loader.dataset)
    limited = isinstance(limit, int) or limit < 1.0
    if images != expected and not (limited and images < expected):
        raise UserError(
            f"{images} images were scored, but the {split} split has {expected}; "
            "each must be scored once: use the data modules' own loaders, which share them among processes"
        )
    return images != expected


def pixels(image: Tensor) -> Pixels:
    """Turn an image (3, h, w), uint8 or floats in 0..1, into (h, w, 3) uint8."""
    if image.is_floating_point():
        image = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return cast(Pixels, image.permute(1, 2, 0).cpu().numpy())


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name`.

    Raises:
        UserError: That is not inside the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{name} would be written outside of {folder}; rename the image")
    return path


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under another name first, so that an interruption leaves no half file under its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    write(part)
    part.replace(path)
