"""Reading a checkpoint, and the encoder's entry in it: timm name and fingerprint, and any weights that nobody else has.

The entry `encoder` is a dict of plain types: `name` (timm's), `weights` (their source), `package` (name and version of
the package that carries bundled weights), `fingerprint`, `license`, and `state_dict` (timm's own, unfolded keys) unless
the weights can be loaded again from the hub or a package. The entry `format` says how to read the checkpoint.
"""

import re
from pathlib import Path
from typing import Any

import torch

from early_fusion_seg.encoder.frozen_encoder import LOADABLE_AGAIN, FrozenEncoder
from early_fusion_seg.errors import MissingFileError, UserError

FORMAT = 2
"""Number of the present checkpoint format. A change that older versions cannot read raises it.

A model setting that an older checkpoint lacks has its default, so a new setting alone does not raise it.
`tests/checkpoints` has a checkpoint of each format.
"""
ENCODER_PREFIX = "network.encoder."
Checkpoint = dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of plain types and tensors, onto the CPU.

    Raises:
        MissingFileError: The file does not exist.
        UserError: The path is a remote address, or the file is damaged, holds other types, has a newer format, or was
            not written by ReverseHRNetSeg.
    """
    if "://" in str(path):
        raise UserError(f"{path} is a remote address; download the checkpoint and give the path of the file")
    if not Path(path).is_file():
        raise MissingFileError(f"there is no checkpoint {path}; give the path of a .ckpt file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file, from EOFError to UnpicklingError
        if found := re.search(r"GLOBAL (\S+)", str(error)):  # torch's message for a type that is not plain
            raise UserError(
                f"{path} holds a {found[1]}; only tensors and plain types are read, because others can run code. "
                "If you trust the file, read it with torch.load(path, weights_only=False), convert it and save it"
            ) from error
        raise UserError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}); give an intact file"
        ) from error
    if not isinstance(checkpoint, dict) or not {"encoder", "hyper_parameters", "state_dict"} <= checkpoint.keys():
        raise UserError(f"{path} was not written by ReverseHRNetSeg: it lacks encoder, hyper_parameters or state_dict")
    check_format(checkpoint, path)
    if checkpoint.get("format", 1) == 1:
        _name_head_of_format_1(checkpoint)
    return checkpoint


def check_format(checkpoint: Checkpoint, path: str | Path) -> None:
    """Check that this version can read the format of a checkpoint; one without a number has format 1.

    Raises:
        UserError: The format is newer.
    """
    found = checkpoint.get("format", 1)
    if found > FORMAT:
        raise UserError(
            f"{path} has the checkpoint format {found}, but this version of early-fusion-seg reads formats up to "
            f"{FORMAT}; install a newer version"
        )


def _name_head_of_format_1(checkpoint: Checkpoint) -> None:
    """Write the settings of a head in full, in place: format 1 had other defaults, and widths without a limit."""
    settings = checkpoint["hyper_parameters"]
    keys = (re.fullmatch(r"network\.head\.classifiers\.(\d+)\.weight", key) for key in checkpoint["state_dict"])
    strides = sorted(int(key[1]) for key in keys if key)
    n, early = len(strides), settings.get("plan", "early") == "early"
    settings["width"] = [settings.get("width", 32) * s // 4 for s in strides]
    if settings.get("blocks") is None:
        settings["blocks"] = [int(s > 4) for s in strides] if early and 2 in strides else [2] * n
    if settings.get("hr_modules") is None:
        settings["hr_modules"] = [2] + [0] * (n - 1) if early else [1] * n


def store_encoder(checkpoint: Checkpoint, encoder: FrozenEncoder, store_weights: bool) -> None:
    """Replace the encoder's tensors in `state_dict` by the entry `encoder`, and add the format.

    Args:
        checkpoint: The checkpoint dict of Lightning; changed in place.
        encoder: The encoder of the model.
        store_weights: Store the weights even if they can be loaded again from the hub or a package.
    """
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith(ENCODER_PREFIX)}
    fine_tuned = "" if encoder.frozen else "fine-tuned from "
    entry: dict[str, Any] = {
        "name": encoder.name,
        "weights": fine_tuned + encoder.source.removeprefix(fine_tuned),
        "package": encoder.package,
        "fingerprint": encoder.fingerprint(),
        "license": encoder.license,
    }
    can_be_loaded_again = encoder.frozen and encoder.weights in LOADABLE_AGAIN
    if store_weights or not can_be_loaded_again:
        entry["state_dict"] = encoder.timm_state_dict()
        checkpoint["hyper_parameters"]["encoder_weights"] = "checkpoint"
    checkpoint["encoder"] = entry
    checkpoint["format"] = FORMAT


def restore_encoder(checkpoint: Checkpoint, encoder: FrozenEncoder) -> None:
    """Load the encoder's weights if the checkpoint has them, and check that the encoder is that of the checkpoint.

    Args:
        checkpoint: The checkpoint dict; the encoder's tensors are added to its `state_dict`, so that missing and
            unexpected keys can be errors.
        encoder: The encoder of the model; changed in place.

    Raises:
        UserError: The checkpoint has another encoder or a newer format, or was not written by ReverseHRNetSeg.
    """
    check_format(checkpoint, "the checkpoint")
    entry = checkpoint.get("encoder")
    if entry is None:
        raise UserError(
            "the checkpoint has no entry 'encoder', so it was not written by ReverseHRNetSeg; give one that was"
        )
    # random weights may differ in the last digits on another processor
    random = encoder.weights == entry["weights"] == "random"
    takes_weights = encoder.weights == "checkpoint" or random or not encoder.frozen
    if takes_weights and "state_dict" in entry and entry["name"] == encoder.name:
        encoder.load_timm_state_dict(entry["state_dict"])
        encoder.license, encoder.source = entry["license"], entry["weights"]
        encoder.package = entry.get("package")  # older checkpoints have none
    if (entry["name"], entry["fingerprint"]) != (encoder.name, encoder.fingerprint()):
        raise UserError(
            f"the checkpoint belongs to the encoder {entry['name']} ({entry['weights']}, fingerprint "
            f"{entry['fingerprint'][:12]}), this model has {encoder.name} ({encoder.source}, fingerprint "
            f"{encoder.fingerprint()[:12]}); give the weights of the former with encoder_weights=FILE"
        )
    live = {ENCODER_PREFIX + key: value for key, value in encoder.state_dict().items()}
    checkpoint["state_dict"] = checkpoint["state_dict"] | live
