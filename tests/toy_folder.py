"""A folder data set with any file names and classes."""

from pathlib import Path

import numpy as np

from early_fusion_seg.data.replica import save_pixels


def folder_data(root: Path, splits: dict[str, list[str]], csv: str = "0,0,ground,#000000\n1,1,plant,#00a000") -> Path:
    """Write a folder data set of random masks of two classes."""
    rng = np.random.default_rng(0)
    for split, names in splits.items():
        for name in names:
            save_pixels(root / "images" / split / f"{name}.png", rng.integers(0, 256, (12, 16, 3), np.uint8))
            save_pixels(root / "masks" / split / f"{name}.png", rng.integers(0, 2, (12, 16), np.uint8))
    (root / "labels.csv").write_text(f"raw_id,train_id,name,color\n{csv}\n", encoding="utf-8")
    return root
