"""ReverseHRNetSeg, the LightningModule: steps, optimizer and what a checkpoint holds.

Shapes: n images of h x w pixels, K classes. A batch is a dict: `image` (n, 3, h, w) uint8 (or floats in 0..1), `mask`
(n, h, w) train ids with `ignore_index` where no truth is, `key` the names of the images.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Metric

from early_fusion_seg.checkpoint import read_checkpoint, restore_encoder, store_encoder
from early_fusion_seg.distributed import StepLoss, average_batch_norm_stats, check_equal_across_ranks, ddp_ignored_names
from early_fusion_seg.encoder import DEFAULT_ENCODER, FrozenEncoder
from early_fusion_seg.errors import UserError
from early_fusion_seg.folding import warn_of_slow_bfloat16
from early_fusion_seg.head import Plan, ReverseHRNet
from early_fusion_seg.images import Picture, read_image, to_rgb_array
from early_fusion_seg.inference import upsampled_argmax
from early_fusion_seg.labels.defaults import names_of_classes, voc_palette
from early_fusion_seg.losses import SegmentationLoss, Term
from early_fusion_seg.metrics import AbsentClassRule, MeanLoss, SegmentationMetrics, VoidPredictionRule
from early_fusion_seg.network import EarlyFusionNet
from early_fusion_seg.optim import OptimizerName, Schedule, make_optimizer, make_schedule


class Batch(TypedDict):
    """What the data modules give."""

    image: Tensor
    mask: Tensor
    key: list[str]


class ReverseHRNetSeg(LightningModule):
    """Segment images with a frozen timm encoder and a reverse HRNet head.

    Args:
        num_classes: K, at most 255; may be left out where `class_names` is given.
        class_names: K names in the order of the train ids.
        palette: K RGB colors, each three numbers in 0..255; default: the colors of PASCAL VOC.
        ignore_index: Mask value of pixels without truth.
        absent: How a class that is absent counts in the mIoU; see `metrics.AbsentClassRule`.
        pred_void: How a void prediction counts; see `metrics.VoidPredictionRule`. The network makes none.
        encoder: Name of a timm model with feature maps at strictly increasing strides.
        encoder_weights: `"hub"` (timm's pretrained ones), `"random"`, or the path of a file in timm's keys.
        freeze_encoder: False trains the encoder too.
        save_encoder: Store the encoder's weights in checkpoints even where they can be fetched again.
        plan: `"early"` or `"progressive"`; see `ReverseHRNet`.
        width: Channels of the stride-4 stream.
        blocks: Residual blocks on each stream in an HR module, or a list with a number for each stream, finest first.
        hr_modules: HR modules in each stage.
        extra_stream: Use the stream at stride 2.
        activation_checkpointing: Activation checkpointing: the head's activations are computed again in backward, to save memory.
        compile: Let torch.compile translate encoder and head for the training.
        loss: Weight of each term: cross_entropy, ohem, dice. Default: cross-entropy alone.
        class_weights: K factors for cross-entropy and OHEM, such as a data module's `class_weights("median")`.
        label_smoothing: Of cross-entropy, in 0..1.
        optimizer: `"adamw"` or `"sgd"` (with momentum 0.9).
        lr: Highest learning rate.
        weight_decay: Of convolution weights; norms and biases have none.
        schedule: `"poly"` (power 0.9) or `"cosine"`, down to 0 at the last step.
        warmup_steps: Steps in which the learning rate rises from near 0.

    Raises:
        UserError: Values that make no network, or encoder weights that cannot be had.

    Example:
        >>> model = ReverseHRNetSeg(num_classes=11, encoder="resnet18", encoder_weights="random").eval()
        >>> model(torch.zeros(1, 3, 45, 60, dtype=torch.uint8)).shape
        torch.Size([1, 11, 45, 60])
    """

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
        loss: dict[Term, float] | None = None,
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
        """Compute logits at input size; a convenience that training and evaluation never call.

        Args:
            images: (n, 3, h, w) RGB, uint8 in 0..255 or floats in 0..1.

        Returns:
            (n, K, h, w).
        """
        return F.interpolate(self.network(images), size=images.shape[-2:], mode="bilinear", align_corners=False)

    def predict(self, images: Picture | Sequence[Picture]) -> np.ndarray | list[np.ndarray]:
        """Segment one picture, or each of a list.

        Args:
            images: Pictures of any size; a path's is turned as its EXIF tag says.

        Returns:
            The label map (h, w) uint8 of train ids, or a list of them.

        Raises:
            UserError: A picture that cannot be read or is of another form.
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
        """Give the labels (n, H, W) uint8 of images (n, 3, h, w) at another size."""
        return upsampled_argmax(self.network.votes(images), (size[0], size[1]))

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Compute the loss of a batch, or its share where several batches make a step; see `StepLoss`."""
        images, mask = batch["image"], batch["mask"]
        if len(images) == 1 and max(images.shape[-2:]) <= self.network.encoder.strides[-1]:
            raise UserError("one crop so small has one value at the coarsest stride; raise crop_size or batch_size")
        loss = self.step_loss.add(self.loss(self.network.votes(images), mask), self.loss.weight(mask), batch["key"])
        self.log("train/lr", float(self.optimizers().param_groups[0]["lr"]))  # type: ignore[union-attr]  # one optimizer
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradients those of the whole step; a loss that is not finite stops training and names its images."""
        loss = self.step_loss.finish(self.parameters(), self.global_step)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        average_batch_norm_stats(self.network)

    def validation_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor] | None:
        """Score a batch; gives `prediction` (n, h, w) uint8."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor] | None:
        """Score a batch; gives `prediction` (n, h, w) uint8."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor] | None:
        """Give `prediction` (n, h, w) uint8, or None for a batch without images."""
        if "image" not in batch:
            return None
        images: Tensor = batch["image"]
        return {"prediction": self._segment(images, images.shape[-2:])}

    def _evaluate(self, batch: Batch, split: str) -> dict[str, Tensor] | None:
        """Score at the size of the truth; None for the one batch of a process that has no images."""
        metrics, losses = cast(SegmentationMetrics, self.metrics[split]), cast(MeanLoss, self.losses[split])
        if not batch["key"]:
            none = torch.empty(0, 1, 1, dtype=torch.uint8, device=self.device)
            metrics.update(none, none)  # which marks it as ready to be summed
            losses.update(none.sum(), none.sum())
            return None
        votes, mask = self.network.votes(batch["image"]), batch["mask"]
        prediction = upsampled_argmax(votes, (mask.shape[-2], mask.shape[-1]))
        metrics.update(prediction, mask)
        losses.update(self.loss(votes, mask), self.loss.weight(mask))
        return {"prediction": prediction}

    def on_validation_epoch_start(self) -> None:
        """Start the matrix anew."""
        self._reset("val")

    def on_test_epoch_start(self) -> None:
        """Start the matrix anew."""
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
        scores = cast(SegmentationMetrics, self.metrics[split]).compute()  # summed over ranks, so equal on all
        miou = scores["miou"].where(scores["miou"].isfinite(), scores["per_class"].nanmean())  # VOC's can be nan
        values = {f"{split}/mIoU": miou.float(), f"{split}/pixel_accuracy": scores["pixel_accuracy"].float()}
        values[f"{split}/loss"] = cast(MeanLoss, self.losses[split]).compute().float()
        self.log_dict(values, prog_bar=True, sync_dist=True, reduce_fx="max")  # of equal values the maximum is exact

    def setup(self, stage: str) -> None:
        """Compare the encoder over the ranks: one that differs would train a head on two kinds of features."""
        if stage == "fit" and self.network.head.training:  # what is in eval mode then is the frozen encoder alone
            warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode", PossibleUserWarning)
        if stage == "fit" and self.hparams["compile"]:
            self.network.encoder.compile()
            self.network.head.compile()
        if self.trainer.is_global_zero:
            warn_of_slow_bfloat16(self.trainer.precision, self.trainer.strategy.root_device)
        check_equal_across_ranks(self.network.encoder.fingerprint(), "encoders")
        others = self.trainer.world_size * self.trainer.accumulate_grad_batches
        self.step_loss = StepLoss(others > 1, others)
        self._ddp_params_and_buffers_to_ignore = ddp_ignored_names(self)  # where DistributedDataParallel looks for them

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer and its schedule, stepped with each batch."""
        options: Any = self.hparams
        fused = not (self.trainer.gradient_clip_val or getattr(self.trainer.precision_plugin, "scaler", None))
        optimizer = make_optimizer(options.optimizer, self.parameters(), options.lr, options.weight_decay, fused)
        steps = self.trainer.estimated_stepping_batches
        schedule = make_schedule(optimizer, steps, options.warmup_steps, options.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the encoder as name and fingerprint where it can be fetched again, else whole in timm's keys."""
        store_encoder(checkpoint, self.network.encoder, whole=self.hparams["save_encoder"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the encoder's weights where the checkpoint has them; refuse another encoder (UserError)."""
        restore_encoder(checkpoint, self.network.encoder)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's would fetch remote addresses, and unpickle
        cls, checkpoint_path: str | Path, map_location: str | torch.device | None = None, **overrides: Any
    ) -> Self:
        """Make the model that a checkpoint holds.

        Args:
            checkpoint_path: A local file.
            map_location: Where its tensors go; default: the CPU.
            **overrides: Constructor arguments that replace the stored ones, e.g. `encoder_weights=FILE`.

        Returns:
            The model, in training mode.

        Raises:
            UserError: No such file, a remote address, a damaged file, or another encoder or head.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        stored = {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}
        model = cls(**(stored | overrides))
        model.on_load_checkpoint(checkpoint)
        try:
            model.load_state_dict(checkpoint["state_dict"])
        except RuntimeError as error:
            raise UserError(f"{checkpoint_path} does not fit the model: {error}") from error
        return model.to(map_location or "cpu")
