"""What a checkpoint says of the encoder: where to fetch it and its fingerprint, or the whole of it.

The entry `encoder` is a dict of plain types: `name` (timm's), `weights` (where from), `fingerprint`, `license`
and `state_dict` (timm's own, unfolded keys) where the weights cannot be fetched again.
"""

from pathlib import Path
from typing import Any

import torch

from early_fusion_seg.encoder import FrozenEncoder
from early_fusion_seg.errors import MissingFileError, UserError

ENCODER_PREFIX = "network.encoder."
Checkpoint = dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of plain types and tensors, onto the CPU.

    Raises:
        MissingFileError: No such file.
        UserError: A remote address, or a file that is cut or no checkpoint of ours.
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
        encoder: The model's.
        whole: Store the weights even where they can be fetched again.
    """
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith(ENCODER_PREFIX)}
    entry: dict[str, Any] = {
        "name": encoder.name,
        "weights": encoder.source if encoder.frozen else f"trained from {encoder.source.removeprefix('trained from ')}",
        "fingerprint": encoder.fingerprint(),
        "license": encoder.license,
    }
    fetched_again = encoder.frozen and encoder.weights not in ("random", "checkpoint")
    if whole or not fetched_again:
        entry["state_dict"] = encoder.timm_state_dict()
        checkpoint["hyper_parameters"]["encoder_weights"] = "checkpoint"
    checkpoint["encoder"] = entry


def restore_encoder(checkpoint: Checkpoint, encoder: FrozenEncoder) -> None:
    """Give the encoder the checkpoint's weights where it holds them, and check that it is the checkpoint's encoder.

    Args:
        checkpoint: Its `state_dict` gets the encoder's live tensors, so that all other keys can be strict both ways.
        encoder: The model's; changed in place.

    Raises:
        UserError: The checkpoint's encoder is another one, or it is not a checkpoint of this model.
    """
    entry = checkpoint.get("encoder")
    if entry is None:
        raise UserError("the checkpoint has no entry 'encoder': it was not written by ReverseHRNetSeg")
    # a random one may differ in the last digits where the threads or the processor are others
    random = encoder.weights == entry["weights"] == "random"
    awaits = encoder.weights == "checkpoint" or random or not encoder.frozen
    if awaits and "state_dict" in entry and entry["name"] == encoder.name:
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
