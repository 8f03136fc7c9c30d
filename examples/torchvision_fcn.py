"""Train torchvision's FCN with any data module: python examples/torchvision_fcn.py VOCDataModule ROOT [CROP STEPS]."""

import sys

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torchvision.models.segmentation import fcn_resnet50

import early_fusion_seg


class FCN(LightningModule):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = fcn_resnet50(weights=None, weights_backbone=None, num_classes=num_classes)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        logits = self.network(batch["image"] / 255)["out"]  # images are uint8; masks are 255 where ignored
        return F.cross_entropy(logits, batch["mask"].long(), ignore_index=255)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


if len(sys.argv) not in (3, 5):
    sys.exit(__doc__)
name, root, crop, steps = *sys.argv[1:3], *map(int, sys.argv[3:] or (512, 20000))
data = getattr(early_fusion_seg, name)(root, batch_size=2, crop_size=crop)
Trainer(max_steps=steps, logger=False, limit_val_batches=0).fit(FCN(data.num_classes), data)
