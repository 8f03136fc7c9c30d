"""RunConfig: save and log the resolved configuration of a run."""

from pathlib import Path

import yaml  # type: ignore[import-untyped]  # PyYAML has no types
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from early_fusion_seg.callbacks.loggers import log_config
from early_fusion_seg.io.atomic import replace_file


class RunConfig(SaveConfigCallback):
    """Write the resolved configuration to the folder of the run, and log it."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, replacing that of an earlier run, and log the configuration."""
        text = self.parser.dump(self.config)
        path = Path(trainer.default_root_dir, self.config_filename)
        replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
        config = yaml.safe_load(text)
        for logger in trainer.loggers:
            log_config(logger, config)
