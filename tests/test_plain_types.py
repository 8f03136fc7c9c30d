"""Tests of the plain types of checkpoints."""

from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from early_fusion_seg.io.plain_types import without_numpy

NUMBER = np.float64(0.5)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (OrderedDict(a=NUMBER), OrderedDict(a=0.5)),
        (Counter({np.str_("a"): 2}), Counter(a=2)),
        (defaultdict(list, a=[NUMBER]), {"a": [0.5]}),
        ({1, np.int64(2)}, {1, 2}),
        (frozenset({np.int64(2)}), {2}),
        ({"a": [(Path("b"), {"c": NUMBER})]}, {"a": [("b", {"c": 0.5})]}),
    ],
)
def test_numbers_from_numpy_in_containers_can_be_read_again(tmp_path: Path, value: Any, plain: Any) -> None:
    converted = without_numpy(value)
    assert (type(converted), converted) == (type(plain), plain)
    torch.save(converted, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True) == plain


def test_the_state_of_a_module_keeps_its_versions() -> None:
    state = nn.BatchNorm2d(1).state_dict()
    assert without_numpy(state)._metadata == state._metadata
