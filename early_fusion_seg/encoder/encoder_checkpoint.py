"""The encoder in a checkpoint: its timm name and fingerprint if it can be fetched again, else all of its weights.

The checkpoint's entry `encoder` is a dict of plain types: `name` (timm's), `weights` (source), `fingerprint`,
`license`, and `state_dict` (timm's own, unfolded keys) where the weights cannot be fetched again.
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
        MissingFileError: No such file.
        UserError: A remote address, a truncated file, or a file that ReverseHRNetSeg did not write.
    """
    if "://" in str(path):
        raise UserError(f"{path} is a remote address; download the checkpoint and give the file")
    if not Path(path).is_file():
        raise MissingFileError(f"there is no checkpoint {path}; give the path of a .ckpt file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file, from EOFError to UnpicklingError
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__}); give an intact file") from error
    if not isinstance(checkpoint, dict) or not {"encoder", "hyper_parameters", "state_dict"} <= checkpoint.keys():
        raise UserError(f"{path} was not written by ReverseHRNetSeg: it lacks encoder, hyper_parameters or state_dict")
    return checkpoint


def store_encoder(checkpoint: Checkpoint, encoder: FrozenEncoder, whole: bool) -> None:
    """Replace the encoder's tensors in `state_dict` by the entry `encoder`.

    Args:
        checkpoint: As Lightning made it; changed in place.
        encoder: The encoder of the model.
        whole: Store the weights even if they can be fetched again.
    """
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith(ENCODER_PREFIX)}
    fine_tuned = "" if encoder.frozen else "fine-tuned from "
    entry: dict[str, Any] = {
        "name": encoder.name,
        "weights": fine_tuned + encoder.source.removeprefix(fine_tuned),
        "fingerprint": encoder.fingerprint(),
        "license": encoder.license,
    }
    can_be_fetched = encoder.frozen and encoder.weights not in ("random", "checkpoint")
    if whole or not can_be_fetched:
        entry["state_dict"] = encoder.timm_state_dict()
        checkpoint["hyper_parameters"]["encoder_weights"] = "checkpoint"
    checkpoint["encoder"] = entry


def restore_encoder(checkpoint: Checkpoint, encoder: FrozenEncoder) -> None:
    """Load the encoder's weights if the checkpoint has them, and check that the encoder is the checkpoint's.

    Args:
        checkpoint: Its `state_dict` gets the encoder's live tensors, so that loading can be strict both ways.
        encoder: The encoder of the model; changed in place.

    Raises:
        UserError: The checkpoint has another encoder, or ReverseHRNetSeg did not write it.
    """
    entry = checkpoint.get("encoder")
    if entry is None:
        raise UserError("the checkpoint has no entry 'encoder': it was not written by ReverseHRNetSeg")
    # random weights may differ in the last digits with other threads or another processor
    random = encoder.weights == entry["weights"] == "random"
    takes_weights = encoder.weights == "checkpoint" or random or not encoder.frozen
    if takes_weights and "state_dict" in entry and entry["name"] == encoder.name:
        encoder.load_timm_state_dict(entry["state_dict"])
        encoder.license, encoder.source = entry["license"], entry["weights"]
    if (entry["name"], entry["fingerprint"]) != (encoder.name, encoder.fingerprint()):
        raise UserError(
            f"the checkpoint belongs to the encoder {entry['name']} ({entry['weights']}, fingerprint "
            f"{entry['fingerprint'][:12]}), this model has {encoder.name} ({encoder.source}, fingerprint "
            f"{encoder.fingerprint()[:12]}); give the former's weights with encoder_weights=FILE"
        )
    live = {ENCODER_PREFIX + key: value for key, value in encoder.state_dict().items()}
    checkpoint["state_dict"] = checkpoint["state_dict"] | live
