"""SlowBfloat16Warning: warn if low precision is slower than float32 on this processor."""

import warnings

from lightning.pytorch import Callback, LightningModule, Trainer

from early_fusion_seg.encoder.onednn_blocks import lacks_bfloat16


class SlowBfloat16Warning(Callback):
    """Warn if the trainer uses bfloat16 on a CPU that has no bfloat16 instructions."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the precision and the processor."""
        low = trainer.precision.startswith(("bf16", "16"))
        if low and trainer.strategy.root_device.type == "cpu" and lacks_bfloat16() and trainer.is_global_zero:
            warnings.warn(
                "this processor has no instructions for bfloat16, so convolutions are many times slower than "
                "in float32; use --trainer.precision 32-true",
                stacklevel=2,
            )
