"""MultiHead: several trained models that share one pass of their encoder.

Only a frozen encoder allows it: heads for other classes or data sets, or from other seeds, take the same feature maps.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from early_fusion_seg.data import SegmentationDataModule
from early_fusion_seg.distributed import check_equal_across_ranks
from early_fusion_seg.encoder import FrozenEncoder
from early_fusion_seg.errors import UserError
from early_fusion_seg.inference import Images, InferenceSettings, Predictor, for_each_image
from early_fusion_seg.segmenter import ReverseHRNetSeg, check_input_size, predictor_of_heads


class MultiHead(LightningModule):
    """Segment images with several models on one pass of their encoder; each gives the same labels as alone.

    Args:
        models: At least one trained model; all have the same encoder, and share that of the first from then on.
        names: Name of each model for messages, such as its checkpoint; default: numbers from 1.

    Attributes:
        models: The models.
        names: Their names.
        inference: Input size, flip, scales and windows; replace it to change them.

    Raises:
        UserError: The encoders differ.

    Example:
        >>> models = [ReverseHRNetSeg(k, encoder="resnet18", encoder_weights="random") for k in (11, 2)]
        >>> image = np.zeros((45, 60, 3), np.uint8)
        >>> [result.shape for result in MultiHead(models).predict(image, probabilities=True)]
        [(11, 45, 60), (2, 45, 60)]
    """

    accepts_empty_batches = True  # read by the data modules: a process without images gets a batch without `image`

    def __init__(self, models: Sequence[ReverseHRNetSeg], names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.names = list(names) if names is not None else [str(i + 1) for i in range(len(models))]
        first = models[0].network.encoder
        for name, model in zip(self.names, models, strict=True):
            other = model.network.encoder
            if other.fingerprint() != first.fingerprint():
                raise UserError(
                    f"{name} has the encoder {_facts(other)}, but {self.names[0]} has {_facts(first)}; heads share a "
                    "pass only if their encoders are equal, so use these models one by one"
                )
            model.network.encoder = first
        self.models = nn.ModuleList(models)
        self.inference = InferenceSettings()

    @classmethod
    def from_checkpoints(cls, paths: Sequence[str | Path], **overrides: Any) -> Self:
        """Load the models of checkpoints.

        Args:
            paths: Paths of local files.
            **overrides: Constructor arguments of each model that replace the stored ones, such as
                `encoder_weights=FILE`.

        Returns:
            The models, in training mode like those of `ReverseHRNetSeg.load_from_checkpoint`.

        Raises:
            UserError: A checkpoint cannot be loaded, or the encoders differ.
        """
        models = [ReverseHRNetSeg.load_from_checkpoint(path, **overrides) for path in paths]
        return cls(models, [str(path) for path in paths])

    def predictor(self) -> Predictor:
        """Return what segments images with each head, in eval mode; the modes of the models stay.

        Raises:
            UserError: The models were trained at different input sizes, and `inference` has none.
        """
        self._check_one_input_size()
        return predictor_of_heads(self._segmenters, self.inference)

    def predict(self, images: Images, probabilities: bool = False) -> list[np.ndarray] | list[list[np.ndarray]]:
        """Segment one image or several with each head, with the settings of `inference`.

        Args:
            images: As in `ReverseHRNetSeg.predict`.
            probabilities: Return class probabilities instead of label maps.

        Returns:
            For each head, a label map (h, w) uint8 of train ids, or probabilities (K, h, w) float16; a list of such
            lists for several images.
        """
        predictor = self.predictor()

        def one(image: Tensor) -> list[np.ndarray]:
            found = predictor.predictions(image, probabilities=probabilities)
            chosen = [one.labels if one.probabilities is None else one.probabilities for one in found]
            return [result[0].cpu().numpy() for result in chosen]

        results = for_each_image(one, images)
        return results  # noqa: RET504  # in a return statement, mypy infers a wider type

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> list[dict[str, Any]] | None:
        """Return what `ReverseHRNetSeg.predict_step` returns for each head, or None for a batch without images."""
        if "image" not in batch:
            return None
        probabilities = any(model.predict_probabilities for model in self._segmenters)
        found = self.predictor().predictions(batch["image"], True, probabilities)
        return [{"key": batch["key"]} | one.outputs() for one in found]

    def ensemble(self) -> ReverseHRNetSeg:
        """Return the first model, with the others as its ensemble: it averages the class probabilities of all.

        Raises:
            UserError: The models have different classes or input sizes.
        """
        first, *others = self._segmenters
        for name, model in zip(self.names[1:], others, strict=True):
            if model.class_names != first.class_names:
                raise UserError(
                    f"{name} has the classes {', '.join(model.class_names)}, but {self.names[0]} has "
                    f"{', '.join(first.class_names)}; an ensemble needs models with the same classes"
                )
        self._check_one_input_size()
        first.ensemble, first.inference = nn.ModuleList(others), self.inference
        return first

    def setup(self, stage: str) -> None:
        """Check the input sizes of models and data, and the encoders of all ranks."""
        data = cast(Any, self.trainer).datamodule
        self._check_one_input_size()
        if isinstance(data, SegmentationDataModule):
            check_input_size(data, self._segmenters[0].trained_at, self.inference)
        check_equal_across_ranks(self._segmenters[0].network.encoder.fingerprint(), "encoders")

    def passes_in_windows(self, images: Tensor) -> bool:
        """Return whether images (n, 3, h, w) pass the network in windows; the data modules leave these on the CPU."""
        settings = self.inference.at_size(self._segmenters[0].trained_at)
        return settings.windows((images.shape[-2], images.shape[-1])) is not None

    @property
    def _segmenters(self) -> list[ReverseHRNetSeg]:
        return [cast(ReverseHRNetSeg, model) for model in self.models]

    def _check_one_input_size(self) -> None:
        """Check that all models have the input size of the first, unless `inference` has one."""
        sizes = [model.trained_at for model in self._segmenters]
        for name, size in zip(self.names, sizes, strict=True):
            if size != sizes[0] and not self.inference.has_input_size:
                raise UserError(
                    f"{name} was trained with {size}, but {self.names[0]} with {sizes[0]}; give "
                    "one input size for all with --inference.scale or --inference.short_side (inference in Python)"
                )


def _facts(encoder: FrozenEncoder) -> str:
    return f"{encoder.name} ({encoder.source}, fingerprint {encoder.fingerprint()[:12]})"
