"""PanelLogger: log images with their ground truth, prediction and errors."""

import math
import warnings
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from early_fusion_seg.callbacks.image_files import to_pixels, write_image
from early_fusion_seg.callbacks.loggers import log_images
from early_fusion_seg.distributed import all_gather_object
from early_fusion_seg.visualize import Pixels, panel


class PanelLogger(Callback):
    """Draw the first images of a split as panels of image, ground truth, prediction and errors.

    The images are the same at each evaluation, for any number of processes. The panels are logged to TensorBoard and
    W&B; for a CSV logger they are written as PNG files to `panels/` in its folder: to `last` and, if the validation has
    the highest `val/mIoU` so far, to `best`; of `validate` and `test` to `val` and `test`.

    Args:
        count: Panels per evaluation.
    """

    def __init__(self, count: int = 4) -> None:
        self.count = count
        self.panels: dict[str, Pixels] = {}
        self.best = -math.inf  # highest val/mIoU so far

    def state_dict(self) -> dict[str, Any]:
        """Return the highest score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the highest score so far."""
        self.best = state_dict["best"]

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Draw panels until there are enough."""
        self._collect(trainer, pl_module, outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Draw panels until there are enough."""
        self._collect(trainer, pl_module, outputs, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the panels."""
        self._publish(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the panels."""
        self._publish(trainer, "test")

    def _collect(self, trainer: Trainer, module: Any, outputs: Any, batch: Mapping[str, Any]) -> None:
        if trainer.sanity_checking:
            return
        own = range(trainer.global_rank, self.count, trainer.world_size)  # images of the split that this rank draws
        missing = len(own) - len(self.panels)
        for i, key in enumerate(batch["key"][:missing]):
            self.panels[key] = panel(
                to_pixels(batch["image"][i]),
                batch["mask"][i].cpu().numpy(),
                outputs["prediction"][i].cpu().numpy(),
                module.palette,
                module.class_names,
                ignore_index=module.ignore_index,
            )

    def _publish(self, trainer: Trainer, split: str) -> None:
        per_rank = [iter(panels.items()) for panels in all_gather_object(self.panels)]
        # rank r has the images r, r + world_size, ...: interleaved, they are in the order of the split
        panels = dict(entry for entries in zip_longest(*per_rank) for entry in entries if entry)
        self.panels = {}
        folders = [] if trainer.sanity_checking else self._folders(trainer, split)
        step = trainer.global_step
        for logger in trainer.loggers if panels and trainer.is_global_zero else []:  # the sanity check draws none
            if not isinstance(logger, CSVLogger):
                printable = {key.encode(errors="backslashreplace").decode(): image for key, image in panels.items()}
                log_images(logger, printable, f"panels/{split}", step)
                continue
            for name in folders:
                write_images(panels, Path(logger.log_dir) / "panels" / name)

    def _folders(self, trainer: Trainer, split: str) -> list[str]:
        """Return the names of the folders for the panels of an evaluation."""
        if trainer.state.fn != "fit":
            return [split]
        score = float(trainer.callback_metrics.get("val/mIoU", -math.inf))
        if not score > self.best:
            return ["last"]
        self.best = score
        return ["last", "best"]


def write_images(images: Mapping[str, Pixels], folder: Path) -> None:
    """Write images (H, W, 3) uint8 as `folder/<key>.png`; warn of names that the file system does not take."""
    for key, image in images.items():
        if problem := write_image(folder, key, Image.fromarray(image).save):
            warnings.warn(f"a panel is left out: {problem}", stacklevel=2)
