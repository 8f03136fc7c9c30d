"""FrozenEncoder: a timm classifier, used for its feature maps: of every scale, or of four depths of a plain ViT.

Frozen means: no gradient, eval mode that `train()` cannot undo, and batch norms folded into the convolutions before
them, so that no running statistic can move. Channels, strides, mean and std are read from timm.

Shapes: n images, h x w pixels, C_s channels of the map at stride s.

Our own choices, which the published summary (arXiv 2402.06091) does not specify: how a random encoder is initialized
(`weights.randomize`), the folding, and the fingerprint.
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from early_fusion_seg.encoder.bundled_weights import load_bundled_weights
from early_fusion_seg.encoder.fold_batch_norm import fold_batch_norms
from early_fusion_seg.encoder.weights import (
    Weights,
    create_timm_model,
    load_weights,
    noise_images,
    randomize,
    read_weights_file,
    state_hash,
)
from early_fusion_seg.errors import UserError
from early_fusion_seg.resample import cells

LOADABLE_AGAIN = ("hub", "bundled")
"""Sources of weights that checkpoints need not store."""
DEFAULT_ENCODER = "resnet50.fb_ssl_yfcc100m_ft_in1k"
"""Semi-supervised ResNet-50 of the paper. Its weights are CC-BY-NC-4.0."""


class FrozenEncoder(nn.Module):
    """Compute the feature maps of a timm classifier, finest or shallowest first.

    Args:
        name: A timm model that accepts any image size and whose `features_only` maps have strictly increasing strides
            (a pyramid), or all the same stride (a plain vision transformer; see `weights.create_timm_model`).
        weights: `"hub"` (timm's pretrained weights), `"bundled"` (pretrained weights that an installed package
            carries: `bundled_weights.csv`), `"random"` (a fixed random initialization), the path of a `.safetensors`
            or `.pth` file with timm's keys, or `"checkpoint"` (to be loaded later with `load_timm_state_dict`).
        freeze: Freeze the encoder and fold its batch norms; False makes a trainable encoder.
        keep_weights: Keep a copy of timm's weights on the CPU for `timm_state_dict`, also of those from the hub or a
            package, which can be loaded again.

    Attributes:
        channels: C_s of each map.
        strides: Stride s of each map, in input pixels; that of a plain ViT is repeated for each of its maps.
        mean: RGB mean for the normalization of pixels in 0..1.
        std: RGB standard deviation for the normalization of pixels in 0..1.
        source: Where the weights come from: the argument `weights`, or the source stored in a checkpoint.
        license: License of the weights from the hub or a package; None where none is stated or they are others.
        package: Name and version of the package that carries the weights; None where they are not bundled.

    Raises:
        UserError: The model is unknown or its maps are unsuitable, or the weights cannot be loaded or do not fit.

    Example:
        >>> encoder = FrozenEncoder("resnet18", weights="random")
        >>> [tuple(m.shape) for m in encoder(torch.rand(1, 3, 64, 96))][-1]
        (1, 512, 2, 3)
    """

    def __init__(
        self, name: str = DEFAULT_ENCODER, weights: str = "hub", freeze: bool = True, keep_weights: bool = False
    ) -> None:
        super().__init__()
        self.name = name
        self.weights = weights
        self.source = weights
        self.frozen = freeze
        self.model = create_timm_model(name, pretrained=weights == "hub")
        config = self.model.model.pretrained_cfg
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        self.license: str | None = config.get("license") if weights == "hub" else None
        self.package: str | None = None
        self.channels: tuple[int, ...] = tuple(self.model.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(self.model.feature_info.reduction())
        self._needs_padding = _needs_padding(self.model, name, self.strides)
        self._unfolded_state: Weights | None = None  # stored only if the weights cannot be loaded again
        self._fingerprint: str | None = None
        if weights == "random":
            randomize(self.model, self.mean, self.std)
        elif weights == "bundled":
            self.license, self.package = load_bundled_weights(self.model.model, name)
        elif weights not in ("hub", "checkpoint"):
            load_weights(self.model.model, name, read_weights_file(Path(weights)), weights)
        if weights != "checkpoint":
            self._freeze_and_fold(keep_state=keep_weights or weights not in LOADABLE_AGAIN)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps.

        Args:
            images: (n, 3, h, w) floats, normalized with `mean` and `std`.

        Returns:
            One (n, C_s, ceil(h / s), ceil(w / s)) map per entry of `strides`, in channels_last memory format.
        """
        if self._fingerprint is None:
            raise UserError(f"the encoder {self.name} has no weights yet; load them with load_timm_state_dict")
        size = images.shape[-2:]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            images = images.contiguous(memory_format=torch.channels_last)
            if self._needs_padding:
                coarsest = self.strides[-1]
                down, right = (coarsest * cells(side, coarsest) - side for side in size)
                images = F.pad(images, (0, right, 0, down), mode="replicate")
            maps = self.model(images)
        # cropping has no effect unless the images were padded; a ViT's maps are not in channels_last
        maps = [
            m.narrow(2, 0, cells(size[0], s)).narrow(3, 0, cells(size[1], s))
            for m, s in zip(maps, self.strides, strict=True)
        ]
        return [m.contiguous(memory_format=torch.channels_last) for m in maps]

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Set training mode; a frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of timm's state dict in float32, before folding and casting."""
        if self.frozen and self._fingerprint is not None:
            return self._fingerprint
        return state_hash(self.model.model.state_dict())

    def state_hash(self) -> str:
        """Return the SHA-256 (hex) of the present tensors, which training must not change if the encoder is frozen."""
        return state_hash(self.state_dict())

    def timm_state_dict(self) -> Weights:
        """Return the weights with timm's own, unfolded keys, on the CPU, ready for `safetensors.torch.save_file`."""
        if not self.frozen:
            return _copied(self.model.model.state_dict())
        if self._unfolded_state is None:  # from the hub or a package: load them again
            fresh = FrozenEncoder(self.name, self.weights, freeze=False)
            if fresh.fingerprint() != self.fingerprint():
                raise UserError(f"the {self.weights} weights are no longer those that this {self.name} was built from")
            return fresh.timm_state_dict()
        return dict(self._unfolded_state)

    def load_timm_state_dict(self, weights: Weights) -> None:
        """Replace all weights by `weights`, with timm's unfolded keys; missing or unexpected keys are errors."""
        if self.frozen and self._fingerprint is not None:
            device = next(self.parameters()).device
            self.model = create_timm_model(self.name, pretrained=False).to(device)  # the old model is folded
        self.model.model.load_state_dict(weights)
        self.license = self.package = None
        self._freeze_and_fold(keep_state=True)

    def _freeze_and_fold(self, keep_state: bool) -> None:
        """Compute the fingerprint; then freeze and fold, unless the encoder is trainable."""
        state = self.model.model.state_dict()
        self._fingerprint = state_hash(state)
        if self.frozen:
            if keep_state:
                self._unfolded_state = _copied(state)
            self.model.eval().requires_grad_(False)
            side = 2 * self.strides[-1]
            fold_batch_norms(self.model, noise_images()[:1, :, :side, :side])
            self.eval()
        else:
            self.model.train()
        self.model.to(memory_format=torch.channels_last)


def _copied(state: Weights) -> Weights:
    """Copy tensors to the CPU in contiguous memory format, because safetensors refuses channels_last."""
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state.items()}


def _needs_padding(model: FeatureGetterNet, name: str, strides: tuple[int, ...]) -> bool:
    """Return whether images must be padded to a multiple of the coarsest stride for maps of size ceil(size / stride).

    Raises:
        UserError: The strides neither increase nor are all equal, or the model accepts a single image size only.
    """
    use = "use a ResNet, ConvNeXt, EfficientNet, MobileNetV3, RegNet or a plain ViT such as those of DINOv2 and DINOv3"
    if len(set(strides)) > 1 and any(b <= a for a, b in pairwise(strides)):
        raise UserError(
            f"{name} cannot be the encoder: its feature maps have the strides {strides}, expected strictly increasing "
            f"strides, or a single one as in a plain ViT; {use}"
        )
    s = strides[-1]
    try:
        if _has_map_sizes(model, s + 1, 2 * s + 1, strides):
            return False
    except (RuntimeError, AssertionError):  # maps of odd sizes cannot be added, or only some sizes are accepted
        pass
    reason = "its maps have other sizes than ceil(size / stride)"
    try:
        if _has_map_sizes(model, 2 * s, 3 * s, strides):
            return True
    except (RuntimeError, AssertionError) as error:
        reason = str(error)
    raise UserError(f"{name} cannot be the encoder: it does not accept images of any size ({reason}); {use}")


@torch.no_grad()
def _has_map_sizes(model: FeatureGetterNet, h: int, w: int, strides: tuple[int, ...]) -> bool:
    """Return whether the maps of an image of h x w pixels have the size ceil(size / stride)."""
    maps = model.eval()(torch.zeros(1, 3, h, w))
    return [tuple(m.shape[-2:]) for m in maps] == [(-(-h // s), -(-w // s)) for s in strides]
