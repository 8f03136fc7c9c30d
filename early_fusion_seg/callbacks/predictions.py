"""PredictionWriter: write predictions as image files."""

from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from early_fusion_seg.callbacks.image_files import to_pixels, write_image
from early_fusion_seg.distributed import all_gather_object
from early_fusion_seg.io.images import write_indexed_png
from early_fusion_seg.visualize import Pixels, overlay


class PredictionWriter(Callback):
    """Write each prediction as `masks/<key>.png`, indexed with the palette, and `overlays/<key>.png`.

    Files are written after each batch. A key is the path of an image relative to its folder, suffix included, so
    `a.jpg` and `a.png` do not collide.

    Args:
        folder: Output folder.

    Attributes:
        unreadable: Error messages of the images that could not be read, or have names too long for the files; after
            prediction, those of all processes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.unreadable: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Use the folder of rank 0 on all processes: each has chosen the next free folder independently."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Write the masks and overlays of a batch, or record the error of an image that could not be read."""
        if outputs is None:
            self.unreadable += batch.get("error", [])  # the empty batch of a process without images has no error
            return
        module = cast(Any, pl_module)
        for key, image, prediction in zip(batch["key"], batch["image"], outputs["prediction"], strict=True):
            labels: Pixels = prediction.cpu().numpy()
            blended = Image.fromarray(overlay(to_pixels(image), labels, module.palette))
            write_mask = partial(write_indexed_png, labels=labels, palette=module.palette)
            if problem := write_image(self.folder / "masks", key, write_mask):
                self.unreadable.append(problem)
            else:
                write_image(self.folder / "overlays", key, blended.save)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the error messages of all processes."""
        self.unreadable = [error for part in all_gather_object(self.unreadable) for error in part]
