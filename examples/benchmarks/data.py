"""Time of one training sample against bare decoding of its two files, and of listing 100,000 images.

    python examples/benchmarks/data.py      # writes data.json, then docs/benchmarks.md

For each benchmark, files of real size, in pixels and in bytes, are generated (drawn street scenes with noise), and one
worker makes training samples with the recipe's augmentation. Bare decoding is OpenCV's of the image and Pillow's of the
mask. Both are timed in turns on the same files; the figures are medians, and the ratio of the sums.
"""

import json
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from heads_table import read_results, write_table
from PIL import Image

import early_fusion_seg
from early_fusion_seg import COCODataModule
from early_fusion_seg.data import SegmentationDataModule
from early_fusion_seg.data.dataset import FileSource, Item
from early_fusion_seg.data.synthetic.street import scene

HERE = Path(__file__).parent
RECIPES = Path(early_fusion_seg.__file__).parent / "recipes"
FILES, ROUNDS = 8, 5
KINDS = {  # size, suffix, kB of a typical image (docs/datasets.md's sources), the recipe
    "Cityscapes": ((1024, 2048), "png", 2400, "cityscapes"),
    "Mapillary Vistas": ((3000, 4000), "jpg", 1000, "mapillary"),
    "COCO": ((480, 640), "jpg", 163, "coco"),
    "PASCAL VOC 2012": ((375, 500), "jpg", 106, "voc"),
    "CamVid": ((360, 480), "png", 250, "camvid"),
}


def write_files(folder: Path, size: tuple[int, int], suffix: str, kilobytes: int) -> list[Item]:
    """Draw scenes, with as much of a camera's noise as makes the files as large as real ones."""
    folder.mkdir()
    items = [Item(str(i), folder / f"{i}.{suffix}", folder / f"{i}_mask.png") for i in range(FILES)]
    for i, item in enumerate(items):
        image, mask = scene(i, min(size[0], 750), min(size[1], 1000))
        image, mask = (cv2.resize(x, size[::-1], interpolation=cv2.INTER_NEAREST) for x in (image, mask))
        image = cv2.GaussianBlur(image, (0, 0), 1.0)  # enlarged blocks are no edges
        Image.fromarray(mask).save(item.mask)
        noise = np.random.default_rng(i).normal(0, 1, image.shape)
        for strength in (0.0, 0.3, 0.6, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15):
            noisy = np.clip(image + strength * noise, 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(item.image, quality=90)
            if Path(item.image).stat().st_size >= 1000 * kilobytes:
                break
    return items


def sample_ratio(items: list[Item], recipe: str) -> dict[str, float]:
    """Time samples and bare decoding in turns, in milliseconds, and their ratio."""
    config = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["data"]
    data: SegmentationDataModule = getattr(early_fusion_seg, config["class_path"].rpartition(".")[2])(
        "nowhere", **{k: tuple(v) if isinstance(v, list) else v for k, v in config["init_args"].items()}
    )
    labels = early_fusion_seg.SyntheticDataModule().label_set  # the drawn masks hold its labels
    files = early_fusion_seg.data.dataset.SegmentationDataset(FileSource(items, labels), data.train_transform)
    ratios, ours, bare = [], [], []
    for epoch in range(ROUNDS):
        for i, item in enumerate(items):
            times = [clock(lambda i=i, e=epoch: files[e, i]), clock(lambda item=item: decode(item))]
            ours.append(times[0])
            bare.append(times[1])
            ratios.append(times[0] / times[1])
    medians = {"sample_ms": statistics.median(ours), "decode_ms": statistics.median(bare)}
    return medians | {"ratio": statistics.median(ratios), "mean_ratio": sum(ours) / sum(bare)}


def decode(item: Item) -> Any:
    """Decode both files as plainly as can be."""
    return cv2.imread(str(item.image)), np.array(Image.open(item.mask))


def clock(work: Any) -> float:
    """Time a call in milliseconds of the processor, which other work on the machine does not lengthen."""
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start)


def scan(count: int = 100_000) -> float:
    """Time the listing of a tree of the size of COCO, in seconds: the median of three."""
    with tempfile.TemporaryDirectory() as folder:
        for place, suffix in (("images/train2017", "jpg"), ("stuffthingmaps/train2017", "png")):
            (Path(folder) / place).mkdir(parents=True)
            for i in range(count):
                (Path(folder) / place / f"{i:012}.{suffix}").touch()
        starts = []
        for _ in range(3):
            start = time.perf_counter()
            COCODataModule(folder).dataset("train")
            starts.append(time.perf_counter() - start)
        return statistics.median(starts)


def main() -> None:
    """Measure everything."""
    cv2.setNumThreads(0)  # as in a worker
    records: dict[str, Any] = {"date": str(date.today()), "samples": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, suffix, kilobytes, recipe) in KINDS.items():
            files = write_files(Path(folder) / recipe, size, suffix, kilobytes)
            records["samples"][name] = sample_ratio(files, recipe)
            print(name, records["samples"][name], flush=True)
    records["scan_s"] = scan()
    (HERE / "data.json").write_text(json.dumps(records, indent=2) + "\n")
    write_table(read_results())


if __name__ == "__main__":
    main()
