"""Segment a folder of photographs with an exported model; needs PyTorch, numpy and Pillow only.

python examples/deploy/pt2_predict.py model.pt2 PHOTOGRAPHS OUTPUT
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError


@torch.no_grad()
def main(model: str, photographs: str, output: str) -> None:
    extra = {"metadata.json": ""}
    segment = torch.export.load(model, extra_files=extra).module()
    palette = np.zeros((256, 3), np.uint8)
    colors = json.loads(json.loads(extra["metadata.json"])["palette"])
    palette[: len(colors)] = colors
    masks, overlays = Path(output, "masks"), Path(output, "overlays")
    masks.mkdir(parents=True, exist_ok=True)
    overlays.mkdir(exist_ok=True)
    for path in sorted(path for path in Path(photographs).iterdir() if path.is_file()):
        try:
            image = np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        except UnidentifiedImageError:
            continue  # no image
        labels = segment(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
        labels = labels.reshape(image.shape[:2]).numpy()  # with probabilities, the result is a tuple
        mask = Image.fromarray(labels)
        mask.putpalette(palette.tobytes())
        mask.save(masks / f"{path.stem}.png")
        blended = np.rint(0.5 * image + 0.5 * palette[labels]).astype(np.uint8)
        Image.fromarray(blended).save(overlays / f"{path.stem}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
