"""The weights of an encoder: from timm's hub, from a file, or random; and the hash that identifies them."""

import hashlib
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

Weights = dict[str, Tensor]


def create_timm_model(name: str, pretrained: bool) -> FeatureGetterNet:
    """Build a timm model that returns its feature maps; the global random generator is left unchanged.

    Args:
        name: Name of the timm model.
        pretrained: Load timm's pretrained weights from the hub.

    Raises:
        UserError: timm does not know the name, or the hub cannot be reached.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a random encoder is the same on every rank and in every run
            return timm.create_model(name, pretrained=pretrained, features_only=True, feature_cls="getter")
    except (httpx.HTTPError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"the weights of {name} could not be fetched from timm's hub ({type(error).__name__}). Give a file with "
            'encoder_weights=PATH, or encoder_weights="random" to go without pretraining'
        ) from error
    except (RuntimeError, ValueError, AttributeError, AssertionError) as error:  # what timm raises for a wrong name
        raise UserError(f"timm cannot give feature maps of {name!r}: {error}") from error


def load_weights_file(model: nn.Module, name: str, path: Path) -> None:
    """Load weights in timm's keys; those of the classifier may be present or not, all others must match exactly.

    Args:
        model: timm's model, changed in place.
        name: Its name.
        path: A `.safetensors` or `.pth` file.

    Raises:
        MissingFileError: No such file.
        UserError: Not a file of tensors, or not weights of this model.
    """
    if not path.is_file():
        raise MissingFileError(f'encoder_weights={str(path)!r} is no file; give "hub", "random" or a weights file')
    try:
        weights: Weights = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen types, from KeyError to UnpicklingError
        raise UserError(f"{path} cannot be read as encoder weights ({type(error).__name__}: {error})") from error
    wanted = model.state_dict()
    known = timm.create_model(name).state_dict().keys()  # with the classifier, which feature extraction leaves out
    missing = [k for k in wanted if k not in weights]
    extra = [k for k in weights if k not in known]
    unequal = [k for k in wanted if k in weights and weights[k].shape != wanted[k].shape]
    for what, keys in (("lacks", missing), ("holds unknown", extra), ("has other shapes for", unequal)):
        if keys:
            raise UserError(f"{path} is not a file of {name} weights: it {what} {keys[0]!r} and {len(keys) - 1} more")
    model.load_state_dict({k: weights[k] for k in wanted})


@torch.no_grad()
def randomize(model: FeatureGetterNet, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Make a freshly initialized encoder useful as fixed random features, in place.

    timm initializes the last norm of each residual branch to zero (`zero_init_last`) and layer scales near zero, so a
    new network is close to the identity: good to train, useless frozen. Both become one here. The running statistics of
    batch norms become those of a fixed batch of smooth noise.

    Args:
        model: A model with timm's initialization.
        mean: RGB mean that it expects.
        std: RGB standard deviation that it expects.
    """
    for key, parameter in model.named_parameters():
        if key.endswith("gamma") or (parameter.ndim == 1 and key.endswith("weight") and not parameter.any()):
            parameter.fill_(1.0)
    norms = [m for m in model.eval().modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0  # running statistics become the statistics of the batch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads add in another order, which changes the last digits
    images = noise_images()
    model((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    torch.set_num_threads(threads)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def noise_images() -> Tensor:
    """Return a fixed (8, 3, 128, 128) batch in 0..1: noise of six octaves of equal strength."""
    generator = torch.Generator().manual_seed(0)
    octaves = [torch.rand(8, 3, 2**k, 2**k, generator=generator) for k in range(2, 8)]
    total = torch.stack([F.interpolate(o, size=(128, 128), mode="bilinear") for o in octaves]).mean(0)
    return ((total - 0.5) * 2 + 0.5).clamp(0, 1)


def state_hash(state: Weights) -> str:
    """Return the SHA-256 (hex) of named tensors: names, shapes and float32 values, in the order of the names."""
    sha = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().to("cpu", torch.float32).contiguous()
        sha.update(f"{key}{tuple(value.shape)}".encode())
        sha.update(value.numpy().tobytes())
    return sha.hexdigest()
