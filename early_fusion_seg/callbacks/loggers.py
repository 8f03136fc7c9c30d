"""Log images, score tables and the configuration to TensorBoard and W&B."""

from collections.abc import Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML has no types
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from early_fusion_seg.report import Results, markdown
from early_fusion_seg.visualize import Pixels


def log_images(logger: Logger, images: Mapping[str, Pixels], tag: str, step: int) -> None:
    """Log images to TensorBoard or W&B; do nothing for other loggers.

    Args:
        logger: Any Lightning logger.
        images: Name -> (H, W, 3) uint8.
        tag: Tag of the images; in TensorBoard each image has the tag `tag/name`.
        step: Optimizer steps done so far.
    """
    if isinstance(logger, TensorBoardLogger):
        for name, image in images.items():
            logger.experiment.add_image(f"{tag}/{name}", image, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(tag, list(images.values()), step, caption=list(images))


def log_results(logger: Logger, results: Results, step: int) -> None:
    """Log the IoU of each class to W&B as a table, or all scores to TensorBoard as text; skip other loggers.

    Args:
        logger: Any Lightning logger.
        results: Contents of `results.json`.
        step: Optimizer steps done so far.
    """
    tag = f"results/{results['split']}"
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(tag, markdown(results), step)
    elif isinstance(logger, WandbLogger):
        logger.log_table(tag, ["class", "IoU"], [list(row) for row in results["per_class"].items()], step=step)


def log_config(logger: Logger, config: Mapping[str, Any]) -> None:
    """Log a resolved configuration to W&B as the run's config, or to TensorBoard as text; skip other loggers.

    Args:
        logger: Any Lightning logger.
        config: The configuration, of plain types.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("config", f"```yaml\n{yaml.safe_dump(dict(config), sort_keys=False)}```")
    elif isinstance(logger, WandbLogger):
        logger.log_hyperparams(dict(config))
