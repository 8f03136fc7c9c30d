"""Panels of the first images of a split."""

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from early_fusion_seg.callbacks.files import inside, pixels
from early_fusion_seg.callbacks.loggers import send_pictures
from early_fusion_seg.distributed import all_gather_object
from early_fusion_seg.io.atomic import replace_file
from early_fusion_seg.visualize import Pixels, panel


class PanelLogger(Callback):
    """Show the first images of a split as image, truth, prediction and errors, always the same ones.

    Of several processes each draws its share of them. Panels go to each TensorBoard, W&B and CSV logger of the trainer;
    beside the CSV file they are PNGs.

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
        if trainer.sanity_checking:
            return
        share = range(trainer.global_rank, self.count, trainer.world_size)  # of the split's first images
        missing = len(share) - len(self.panels)
        for i, key in enumerate(batch["key"][:missing]):
            self.panels[key] = panel(
                pixels(batch["image"][i]),
                batch["mask"][i].cpu().numpy(),
                outputs["prediction"][i].cpu().numpy(),
                module.palette,
                module.class_names,
                ignore_index=module.ignore_index,
            )

    def _publish(self, trainer: Trainer, split: str) -> None:
        shares = [iter(share.items()) for share in all_gather_object(self.panels)]
        panels = dict(entry for turn in zip_longest(*shares) for entry in turn if entry)  # in the order of the split
        self.panels = {}
        step = trainer.global_step
        for logger in trainer.loggers if panels and trainer.is_global_zero else []:  # none in the sanity check
            if isinstance(logger, CSVLogger):
                name = f"step-{step:06d}" if split == "val" and step else split
                write_pictures(panels, Path(logger.log_dir) / "panels" / name)
            else:
                send_pictures(logger, panels, f"panels/{split}", step)


def write_pictures(pictures: Mapping[str, Pixels], folder: Path) -> None:
    """Write pictures (H, W, 3) uint8 as `folder/<key>.png`."""
    for key, picture in pictures.items():
        replace_file(inside(folder, f"{key}.png"), Image.fromarray(picture).save)
