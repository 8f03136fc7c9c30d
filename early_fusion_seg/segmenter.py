"""ReverseHRNetSeg, the LightningModule: steps, optimizer, checkpoint contents.

Shapes: n images of h x w pixels, K classes. A batch is a dict: `image` (n, 3, h, w) uint8 (or floats in 0..1), `mask`
(n, h, w) uint8 train ids or `ignore_index`, `key` the names of the images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Metric

from early_fusion_seg.distributed import average_batch_norm_stats, check_equal_across_ranks, ddp_ignored_names
from early_fusion_seg.encoder import DEFAULT_ENCODER, FrozenEncoder
from early_fusion_seg.encoder.encoder_checkpoint import read_checkpoint, restore_encoder, store_encoder
from early_fusion_seg.errors import UserError
from early_fusion_seg.head import Plan, ReverseHRNet
from early_fusion_seg.inference import upsampled_argmax
from early_fusion_seg.io.images import Picture, read_image, to_rgb_array
from early_fusion_seg.labels.defaults import names_of_classes, voc_palette
from early_fusion_seg.labels.evaluator_rules import AbsentClassRule, VoidPredictionRule
from early_fusion_seg.losses import SegmentationLoss
from early_fusion_seg.metrics import MeanLoss, SegmentationMetrics
from early_fusion_seg.network import EarlyFusionNet
from early_fusion_seg.optim import OptimizerName, Schedule, make_optimizer, make_schedule
from early_fusion_seg.step_loss import StepLoss


class Batch(TypedDict):
    """A batch of a data module; see the head of this file."""

    image: Tensor
    mask: Tensor
    key: list[str]


class ReverseHRNetSeg(LightningModule):
    """Segment images with a frozen timm encoder and a reverse HRNet head.

    Args:
        num_classes: Number of classes K, 1 to 255; not needed if `class_names` is given.
        class_names: Name of each class, in the order of the train ids.
        palette: RGB color of each class, three numbers in 0..255; default: the colors of PASCAL VOC.
        ignore_index: Mask value of pixels without a label.
        absent: How a class that is absent counts in the mIoU; see `labels.evaluator_rules.AbsentClassRule`.
        pred_void: How a void prediction counts; see `labels.evaluator_rules.VoidPredictionRule`. This network predicts
            no void.
        encoder: Name of a timm model with feature maps at strictly increasing strides, such as `resnet50.a1_in1k`.
        encoder_weights: `"hub"` (timm's pretrained weights, downloaded once), `"random"`, or a
            `.safetensors` or `.pth` file with timm's parameter names.
        freeze_encoder: Keep the encoder frozen; false fine-tunes it, which needs several times the memory.
        save_encoder: Store the encoder's weights in checkpoints even if they can be downloaded again; by default,
            checkpoints then hold only their name and hash.
        plan: Order in which the head's stages use its streams (one stream per resolution): `"early"` starts with all
            and drops the coarsest after each stage; `"progressive"` starts with the coarsest and adds a finer one.
        width: Channels of the stride-4 stream; the stream of stride s has width * s / 4. More channels cost time and
            memory.
        blocks: Residual blocks on each stream of an HR module (see `hr_modules`): one number for all streams, or a list
            with one number per stream, finest first. Default: `[0,0,1,1,1]` for the early plan with
            `extra_stream`, else 2.
        hr_modules: Number of HR modules in each stage; 0 skips a stage. An HR module is residual blocks on each stream,
            then one exchange unit between all streams of the stage. Default: `[2,0,0,0,0]` for the early plan, 1 in
            each stage for the progressive plan.
        extra_stream: Use s2, the stream at stride 2, twice HRNet's finest resolution; false saves memory.
        activation_checkpointing: Recompute the head's activations in backward: less memory, more time.
        compile: Compile encoder and head with torch.compile in training.
        loss: Weight of each term, such as `{"cross_entropy": 1.0, "dice": 0.5}`; terms are cross_entropy, ohem, dice.
            Default: cross_entropy alone.
        class_weights: One weight per class for cross-entropy and OHEM, such as those of a data module's
            `class_weights("median")`.
        label_smoothing: Label smoothing of cross-entropy, 0..1.
        optimizer: `"adamw"` or `"sgd"` (momentum 0.9).
        lr: Peak learning rate, reached after `--model.warmup_steps`.
        weight_decay: Weight decay of convolution weights; norms and biases have none.
        schedule: Learning rate schedule down to 0 at the last step: `"poly"` (power 0.9) or `"cosine"`.
        warmup_steps: Optimizer steps of linear learning rate warmup.

    Raises:
        UserError: Settings are invalid or do not fit together, or encoder weights cannot be loaded.

    Example:
        >>> model = ReverseHRNetSeg(num_classes=11, encoder="resnet18", encoder_weights="random").eval()
        >>> model(torch.zeros(1, 3, 45, 60, dtype=torch.uint8)).shape
        torch.Size([1, 11, 45, 60])
    """

    accepts_empty_batches = True  # read by the data modules: a process without images gets a batch without `image`

    def __init__(
        self,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        palette: list[list[int]] | None = None,
        ignore_index: int = 255,
        absent: AbsentClassRule = "nan-skip",
        pred_void: VoidPredictionRule = "fn",
        encoder: str = DEFAULT_ENCODER,
        encoder_weights: str = "hub",
        freeze_encoder: bool = True,
        save_encoder: bool = False,
        plan: Plan = "early",
        width: int = 32,
        blocks: int | list[int] | None = None,
        hr_modules: list[int] | None = None,
        extra_stream: bool = True,
        activation_checkpointing: bool = False,
        compile: bool = False,
        loss: dict[str, float] | None = None,
        class_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        optimizer: OptimizerName = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        schedule: Schedule = "poly",
        warmup_steps: int = 100,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.class_names = names_of_classes(num_classes, class_names)
        self.num_classes = len(self.class_names)
        self.palette = palette if palette is not None else voc_palette(self.num_classes)
        self.ignore_index = ignore_index
        for what, values in (("palette", self.palette), ("class_weights", class_weights)):
            if values is not None and len(values) != self.num_classes:
                raise UserError(f"{what} has {len(values)} entries for {self.num_classes} classes")
        frozen = FrozenEncoder(encoder, str(encoder_weights), freeze_encoder)
        shape = (plan, width, blocks, hr_modules, extra_stream, activation_checkpointing)
        head = ReverseHRNet(frozen.channels, frozen.strides, self.num_classes, *shape)
        self.network = EarlyFusionNet(frozen, head)
        self.loss = SegmentationLoss(loss or {"cross_entropy": 1.0}, class_weights, label_smoothing, ignore_index)
        self.metrics = nn.ModuleDict(
            {s: SegmentationMetrics(self.num_classes, ignore_index, absent, pred_void) for s in ("val", "test")}
        )
        self.losses = nn.ModuleDict({s: MeanLoss() for s in ("val", "test")})
        self.step_loss = StepLoss(shared=False, batches=1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits at input size. For convenience only: training and evaluation never call it.

        Args:
            images: (n, 3, h, w) RGB, uint8 in 0..255 or floats in 0..1.

        Returns:
            (n, K, h, w).
        """
        return F.interpolate(self.network(images), size=images.shape[-2:], mode="bilinear", align_corners=False)

    def predict(self, images: Picture | Sequence[Picture]) -> np.ndarray | list[np.ndarray]:
        """Segment one image or a list of images.

        Args:
            images: Images of any size: arrays, PIL images or paths. Images from paths are rotated according
                to their EXIF tag.

        Returns:
            A label map (h, w) uint8 of train ids, or a list of label maps.

        Raises:
            UserError: An image cannot be read, or has another type or shape.
        """
        if isinstance(images, np.ndarray | Image.Image | Path | str):
            return self._predict_one(images)
        return [self._predict_one(image) for image in images]

    @torch.no_grad()
    def _predict_one(self, image: Picture) -> np.ndarray:
        pixels = read_image(image) if isinstance(image, Path | str) else to_rgb_array(image)  # (h, w, 3)
        batch = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].to(self.device)
        training = self.training
        try:
            return self.eval()._segment(batch, pixels.shape[:2])[0].cpu().numpy()
        finally:
            self.train(training)

    def _segment(self, images: Tensor, size: tuple[int, ...]) -> Tensor:
        """Compute labels (n, H, W) uint8 of images (n, 3, h, w); `size` is (H, W)."""
        return upsampled_argmax(self.network.lazy_logits(images), (size[0], size[1]))

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Compute the loss of a batch, scaled by `StepLoss` if an optimizer step has several batches."""
        images, mask = batch["image"], batch["mask"]
        if len(images) == 1 and max(images.shape[-2:]) <= self.network.encoder.strides[-1]:
            raise UserError("batch norm needs more than one value per channel: raise crop_size or batch_size")
        loss = self.loss(self.network.lazy_logits(images), mask)
        loss = self.step_loss.add(loss, self.loss.weight(mask), batch["key"])
        self.log("train/lr", float(self.optimizers().param_groups[0]["lr"]))  # type: ignore[union-attr]  # one optimizer
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Rescale the gradients to the loss of the whole step; if the loss is not finite, raise a UserError."""
        loss = self.step_loss.finish(self.parameters(), self.global_step)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        average_batch_norm_stats(self.network)

    def validation_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor] | None:
        """Score a batch and return `prediction` (n, h, w) uint8."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor] | None:
        """Score a batch and return `prediction` (n, h, w) uint8."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor] | None:
        """Return `prediction` (n, h, w) uint8, or None for a batch without images."""
        if "image" not in batch:
            return None
        images: Tensor = batch["image"]
        return {"prediction": self._segment(images, images.shape[-2:])}

    def _evaluate(self, batch: Batch, split: str) -> dict[str, Tensor] | None:
        """Score a batch at the size of its masks; return None for the empty batch of a process without images."""
        metrics, losses = cast(SegmentationMetrics, self.metrics[split]), cast(MeanLoss, self.losses[split])
        if not batch["key"]:
            no_images = torch.empty(0, 1, 1, dtype=torch.uint8, device=self.device)
            metrics.update(no_images, no_images)  # or torchmetrics would not sum it
            losses.update(no_images.sum(), no_images.sum())
            return None
        lazy_logits, mask = self.network.lazy_logits(batch["image"]), batch["mask"]
        prediction = upsampled_argmax(lazy_logits, (mask.shape[-2], mask.shape[-1]))
        metrics.update(prediction, mask)
        losses.update(self.loss(lazy_logits, mask), self.loss.weight(mask))
        return {"prediction": prediction}

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics."""
        self._reset("val")

    def on_test_epoch_start(self) -> None:
        """Reset the metrics."""
        self._reset("test")

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the whole split."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the whole split."""
        self._log_scores("test")

    def _reset(self, split: str) -> None:
        for metric in (self.metrics[split], self.losses[split]):
            cast(Metric, metric).reset()

    def _log_scores(self, split: str) -> None:
        scores = cast(SegmentationMetrics, self.metrics[split]).compute()  # the sum over ranks, so equal on all
        miou = scores["miou"].where(scores["miou"].isfinite(), scores["per_class"].nanmean())  # VOC's mIoU can be nan
        values = {f"{split}/mIoU": miou.float(), f"{split}/pixel_accuracy": scores["pixel_accuracy"].float()}
        values[f"{split}/loss"] = cast(MeanLoss, self.losses[split]).compute().float()
        self.log_dict(values, prog_bar=True, sync_dist=True, reduce_fx="max")  # the maximum of equal values is exact

    def setup(self, stage: str) -> None:
        """Compile if asked, check that all ranks have the same encoder, and prepare the loss of a step."""
        if stage == "fit" and self.hparams["compile"]:
            self.network.encoder.compile()
            self.network.head.compile()
        check_equal_across_ranks(self.network.encoder.fingerprint(), "encoders")
        batches = self.trainer.world_size * self.trainer.accumulate_grad_batches
        self.step_loss = StepLoss(batches > 1, batches)
        self._ddp_params_and_buffers_to_ignore = ddp_ignored_names(self)  # read by DistributedDataParallel

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer and the learning rate schedule, which advances at each optimizer step."""
        options: Any = self.hparams
        fused = not (self.trainer.gradient_clip_val or getattr(self.trainer.precision_plugin, "scaler", None))
        optimizer = make_optimizer(options.optimizer, self.parameters(), options.lr, options.weight_decay, fused)
        steps = self.trainer.estimated_stepping_batches
        schedule = make_schedule(optimizer, steps, options.warmup_steps, options.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store name and fingerprint of the encoder, and all its weights if they cannot be loaded from elsewhere."""
        store_encoder(checkpoint, self.network.encoder, store_weights=self.hparams["save_encoder"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the encoder's weights if the checkpoint has them; raise a UserError if it has another encoder."""
        restore_encoder(checkpoint, self.network.encoder)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's version downloads URLs and unpickles code
        cls, checkpoint_path: str | Path, map_location: str | torch.device | None = None, **overrides: Any
    ) -> Self:
        """Load the model of a checkpoint.

        Args:
            checkpoint_path: Path of a local file.
            map_location: Device of the model; default: the CPU.
            **overrides: Constructor arguments that replace the stored ones, such as `encoder_weights=FILE`.

        Returns:
            The model, in training mode.

        Raises:
            UserError: The file does not exist, is a remote address or is damaged, or the encoder or head does not fit.
        """
        return cls.from_checkpoint(read_checkpoint(checkpoint_path), checkpoint_path, **overrides).to(
            map_location or "cpu"
        )

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any], path: str | Path, **overrides: Any) -> Self:
        """Build the model of a checkpoint that is already in memory.

        Args:
            checkpoint: Result of `read_checkpoint`; changed in place.
            path: Path of the checkpoint, for error messages.
            **overrides: Constructor arguments that replace the stored ones.

        Returns:
            The model, in training mode.

        Raises:
            UserError: The encoder or head does not fit.
        """
        stored = {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}
        model = cls(**(stored | overrides))
        model.on_load_checkpoint(checkpoint)
        try:
            model.load_state_dict(checkpoint["state_dict"])
        except RuntimeError as error:
            raise UserError(f"{path} does not fit the model: {error}") from error
        return model
