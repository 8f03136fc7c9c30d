"""The encoder's entry in a checkpoint: timm name and fingerprint, and all weights if they cannot be loaded again.

The entry `encoder` is a dict of plain types: `name` (timm's), `weights` (their source), `fingerprint`, `license`, and
`state_dict` (timm's own, unfolded keys) if the weights cannot be loaded again from the hub or a file.
"""

from pathlib import Path
from typing import Any

import torch

from early_fusion_seg.encoder.frozen_encoder import FrozenEncoder
from early_fusion_seg.errors import MissingFileError, UserError

ENCODER_PREFIX = "network.encoder."
Checkpoint = dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of plain types and tensors, onto the CPU.

    Raises:
        MissingFileError: The file does not exist.
        UserError: The path is a remote address, or the file is damaged or was not written by ReverseHRNetSeg.
    """
    if "://" in str(path):
        raise UserError(f"{path} is a remote address; download the checkpoint and give the path of the file")
    if not Path(path).is_file():
        raise MissingFileError(f"there is no checkpoint {path}; give the path of a .ckpt file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file, from EOFError to UnpicklingError
        raise UserError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}); give an intact file"
        ) from error
    if not isinstance(checkpoint, dict) or not {"encoder", "hyper_parameters", "state_dict"} <= checkpoint.keys():
        raise UserError(f"{path} was not written by ReverseHRNetSeg: it lacks encoder, hyper_parameters or state_dict")
    return checkpoint


def store_encoder(checkpoint: Checkpoint, encoder: FrozenEncoder, store_weights: bool) -> None:
    """Replace the encoder's tensors in `state_dict` by the entry `encoder`.

    Args:
        checkpoint: The checkpoint dict of Lightning; changed in place.
        encoder: The encoder of the model.
        store_weights: Store the weights even if they can be loaded again.
    """
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith(ENCODER_PREFIX)}
    fine_tuned = "" if encoder.frozen else "fine-tuned from "
    entry: dict[str, Any] = {
        "name": encoder.name,
        "weights": fine_tuned + encoder.source.removeprefix(fine_tuned),
        "fingerprint": encoder.fingerprint(),
        "license": encoder.license,
    }
    can_be_loaded_again = encoder.frozen and encoder.weights not in ("random", "checkpoint")
    if store_weights or not can_be_loaded_again:
        entry["state_dict"] = encoder.timm_state_dict()
        checkpoint["hyper_parameters"]["encoder_weights"] = "checkpoint"
    checkpoint["encoder"] = entry


def restore_encoder(checkpoint: Checkpoint, encoder: FrozenEncoder) -> None:
    """Load the encoder's weights if the checkpoint has them, and check that the encoder is that of the checkpoint.

    Args:
        checkpoint: The checkpoint dict; the encoder's tensors are added to its `state_dict`, so that missing and
            unexpected keys can be errors.
        encoder: The encoder of the model; changed in place.

    Raises:
        UserError: The checkpoint has another encoder, or was not written by ReverseHRNetSeg.
    """
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
    if (entry["name"], entry["fingerprint"]) != (encoder.name, encoder.fingerprint()):
        raise UserError(
            f"the checkpoint belongs to the encoder {entry['name']} ({entry['weights']}, fingerprint "
            f"{entry['fingerprint'][:12]}), this model has {encoder.name} ({encoder.source}, fingerprint "
            f"{encoder.fingerprint()[:12]}); give the weights of the former with encoder_weights=FILE"
        )
    live = {ENCODER_PREFIX + key: value for key, value in encoder.state_dict().items()}
    checkpoint["state_dict"] = checkpoint["state_dict"] | live
