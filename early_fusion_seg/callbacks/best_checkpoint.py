"""BestCheckpoint: save `best.ckpt`, the model with the highest val/mIoU."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from early_fusion_seg.encoder.encoder_checkpoint import read_checkpoint


class BestCheckpoint(ModelCheckpoint):
    """Write `best.ckpt` when a validation has the highest `val/mIoU` so far.

    It has a name of its own in checkpoints, so that a run may also have other ModelCheckpoints. A `best.ckpt` that is
    already in the folder is replaced by a better one only: its score is read from the file, because the checkpoint
    from which training resumes may be older than it, or may have been written in another folder.

    Args:
        folder: Folder of `best.ckpt`.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, "best", monitor="val/mIoU", mode="max", enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing, as the file counts; warn if the run resumes in a folder without one."""
        assert self.dirpath is not None  # set by the constructor
        if not Path(self.dirpath, "best.ckpt").exists() and Path(state_dict["best_model_path"]).exists():
            rank_zero_warn(
                f"the best checkpoint so far stays where it is, {state_dict['best_model_path']}; "
                f"{self.dirpath}/best.ckpt will be the best one from now on"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the score to beat from the file."""
        assert self.dirpath is not None  # set by the constructor
        path = Path(self.dirpath, "best.ckpt")
        score: Tensor | None = None
        if trainer.is_global_zero and path.is_file():
            state: dict[str, Any] = read_checkpoint(path)["callbacks"].get(self.state_key, {})
            score = state.get("best_model_score")
        score = trainer.strategy.broadcast(score)
        if score is not None:
            score = score.to(pl_module.device)
            self.best_model_score = self.kth_value = score
            self.best_model_path = self.kth_best_model_path = str(path)
            self.best_k_models = {str(path): score}
