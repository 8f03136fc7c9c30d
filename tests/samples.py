"""Real files of the benchmarks, which may not be redistributed: beside the checkout, or where a variable says."""

import os
from pathlib import Path

import pytest

DEFAULT = Path(__file__).parents[2] / "shared" / "samples"
SAMPLES = Path(os.environ.get("EARLY_FUSION_SEG_SAMPLES", DEFAULT))
needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(),
    reason="the benchmarks' real files are not at hand (EARLY_FUSION_SEG_SAMPLES names their folder)",
)
