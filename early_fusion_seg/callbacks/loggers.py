"""What is not a number, for loggers: pictures, tables and the configuration, each in the way that a logger has."""

from collections.abc import Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML comes without types
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from early_fusion_seg.report import Results, markdown
from early_fusion_seg.visualize import Pixels


def send_pictures(logger: Logger, pictures: Mapping[str, Pixels], tag: str, step: int) -> None:
    """Log pictures to TensorBoard or W&B; other loggers get none.

    Args:
        logger: Any.
        pictures: (H, W, 3) uint8 by name.
        tag: Where; in TensorBoard each name comes below it.
        step: Optimizer steps done so far.
    """
    if isinstance(logger, TensorBoardLogger):
        for name, picture in pictures.items():
            logger.experiment.add_image(f"{tag}/{name}", picture, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(tag, list(pictures.values()), step, caption=list(pictures))


def send_results(logger: Logger, results: Results, step: int) -> None:
    """Log the IoU of each class as a table to W&B, and the report of all scores as a text to TensorBoard.

    Args:
        logger: Any; others get none.
        results: The content of `results.json`.
        step: Optimizer steps done so far.
    """
    tag = f"results/{results['split']}"
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(tag, markdown(results), step)
    elif isinstance(logger, WandbLogger):
        logger.log_table(tag, ["class", "IoU"], [list(row) for row in results["per_class"].items()], step=step)


def send_config(logger: Logger, config: Mapping[str, Any]) -> None:
    """Log a resolved configuration: to W&B as the run's config, to TensorBoard as a text.

    Args:
        logger: Any; others get none.
        config: Plain types.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("config", f"```yaml\n{yaml.safe_dump(dict(config), sort_keys=False)}```")
    elif isinstance(logger, WandbLogger):
        logger.log_hyperparams(dict(config))
