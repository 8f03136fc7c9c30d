"""Segment a folder of photographs with an exported model; needs numpy, onnxruntime and Pillow only.

python examples/deploy/onnx_predict.py model.onnx PHOTOGRAPHS OUTPUT
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps, UnidentifiedImageError


def main(model: str, photographs: str, output: str) -> None:
    session = onnxruntime.InferenceSession(model)
    metadata = session.get_modelmeta().custom_metadata_map
    palette = np.zeros((256, 3), np.uint8)
    colors = json.loads(metadata["palette"])
    palette[: len(colors)] = colors
    masks, overlays = Path(output, "masks"), Path(output, "overlays")
    masks.mkdir(parents=True, exist_ok=True)
    overlays.mkdir(exist_ok=True)
    for path in sorted(path for path in Path(photographs).iterdir() if path.is_file()):
        try:
            image = np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        except UnidentifiedImageError:
            continue  # no image
        (labels,) = session.run(["labels"], {"image": image.transpose(2, 0, 1)[None]})
        mask = Image.fromarray(labels[0])
        mask.putpalette(palette.tobytes())
        mask.save(masks / f"{path.stem}.png")
        blended = np.rint(0.5 * image + 0.5 * palette[labels[0]]).astype(np.uint8)
        Image.fromarray(blended).save(overlays / f"{path.stem}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
