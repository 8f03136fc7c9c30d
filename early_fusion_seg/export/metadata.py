"""Metadata that an exported file holds: how to show its label maps, and where the model comes from."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from early_fusion_seg.encoder import FrozenEncoder
from early_fusion_seg.errors import UserError


def build_metadata(
    encoder: FrozenEncoder,
    class_names: Sequence[str],
    palette: Sequence[Sequence[int]],
    scale: float,
    temperature: float,
    results: dict[str, Any] | None = None,
) -> dict[str, str]:
    """Return the metadata of a model: name -> text; lists and numbers are JSON.

    Args:
        encoder: The encoder of the model.
        class_names: Name of each class, in the order of the labels.
        palette: RGB color of each class, 0..255.
        scale: Resize factor for images before the network.
        temperature: Divides the logits before the softmax.
        results: Contents of a `results.json` of the model, for its data and score.
    """
    facts: dict[str, Any] = {
        "class_names": class_names,
        "palette": palette,
        "encoder": encoder.name,
        "encoder_weights": encoder.source,
        "encoder_fingerprint": encoder.fingerprint(),
        "encoder_license": encoder.license or "not stated",
        "input_scale": scale,
        "temperature": temperature,
        "library": f"early-fusion-seg {version('early-fusion-seg')}",
    }
    if results is not None:
        facts |= {"data": results["data"], "split": results["split"], "miou": results["miou"]}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def read_results(path: Path | None, checkpoint: Path) -> dict[str, Any] | None:
    """Read the scores of a model.

    Args:
        path: A `results.json`; default: that beside the checkpoint or in the folder of its run, if there is one.
        checkpoint: The checkpoint of the model.

    Raises:
        UserError: The file that was given cannot be read, or is no `results.json`.
    """
    places = [checkpoint.parent, checkpoint.parent.parent]
    found = [place / "results.json" for place in places if (place / "results.json").is_file()]
    path = path or next(iter(found), None)
    if path is None:
        return None
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = results["data"], results["split"], results["miou"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as results ({type(error).__name__}: {error}); give the results.json that validate "
            "or test wrote"
        ) from error
    return results
