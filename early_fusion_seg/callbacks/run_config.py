"""RunConfig: the resolved configuration of a run, as a file and in the loggers."""

from pathlib import Path

import yaml  # type: ignore[import-untyped]  # PyYAML comes without types
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from early_fusion_seg.callbacks.loggers import send_config
from early_fusion_seg.io.atomic import replace_file


class RunConfig(SaveConfigCallback):
    """Save the resolved configuration in the folder of the run, and send it to the loggers."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write or replace the file."""
        text = self.parser.dump(self.config)
        path = Path(trainer.default_root_dir, self.config_filename)
        replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
        config = yaml.safe_load(text)
        for logger in trainer.loggers:
            send_config(logger, config)
