"""Use a data module of this library with your own network, here three convolutions in a plain LightningModule.

python examples/own_network.py [--max_steps N]
"""

import argparse

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from early_fusion_seg import SegmentationMetrics, SyntheticDataModule


class TinyNetwork(LightningModule):
    """Three convolutions. Images of a batch are uint8; masks are 255 where a pixel is ignored."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        first, second = nn.Conv2d(3, 32, 5, padding=2), nn.Conv2d(32, 32, 5, padding=2)
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(32, num_classes, 1))
        self.metrics = SegmentationMetrics(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (n, 3, h, w) to logits (n, K, h, w)."""
        return self.layers(images / 255)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        return F.cross_entropy(self(batch["image"]), batch["mask"].long(), ignore_index=255)

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Add a batch to the confusion matrix."""
        self.metrics.update(self(batch["image"]).argmax(1), batch["mask"])

    def on_validation_epoch_end(self) -> None:
        """Log the mIoU of the whole split."""
        self.log("val/mIoU", self.metrics.compute()["miou"].float())
        self.metrics.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), 3e-3)


def main() -> None:
    """Train and validate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=200)
    seed_everything(0)
    data = SyntheticDataModule(batch_size=8)
    model = TinyNetwork(data.num_classes)
    trainer = Trainer(max_steps=parser.parse_args().max_steps, logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    trainer.validate(model, data)


if __name__ == "__main__":
    main()
