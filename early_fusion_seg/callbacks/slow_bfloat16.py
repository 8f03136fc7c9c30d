"""SlowBfloat16Warning: a warning where low precision is much slower than float32."""

import warnings

from lightning.pytorch import Callback, LightningModule, Trainer

from early_fusion_seg.encoder.onednn_blocks import lacks_bfloat16


class SlowBfloat16Warning(Callback):
    """Warn if the trainer's precision is bfloat16 on a CPU without instructions for it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare precision and processor."""
        low = trainer.precision.startswith(("bf16", "16"))
        if low and trainer.strategy.root_device.type == "cpu" and lacks_bfloat16() and trainer.is_global_zero:
            warnings.warn(
                "this processor has no instructions for bfloat16, in which convolutions take many times as long as in "
                "float32; take --trainer.precision 32-true",
                stacklevel=2,
            )
