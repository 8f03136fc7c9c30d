"""ReverseHRNetSeg, the LightningModule: steps, optimizer, checkpoint contents.

Shapes: n images of h x w pixels, K classes. A batch is a dict: `image` (n, 3, h, w) uint8 (or floats in 0..1), `mask`
(n, h, w) uint8 train ids or `ignore_index`, `key` the names of the images.
"""

import inspect
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypedDict, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import Metric

from early_fusion_seg.data import SegmentationDataModule
from early_fusion_seg.distributed import average_batch_norm_stats, check_equal_across_ranks, ddp_ignored_names
from early_fusion_seg.encoder import DEFAULT_ENCODER, FrozenEncoder
from early_fusion_seg.encoder.encoder_checkpoint import read_checkpoint, restore_encoder, store_encoder
from early_fusion_seg.errors import UserError
from early_fusion_seg.head import Plan, ReverseHRNet
from early_fusion_seg.inference import (
    CalibrationMetrics,
    Images,
    InferenceSettings,
    InputSize,
    Predictor,
    eval_copy,
    for_each_image,
    score_pixels,
)
from early_fusion_seg.io.plain_types import to_plain, without_numpy
from early_fusion_seg.labels.defaults import names_of_classes, voc_palette
from early_fusion_seg.labels.evaluator_rules import AbsentClassRule, VoidPredictionRule
from early_fusion_seg.logits.chunked_loss import at_least_one
from early_fusion_seg.losses import SegmentationLoss, check_batch
from early_fusion_seg.metrics import MeanLoss, SegmentationMetrics
from early_fusion_seg.network import EarlyFusionNet, lazy_logits_of_heads
from early_fusion_seg.optim import OptimizerName, Schedule, make_optimizer, make_schedule, parameter_groups
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
        encoder: Name of a timm model, such as `resnet50.a1_in1k` or `vit_small_patch14_dinov2.lvd142m`.
        encoder_weights: `"hub"` (timm's pretrained weights, downloaded once), `"bundled"` (pretrained weights that an
            installed package carries: `tf_efficientnet_lite0`, `_lite1`, `_lite2`), `"random"`, or a `.safetensors` or
            `.pth` file with timm's parameter names. Checkpoints hold weights unless they are the hub's or bundled.
        freeze_encoder: Keep the encoder frozen; false fine-tunes it, which needs several times the memory.
        save_encoder: Store the encoder's weights in checkpoints also if they are the hub's or bundled, of which
            checkpoints hold only name and hash by default.
        plan: Order in which the head's stages use its streams (one stream per resolution): `"early"` starts with all
            and drops the coarsest after each stage; `"progressive"` starts with the coarsest and adds a finer one.
        width: Channels of the stride-4 stream; the stream of stride s has width * s / 4, but at most 256 (or `width`,
            if that is more). A list has one number per stream, finest first.
        blocks: Residual blocks on each stream of an HR module (see `hr_modules`): one number for all streams, or a list
            with one number per stream, finest first. Default: 0 on the extra stream, 1 on all others.
        hr_modules: Number of HR modules in each stage; 0 skips a stage. An HR module is residual blocks on each stream,
            then one exchange unit between all streams of the stage. Default: `[1,0,0,0,0]` for the early plan, 1 in
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
        encoder_lr: Peak learning rate of the encoder, if it is trained.
        weight_decay: Weight decay of convolution weights; norms and biases have none.
        schedule: Learning rate schedule down to 0 at the last step: `"poly"` (power 0.9) or `"cosine"`.
        warmup_steps: Optimizer steps of linear learning rate warmup, at most a tenth of the run.

    Attributes:
        inference: Input size, flip, scales and windows of evaluation and prediction; replace it to change them.
        trained_at: Input size of training, which `inference` has by default.
        temperature: Divides the logits before the softmax.
        ensemble: Further models with the same encoder and classes. Evaluation and prediction average their class
            probabilities with those of this model; see `MultiHead.ensemble`.
        predict_probabilities: Whether `predict_step`, and so `trainer.predict`, also returns class probabilities.

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
        width: int | list[int] = 64,
        blocks: int | list[int] | None = None,
        hr_modules: list[int] | None = None,
        extra_stream: bool = True,
        activation_checkpointing: bool = False,
        compile: bool = False,
        loss: dict[str, float] | None = None,
        class_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        optimizer: OptimizerName = "adamw",
        lr: float = 4e-3,
        encoder_lr: float = 1e-4,
        weight_decay: float = 1e-2,
        schedule: Schedule = "poly",
        warmup_steps: int = 100,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._make_hparams_plain()
        class_names, palette = to_plain(class_names, "class_names"), to_plain(palette, "palette")
        blocks, hr_modules = to_plain(blocks, "blocks"), to_plain(hr_modules, "hr_modules")
        width = to_plain(width, "width")
        loss, class_weights = to_plain(loss, "loss"), to_plain(class_weights, "class_weights")
        self.class_names = names_of_classes(num_classes, class_names)
        self.num_classes = len(self.class_names)
        self.palette = palette if palette is not None else voc_palette(self.num_classes)
        self.ignore_index = ignore_index = int(ignore_index)
        for what, values in (("palette", self.palette), ("class_weights", class_weights)):
            if values is not None and len(values) != self.num_classes:
                raise UserError(f"{what} has {len(values)} entries for {self.num_classes} classes")
        frozen = FrozenEncoder(encoder, str(encoder_weights), freeze_encoder, keep_weights=save_encoder)
        shape = (plan, width, blocks, hr_modules, extra_stream, activation_checkpointing)
        head = ReverseHRNet(frozen.channels, frozen.strides, self.num_classes, *shape)
        self.network = EarlyFusionNet(frozen, head)
        self.loss = SegmentationLoss(loss or {"cross_entropy": 1.0}, class_weights, label_smoothing, ignore_index)
        self.metrics = nn.ModuleDict(
            {
                name: SegmentationMetrics(self.num_classes, ignore_index, absent, pred_void)
                for name in ("val", "test", "plain")  # plain: of one pass of one model, where others are added
            }
        )
        self.losses = nn.ModuleDict({s: MeanLoss() for s in ("val", "test")})
        self.calibration = CalibrationMetrics()
        self.inference = InferenceSettings()
        self.trained_at = InputSize()
        self.temperature = 1.0
        self.ensemble = nn.ModuleList()
        self.predict_probabilities = False
        self.step_loss: StepLoss | None = None  # within fit
        self._batch_checked = False

    @classmethod
    def for_data(cls, data: SegmentationDataModule, **options: Any) -> Self:
        """Build a model for the classes of a data module.

        Args:
            data: Gives class names, palette, ignore index and the rules of its evaluator, as on the command line.
            **options: Other arguments of the constructor.

        Example:
            >>> from early_fusion_seg import CamVidDataModule
            >>> data = CamVidDataModule("datasets/camvid", crop_size=352)
            >>> ReverseHRNetSeg.for_data(data, encoder="resnet18", encoder_weights="random").num_classes
            11
        """
        model = cls(
            class_names=data.class_names,
            palette=data.palette,
            ignore_index=data.ignore_index,
            absent=data.absent,
            pred_void=data.pred_void,
            **options,
        )
        model.trained_at = InputSize(data.scale, data.short_side)
        return model

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits at input size. For convenience only: training and evaluation never call it.

        Args:
            images: (n, 3, h, w) RGB, uint8 in 0..255 or floats in 0..1.

        Returns:
            (n, K, h, w).
        """
        return F.interpolate(self.network(images), size=images.shape[-2:], mode="bilinear", align_corners=False)

    def predictor(self) -> Predictor:
        """Return what segments images, in eval mode; the model's own mode stays, so threads can share a model."""
        members = cast(Sequence[ReverseHRNetSeg], self.ensemble)
        return predictor_of_heads([self, *members], self.inference, average=True)

    def plain_predictor(self) -> Predictor:
        """Return what segments images in one pass of this model: without flip, further scales and the ensemble."""
        return predictor_of_heads([self], self.inference.plain)

    @property
    def averages(self) -> bool:
        """Whether class probabilities are averaged: those of several passes or models."""
        return self.inference != self.inference.plain or len(self.ensemble) > 0

    def predict(self, images: Images, probabilities: bool = False) -> np.ndarray | list[np.ndarray]:
        """Segment one image or several, in eval mode, with the settings of `inference`.

        Args:
            images: One image of any size, or a list of them: an array (h, w, 3) or (h, w), a tensor (3, h, w), a PIL
                image or the path of a file; uint8, or floats in 0..1. Images from files are rotated according to their
                EXIF tag. A tensor (n, 3, h, w) is a list of n images.
            probabilities: Return class probabilities instead of label maps.

        Returns:
            A label map (h, w) uint8 of train ids, or probabilities (K, h, w) float16; a list of them for several
            images.

        Raises:
            UserError: An image cannot be read, or has another type or shape.
        """
        predictor = self.predictor()
        segment = predictor.probabilities if probabilities else predictor.labels
        return for_each_image(lambda image: segment(image)[0].cpu().numpy(), images)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Compute the loss of a batch; within `fit`, scaled by `StepLoss` if an optimizer step has several batches."""
        images, mask = batch["image"], batch["mask"]
        if not self._batch_checked:
            check_batch(mask, images, self.num_classes, self.ignore_index)
            self._batch_checked = True
        if len(images) == 1 and max(images.shape[-2:]) <= self.network.head.strides[-1]:
            raise UserError("batch norm needs more than one value per channel: raise crop_size or batch_size")
        loss: Tensor = self.loss(self.network.lazy_logits(images), mask)
        return loss if self.step_loss is None else self.step_loss.add(loss, self.loss.weight(mask), batch["key"])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Rescale the gradients to the loss of the whole step; if the loss is not finite, raise a UserError."""
        assert self.step_loss is not None  # made in setup
        loss = self.step_loss.finish(self.parameters(), self.global_step)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        self.log("train/lr", float(optimizer.param_groups[0]["lr"]))
        average_batch_norm_stats(self.network)

    def validation_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor] | None:
        """Score a batch and return `prediction` (n, h, w) uint8."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor] | None:
        """Score a batch and return `prediction` (n, h, w) uint8."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        """Segment a batch of images, at their size.

        Returns:
            `key`, the names of the n images; `prediction` (n, h, w) uint8; `confidence` (n, h, w) uint8, 255 for a
            probability of 1; with `predict_probabilities`, `probabilities` (n, K, h, w) float16 on the CPU. Images that
            cannot be read have only `key` and `error`, the reasons.
        """
        if "image" not in batch:
            return {"key": batch["key"], "error": batch.get("error", [])}  # a process without images has no error
        (found,) = self.predictor().predictions(batch["image"], True, self.predict_probabilities)
        return {"key": batch["key"]} | found.outputs()

    def _evaluate(self, batch: Batch, split: str) -> dict[str, Tensor] | None:
        """Score a batch at the size of its masks; return None for the empty batch of a process without images.

        Loss and calibration are those of images which pass whole, in one pass of one model.
        """
        metrics, plain_metrics = (cast(SegmentationMetrics, self.metrics[name]) for name in (split, "plain"))
        losses = cast(MeanLoss, self.losses[split])
        if not batch["key"]:
            no_images = torch.empty(0, 1, 1, dtype=torch.uint8, device=self.device)
            for metric in (metrics, plain_metrics):
                metric.update(no_images, no_images)  # or torchmetrics would not sum it
            losses.update(no_images.sum(), no_images.sum())
            self.calibration.update(no_images.sum(), no_images.sum())
            return None
        images, mask = batch["image"], batch["mask"].to(self.device)
        plain = self.plain_predictor()
        size = (mask.shape[-2], mask.shape[-1])
        if plain.settings.windows(size) is None:
            lazy_logits = plain.lazy_logits(images)
            prediction, counts, nll = score_pixels(lazy_logits, mask, self.temperature, self.ignore_index)
            self.calibration.update(counts, nll)
            weight = self.loss.weight(mask)
            same = self.loss.is_nll and self.temperature == 1
            losses.update(nll / at_least_one(weight) if same else self.loss(lazy_logits, mask), weight)
        else:
            prediction = plain.labels(images)
            zero = prediction.new_zeros(()).float()
            losses.update(zero, 0.0 * self.loss.weight(mask))
            self.calibration.update(zero.long(), zero)
        if self.averages:
            plain_metrics.update(prediction, mask)
            prediction = self.predictor().labels(images)
        metrics.update(prediction, mask)
        return {"prediction": prediction}

    def passes_in_windows(self, images: Tensor) -> bool:
        """Return whether images (n, 3, h, w) pass the network in windows; the data modules leave these on the CPU."""
        settings = self.inference.at_size(self.trained_at)
        return not self.trainer.training and settings.windows((images.shape[-2], images.shape[-1])) is not None

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
        for metric in (self.metrics[split], self.metrics["plain"], self.losses[split], self.calibration):
            cast(Metric, metric).reset()

    def _log_scores(self, split: str) -> None:
        scores = cast(SegmentationMetrics, self.metrics[split]).compute()  # the sum over ranks, so equal on all
        miou = scores["miou"].where(scores["miou"].isfinite(), scores["per_class"].nanmean())  # VOC's mIoU can be nan
        values = {f"{split}/mIoU": miou, f"{split}/pixel_accuracy": scores["pixel_accuracy"]}
        values[f"{split}/loss"] = cast(MeanLoss, self.losses[split]).compute()
        values = {name: value.float().to(self.device) for name, value in values.items()}
        self.log_dict(values, prog_bar=True, sync_dist=True, reduce_fx="max")  # the maximum of equal values is exact

    def setup(self, stage: str) -> None:
        """Compile if asked, check settings, data and the encoders of all ranks, and prepare the loss of a step."""
        if stage == "fit" and self.num_classes == 1:
            rank_zero_warn(
                f"{self.class_names[0]} is the only class, so there is nothing to learn: every labeled pixel has it; "
                "give the background a class of its own instead of ignoring it"
            )
        if stage == "fit" and self.ensemble:
            raise UserError("the model has an ensemble, whose models are trained one by one; train a model without it")
        if stage == "fit" and self.hparams["compile"]:
            self.network.encoder.compile()
            self.network.head.compile()
        self.step_loss = StepLoss() if stage == "fit" else None
        self._make_hparams_plain()  # those of a subclass too, before anything is trained
        data = cast(Any, self.trainer).datamodule
        if isinstance(data, SegmentationDataModule):
            if stage != "predict":
                self._check_classes(data)
            if stage != "fit":
                check_input_size(data, self.trained_at, self.inference)
        check_equal_across_ranks(self.network.encoder.fingerprint(), "encoders")
        self._ddp_params_and_buffers_to_ignore = ddp_ignored_names(self)  # read by DistributedDataParallel

    def teardown(self, stage: str) -> None:
        """End the losses of steps: without a trainer, `training_step` returns the loss of its batch."""
        self.step_loss = None

    def _check_classes(self, data: SegmentationDataModule) -> None:
        """Check that the data has the number of classes and the ignore index of the model."""
        found = (data.num_classes, data.ignore_index)
        if found != (self.num_classes, self.ignore_index):
            raise UserError(
                f"{type(data).__name__} has {found[0]} classes and the ignore index {found[1]}, but the model has "
                f"{self.num_classes} classes and {self.ignore_index}; build it with ReverseHRNetSeg.for_data(data)"
            )

    def on_fit_start(self) -> None:
        """Take the input size from the data module; the temperature of a checkpoint is that of other weights."""
        self.temperature = 1.0
        data = cast(Any, self.trainer).datamodule
        if isinstance(data, SegmentationDataModule):
            self.trained_at = InputSize(data.scale, data.short_side)

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Read how many batches the next step has, which `GradientAccumulationScheduler` may change."""
        assert self.step_loss is not None  # made in setup
        self.step_loss.batches = self.trainer.world_size * self.trainer.accumulate_grad_batches

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer and the learning rate schedule, which advances at each optimizer step."""
        options: Any = self.hparams
        fused = not (self.trainer.gradient_clip_val or getattr(self.trainer.precision_plugin, "scaler", None))
        encoder = set(self.network.encoder.parameters())
        others = (p for p in self.parameters() if p not in encoder)
        groups = parameter_groups(others, options.lr, options.weight_decay)
        if not self.network.encoder.frozen:
            groups += parameter_groups(self.network.encoder.parameters(), options.encoder_lr, options.weight_decay)
        optimizer = make_optimizer(options.optimizer, groups, fused)
        schedule = make_schedule(optimizer, self._steps_of_run(), options.warmup_steps, options.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _steps_of_run(self) -> float:
        """Return the number of optimizer steps; Lightning's estimate leaves out `GradientAccumulationScheduler`."""
        trainer: Any = self.trainer
        steps: float = trainer.estimated_stepping_batches  # also sets up the training data
        schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]
        if not schedulers or trainer.max_epochs == -1:
            return steps
        batches = [schedulers[0].get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs)]
        steps = sum(math.ceil(trainer.num_training_batches / n) for n in batches)
        return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store name and fingerprint of the encoder, weights that cannot be loaded from elsewhere, and input size."""
        store_encoder(checkpoint, self.network.encoder, store_weights=self.hparams["save_encoder"])
        checkpoint["trained_at"] = self.trained_at._asdict()
        checkpoint["temperature"] = self.temperature
        checkpoint.update(without_numpy(checkpoint))  # data modules and callbacks may have numbers from numpy

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what `on_save_checkpoint` stores; raise a UserError if the checkpoint has another encoder."""
        restore_encoder(checkpoint, self.network.encoder)
        self.trained_at = InputSize(**checkpoint.get("trained_at", {}))  # older checkpoints have none
        self.temperature = checkpoint.get("temperature", 1.0)

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
        model = cls(**(cls._stored_arguments(checkpoint["hyper_parameters"], path) | overrides))
        model.on_load_checkpoint(checkpoint)
        try:
            model.load_state_dict(checkpoint["state_dict"])
        except RuntimeError as error:
            raise UserError(f"{path} does not fit the model: {error}") from error
        return model

    @classmethod
    def _stored_arguments(cls, hparams: dict[str, Any], path: str | Path) -> dict[str, Any]:
        """Return the hyperparameters that the constructor takes; a subclass may set the others of the base class."""
        taken = inspect.signature(cls).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        stored = {name: value for name, value in hparams.items() if not name.startswith("_")}
        for name in stored:
            if not takes_all and name not in taken and name not in inspect.signature(ReverseHRNetSeg).parameters:
                raise UserError(
                    f"{path} has the model setting {name!r}, which this version of early-fusion-seg does not have; "
                    "install the version that wrote the checkpoint, or a newer one"
                )
        return {name: value for name, value in stored.items() if takes_all or name in taken}

    def _make_hparams_plain(self) -> None:
        """Convert the hyperparameters to plain types, which a checkpoint can hold; raise a UserError for others."""
        for name, value in self.hparams.items():
            self.hparams[name] = to_plain(value, name)


def predictor_of_heads(
    models: Sequence[ReverseHRNetSeg], settings: InferenceSettings, average: bool = False
) -> Predictor:
    """Return what segments images with several models on one pass of their encoder, in eval mode.

    Args:
        models: Models with the same encoder; the input size of training is that of the first.
        settings: Input size, flip, scales and windows. The input size is that of training unless they have another one.
        average: Average the class probabilities of all models.
    """
    first = models[0]
    forward = partial(lazy_logits_of_heads, [eval_copy(model.network) for model in models])
    temperatures = [model.temperature for model in models]
    settings, stride = settings.at_size(first.trained_at), first.network.head.strides[-1]
    return Predictor(forward, settings, stride, temperatures, first.device, average)


def check_input_size(data: SegmentationDataModule, trained: InputSize, settings: InferenceSettings) -> None:
    """Check that a data module asks for no other input size than that of training, unless the settings have one."""
    found = InputSize(data.scale, data.short_side)
    if found not in (InputSize(), trained) and not settings.has_input_size:
        raise UserError(
            f"the data module has {found}, but the model was trained with {trained}, which "
            "evaluation and prediction use too; give another input size with --inference.scale or "
            "--inference.short_side (model.inference)"
        )
