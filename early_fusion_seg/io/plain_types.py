"""Plain types: what a checkpoint, a JSON file and a YAML file can hold without code of other packages."""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from early_fusion_seg.errors import UserError


def to_plain(value: Any, name: str) -> Any:
    """Convert numbers and arrays of numpy and torch, paths, enums, tuples and mappings to plain types.

    Args:
        value: Any value.
        name: Its name, for the error message.

    Returns:
        None, bool, int, float, str, or a list or dict of these.

    Raises:
        UserError: The value has another type.

    Example:
        >>> to_plain({"lr": np.float64(0.1), "file": PurePath("a.pth"), "sides": (1, 2)}, "options")
        {'lr': 0.1, 'file': 'a.pth', 'sides': [1, 2]}
    """
    if isinstance(value, Enum):
        return to_plain(value.value, name)
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return to_plain(value.tolist(), name)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {to_plain(k, name): to_plain(v, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [to_plain(v, name) for v in value]
    for kind in (bool, int, float, str):  # subclasses too, such as numpy's str_, become the plain type
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise UserError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}; expected a number, a string, or a list or "
        "dict of these, because checkpoints hold only plain types"
    )


def without_numpy(value: Any) -> Any:
    """Convert numbers and arrays of numpy, and paths, in nested dicts, lists, tuples and sets; arrays become tensors.

    All else is returned as it is. `torch.load(weights_only=True)` refuses what numpy and pathlib write. Of the
    subclasses of dict it reads OrderedDict and Counter; others, such as defaultdict, become dicts.

    Example:
        >>> without_numpy({"patience": np.int64(3), "scores": [np.float64(0.5)], "net": "resnet18"})
        {'patience': 3, 'scores': [0.5], 'net': 'resnet18'}
    """
    if isinstance(value, dict):
        plain = {without_numpy(k): without_numpy(v) for k, v in value.items()}
        if type(value) not in (OrderedDict, Counter):
            return plain
        copy = type(value)(plain)
        copy.__dict__.update(value.__dict__)  # the state of a module has versions of its parts there
        return copy
    if isinstance(value, set | frozenset):
        return set(map(without_numpy, value))
    if type(value) in (list, tuple):
        return type(value)(map(without_numpy, value))
    if isinstance(value, np.ndarray):
        return torch.tensor(value) if value.dtype.kind in "biufc" else value.tolist()
    return to_plain(value, "value") if isinstance(value, np.generic | PurePath) else value
