"""Predictions as files."""

from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from early_fusion_seg.callbacks.files import inside, pixels
from early_fusion_seg.distributed import all_gather_object
from early_fusion_seg.io.atomic import replace_file
from early_fusion_seg.io.images import write_indexed_png
from early_fusion_seg.visualize import Pixels, overlay


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
            self.unreadable += batch.get("error", [])  # none, where a process has no images
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
        self.unreadable = [error for part in all_gather_object(self.unreadable) for error in part]
