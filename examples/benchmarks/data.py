"""Time of one training sample against plain decoding of its two files, and of listing 100,000 images.

    python examples/benchmarks/data.py      # writes data.json, then docs/benchmarks.md

For each data set, files with the size of real ones, in pixels and in bytes, are generated (drawn street scenes with
noise), and one worker makes training samples with the recipe's augmentation. Plain decoding uses OpenCV for the image
and Pillow for the mask. Both are timed in turns on the same files.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from measure import Row, options, publish
from PIL import Image

import early_fusion_seg
from early_fusion_seg import COCODataModule
from early_fusion_seg.data import SegmentationDataModule
from early_fusion_seg.data.dataset import FileSource, Item
from early_fusion_seg.data.synthetic.street import scene

RECIPES = Path(early_fusion_seg.__file__).parent / "recipes"
FILES, ROUNDS = 8, 5
KINDS = {  # size, suffix, kB of a typical image (docs/datasets.md's sources), the recipe
    "Cityscapes": ((1024, 2048), "png", 2400, "cityscapes"),
    "Mapillary Vistas": ((3000, 4000), "jpg", 1000, "mapillary"),
    "COCO": ((480, 640), "jpg", 163, "coco"),
    "PASCAL VOC 2012": ((375, 500), "jpg", 106, "voc"),
    "CamVid": ((360, 480), "png", 250, "camvid"),
}
TEXT = """\
One training sample with the recipe's augmentation, in one worker, against plain decoding of its image (OpenCV) and
mask (Pillow), on generated files with the size of real ones: medians of processor time, the ratio of the sums and the
median ratio. Then the time to list a tree of images with their masks in COCO's layout, the median of three."""


def write_files(folder: Path, size: tuple[int, int], suffix: str, kilobytes: int) -> list[Item]:
    """Draw scenes, with as much camera noise as makes the files as large as real ones."""
    folder.mkdir()
    items = [Item(str(i), folder / f"{i}.{suffix}", folder / f"{i}_mask.png") for i in range(FILES)]
    for i, item in enumerate(items):
        image, mask = scene(i, min(size[0], 750), min(size[1], 1000))
        image, mask = (cv2.resize(x, size[::-1], interpolation=cv2.INTER_NEAREST) for x in (image, mask))
        image = cv2.GaussianBlur(image, (0, 0), 1.0)  # smooths the edges of enlarged pixels
        Image.fromarray(mask).save(item.mask)
        noise = np.random.default_rng(i).normal(0, 1, image.shape)
        for strength in (0.0, 0.3, 0.6, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15):
            noisy = np.clip(image + strength * noise, 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(item.image, quality=90)
            if Path(item.image).stat().st_size >= 1000 * kilobytes:
                break
    return items


def sample_row(items: list[Item], recipe: str) -> Row:
    """Time samples and plain decoding in turns."""
    config = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["data"]
    data: SegmentationDataModule = getattr(early_fusion_seg, config["class_path"].rpartition(".")[2])(
        "nowhere", **{k: tuple(v) if isinstance(v, list) else v for k, v in config["init_args"].items()}
    )
    labels = early_fusion_seg.SyntheticDataModule().label_set  # the drawn masks hold its labels
    files = early_fusion_seg.data.dataset.SegmentationDataset(FileSource(items, labels), data.train_transform)
    ratios, ours, plain = [], [], []
    for epoch in range(ROUNDS):
        for i, item in enumerate(items):
            times = [clock(lambda i=i, e=epoch: files[e, i]), clock(lambda item=item: decode(item))]
            ours.append(times[0])
            plain.append(times[1])
            ratios.append(times[0] / times[1])
    medians = {"sample (ms)": statistics.median(ours), "decoding (ms)": statistics.median(plain)}
    return medians | {"ratio": sum(ours) / sum(plain), "median ratio": statistics.median(ratios)}


def decode(item: Item) -> Any:
    """Decode both files without any further work."""
    return cv2.imread(str(item.image)), np.array(Image.open(item.mask))


def clock(work: Any) -> float:
    """Return the processor time of a call in milliseconds; other work on the machine does not lengthen it."""
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start)


def listing_row(count: int) -> Row:
    """Time the listing of a tree in COCO's layout."""
    with tempfile.TemporaryDirectory() as folder:
        for place, suffix in (("images/train2017", "jpg"), ("stuffthingmaps/train2017", "png")):
            (Path(folder) / place).mkdir(parents=True)
            for i in range(count):
                (Path(folder) / place / f"{i:012}.{suffix}").touch()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            COCODataModule(folder).dataset("train")
            seconds.append(time.perf_counter() - start)
        return {"images": count, "seconds": statistics.median(seconds)}


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, arguments=arguments)
    cv2.setNumThreads(0)  # as in a worker
    part = 8 if chosen.quick else 1
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, ((height, width), suffix, kilobytes, recipe) in KINDS.items():
            files = write_files(Path(folder) / recipe, (height // part, width // part), suffix, kilobytes // part**2)
            rows.append({"data set": name} | sample_row(files, recipe))
    tables = {"A training sample": rows, "Listing": [listing_row(100 if chosen.quick else 100_000)]}
    publish("data", "Reading data", TEXT, tables, [], "", chosen)


if __name__ == "__main__":
    main()
