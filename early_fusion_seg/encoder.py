"""The frozen encoder: a timm classifier, used for its feature maps at every scale.

Frozen means frozen: no gradient, eval mode that `train()` cannot undo, and batch norms folded into the convolutions
before them, so that no statistic can move. Channels, strides, mean and std are asked of timm, never written down.

Shapes: n images, h x w pixels, C_s channels of the map at stride s.

Our own choices, where the paper (arXiv 2402.06091) is silent: how a random encoder is made (`_randomize`), the folding,
and the fingerprint.
"""

import hashlib
from itertools import pairwise
from pathlib import Path

import httpx
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError
from timm.models import load_state_dict
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.folding import fold_batch_norms

DEFAULT_ENCODER = "resnet50.fb_ssl_yfcc100m_ft_in1k"
"""Semi-supervised ResNet-50 of the paper. Its weights are CC-BY-NC-4.0."""

Weights = dict[str, Tensor]


class FrozenEncoder(nn.Module):
    """Give the feature maps of a timm classifier, finest first.

    Args:
        name: A timm model whose `features_only` maps have strictly increasing strides and which takes any image size.
        weights: `"hub"` (timm's pretrained weights), `"random"` (always the same ones), the path of a `.safetensors`
            or `.pth` file in timm's keys, or `"checkpoint"`: none yet, `load_timm_state_dict` brings them.
        freeze: Freeze and fold; False gives an ordinary trainable encoder.

    Attributes:
        channels: C_s of each map.
        strides: Stride s of each map, in input pixels.
        mean: RGB mean that the weights expect, for pixels in 0..1.
        std: RGB standard deviation, likewise.
        source: Where the weights come from in words: as `weights`, or what the checkpoint says that brought them.
        license: License of timm's pretrained weights, None where timm states none or the weights are not timm's.

    Raises:
        UserError: Unknown model, unfit maps, weights that cannot be had or do not fit.

    Example:
        >>> encoder = FrozenEncoder("resnet18", weights="random")
        >>> [tuple(m.shape) for m in encoder(torch.rand(1, 3, 64, 96))][-1]
        (1, 512, 2, 3)
    """

    def __init__(self, name: str = DEFAULT_ENCODER, weights: str = "hub", freeze: bool = True) -> None:
        super().__init__()
        self.name = name
        self.weights = weights
        self.source = weights
        self.frozen = freeze
        self.model = _create(name, pretrained=weights == "hub")
        config = self.model.model.pretrained_cfg
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        self.license: str | None = config.get("license") if weights == "hub" else None
        self.channels: tuple[int, ...] = tuple(self.model.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(self.model.feature_info.reduction())
        self._needs_multiple = _needs_multiple(self.model, name, self.strides)
        self._unfolded_state: Weights | None = None  # unfolded, kept only where they cannot be fetched again
        self._fingerprint: str | None = None
        if weights == "random":
            _randomize(self.model, self.mean, self.std)
        elif weights not in ("hub", "checkpoint"):
            _load_file(self.model.model, name, Path(weights))
        if weights != "checkpoint":
            self._freeze_and_fold(keep=weights == "random")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps.

        Args:
            images: (n, 3, h, w) floats, normalized with `mean` and `std`.

        Returns:
            One (n, C_s, ceil(h / s), ceil(w / s)) map for each stride, finest first, in channels_last memory.
        """
        if self._fingerprint is None:
            raise UserError(f"the encoder {self.name} has no weights yet: load them from its checkpoint")
        h, w = images.shape[-2:]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            images = images.contiguous(memory_format=torch.channels_last)
            if self._needs_multiple:
                coarsest = self.strides[-1]
                images = F.pad(images, (0, -w % coarsest, 0, -h % coarsest), mode="replicate")
            maps = self.model(images)
        return [
            m[..., : -(-h // s), : -(-w // s)] for m, s in zip(maps, self.strides, strict=True)
        ]  # no-op but where padded

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stay in eval mode while frozen, whatever is asked."""
        return super().train(mode and not self.frozen)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of timm's state dict in float32, before folding and casting."""
        if self.frozen and self._fingerprint is not None:
            return self._fingerprint
        return digest(self.model.model.state_dict())

    def state_hash(self) -> str:
        """Return the SHA-256 (hex) of the tensors as they are now: equal before and after a fit that froze them."""
        return digest(self.state_dict())

    def timm_state_dict(self) -> Weights:
        """Return the weights in timm's own, unfolded keys, on the CPU, as `safetensors.torch.save_file` takes them."""
        if not self.frozen:
            return _copied(self.model.model.state_dict())
        if self._unfolded_state is None:  # from the hub or a file: there again
            fresh = FrozenEncoder(self.name, self.weights, freeze=False)
            if fresh.fingerprint() != self.fingerprint():
                raise UserError(f"{self.weights} no longer holds the weights that this {self.name} was made from")
            return fresh.timm_state_dict()
        return dict(self._unfolded_state)

    def load_timm_state_dict(self, weights: Weights) -> None:
        """Replace all weights by those of `weights` (timm's unfolded keys, strict both ways)."""
        if self.frozen and self._fingerprint is not None:
            device = next(self.parameters()).device
            self.model = _create(self.name, pretrained=False).to(device)  # the present one is folded
        self.model.model.load_state_dict(weights)
        self.license = None
        self._freeze_and_fold(keep=True)

    def _freeze_and_fold(self, keep: bool) -> None:
        """Take the fingerprint, then freeze and fold if asked."""
        state = self.model.model.state_dict()
        self._fingerprint = digest(state)
        if self.frozen:
            if keep:
                self._unfolded_state = _copied(state)
            self.model.eval().requires_grad_(False)
            side = 2 * self.strides[-1]
            fold_batch_norms(self.model, _noise_images()[:1, :, :side, :side])
            self.eval()
        else:
            self.model.train()
        self.model.to(memory_format=torch.channels_last)


def _copied(state: Weights) -> Weights:
    """Copy tensors to the CPU, out of channels_last memory, which safetensors refuses."""
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state.items()}


def digest(state: Weights) -> str:
    """Return the SHA-256 (hex) of named tensors: names, shapes and float32 values, in the order of the names."""
    sha = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().to("cpu", torch.float32).contiguous()
        sha.update(f"{key}{tuple(value.shape)}".encode())
        sha.update(value.numpy().tobytes())
    return sha.hexdigest()


def _create(name: str, pretrained: bool) -> FeatureGetterNet:
    """Build timm's model with its feature maps; the random generator is left as it was.

    Raises:
        UserError: timm does not know the name, or the hub cannot be reached.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a random encoder is always the same one, on every rank
            return timm.create_model(name, pretrained=pretrained, features_only=True, feature_cls="getter")
    except (httpx.HTTPError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"the weights of {name} could not be fetched from timm's hub ({type(error).__name__}). Give a file with "
            'encoder_weights=PATH, or encoder_weights="random" to go without pretraining'
        ) from error
    except (
        RuntimeError,
        ValueError,
        AttributeError,
        AssertionError,
    ) as error:  # what timm raises for a wrong name
        raise UserError(f"timm cannot give feature maps of {name!r}: {error}") from error


def _needs_multiple(model: FeatureGetterNet, name: str, strides: tuple[int, ...]) -> bool:
    """Say whether images must be padded to a multiple of the coarsest stride to get maps of ceil(size / stride).

    Raises:
        UserError: The strides do not increase (a ViT), or the model takes one size only.
    """
    if any(b <= a for a, b in pairwise(strides)):
        raise UserError(
            f"{name} cannot be the encoder: its feature maps have the strides {strides}, and early fusion needs a "
            "finer and a coarser map of each scale (strictly increasing strides). Take a ResNet, ConvNeXt, "
            "EfficientNet, MobileNetV3 or RegNet"
        )
    h, w = strides[-1] + 1, 2 * strides[-1] + 1
    try:
        if _map_sizes(model, h, w) == [(-(-h // s), -(-w // s)) for s in strides]:
            return False
    except (
        RuntimeError,
        AssertionError,
    ):  # sizes that do not meet again inside, or one size only: tried below
        pass
    try:
        _map_sizes(model, strides[-1] * 2, strides[-1] * 3)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{name} cannot be the encoder: it does not take images of any size ({error})") from error
    return True


@torch.no_grad()
def _map_sizes(model: FeatureGetterNet, h: int, w: int) -> list[tuple[int, int]]:
    return [(m.shape[-2], m.shape[-1]) for m in model.eval()(torch.zeros(1, 3, h, w))]


def _load_file(model: nn.Module, name: str, path: Path) -> None:
    """Load weights in timm's keys; the classifier's may be there or not, nothing else may be missing or left over.

    Raises:
        MissingFileError: No such file.
        UserError: Not a file of tensors, or not this model's.
    """
    if not path.is_file():
        raise MissingFileError(f'encoder_weights={str(path)!r} is no file; give "hub", "random" or a weights file')
    try:
        weights: Weights = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen types, from KeyError to UnpicklingError
        raise UserError(f"{path} cannot be read as encoder weights ({type(error).__name__}: {error})") from error
    wanted = model.state_dict()
    known = timm.create_model(name).state_dict().keys()  # with the head that feature extraction leaves out
    missing = [k for k in wanted if k not in weights]
    extra = [k for k in weights if k not in known]
    unequal = [k for k in wanted if k in weights and weights[k].shape != wanted[k].shape]
    for what, keys in (("lacks", missing), ("holds unknown", extra), ("has other shapes for", unequal)):
        if keys:
            raise UserError(f"{path} is not a file of {name} weights: it {what} {keys[0]!r} and {len(keys) - 1} more")
    model.load_state_dict({k: weights[k] for k in wanted})


@torch.no_grad()
def _randomize(model: FeatureGetterNet, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Give a random encoder depth: open its residual branches and calibrate its batch norms.

    timm starts the last norm of each residual branch at zero (`zero_init_last`) and layer scales near it, so that a new
    network is the identity: good to train, useless frozen. Both become one here. Running statistics become those of a
    fixed batch of smooth noise.
    """
    for key, parameter in model.named_parameters():
        if key.endswith("gamma") or (parameter.ndim == 1 and key.endswith("weight") and not parameter.any()):
            parameter.fill_(1.0)
    norms = [m for m in model.eval().modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0  # the running statistics become the batch's
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them add in another order, which shows in the last digits
    images = _noise_images()
    model((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    torch.set_num_threads(threads)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def _noise_images() -> Tensor:
    """Draw the fixed (8, 3, 128, 128) batch: noise of six octaves, as strong at each scale, in 0..1."""
    generator = torch.Generator().manual_seed(0)
    octaves = [torch.rand(8, 3, 2**k, 2**k, generator=generator) for k in range(2, 8)]
    total = torch.stack([F.interpolate(o, size=(128, 128), mode="bilinear") for o in octaves]).mean(0)
    return ((total - 0.5) * 2 + 0.5).clamp(0, 1)
