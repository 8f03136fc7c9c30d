"""Real files of the benchmarks, which may not be redistributed.

Their folder is ../shared/samples next to the checkout, or that in the variable EARLY_FUSION_SEG_SAMPLES.
"""

import os
from pathlib import Path

import pytest

DEFAULT = Path(__file__).parents[2] / "shared" / "samples"
SAMPLES = Path(os.environ.get("EARLY_FUSION_SEG_SAMPLES", DEFAULT))
needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(),
    reason="no real files of the benchmarks; set EARLY_FUSION_SEG_SAMPLES to their folder",
)
