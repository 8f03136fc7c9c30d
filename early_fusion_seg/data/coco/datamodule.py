"""COCO as semantic segmentation: COCO-Stuff (171 classes, arXiv 1612.03716), panoptic (133 classes, arXiv 1801.00868).

Numbers in the mask files:

    stuffthingmaps PNG (164k)   COCO category id minus 1: 0..181; 255 is unlabeled; 171 of them occur
    .mat (10k)                  COCO category id: 1..182; 0 is unlabeled; the same 171 classes occur
    panoptic PNG                segment id = R + 256 G + 65536 B, whose category is in the JSON; 0 is void
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from numpy.typing import NDArray

from early_fusion_seg.data.coco.panoptic import PANOPTIC, PanopticSegments
from early_fusion_seg.data.coco.replica import fake_coco_panoptic, fake_coco_stuff, fake_coco_stuff10k
from early_fusion_seg.data.coco.submission import SUBMISSION
from early_fusion_seg.data.datamodule import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import FileSource, Item, Source
from early_fusion_seg.data.layout import Layout
from early_fusion_seg.data.listing import File, files_below, matched
from early_fusion_seg.data.matlab import read_mat
from early_fusion_seg.data.replica import Replica
from early_fusion_seg.data.submission import SubmissionFormat
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.io.download import Archive, download_and_unpack
from early_fusion_seg.io.unpack import unpack
from early_fusion_seg.labels import IGNORE_INDEX, LabelSet, in_ranges, load_label_set

Labels = Literal["stuff", "panoptic", "stuff10k"]

SITE = "http://images.cocodataset.org"
STUFF_SITE = "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset"
IMAGE_ARCHIVES = {f"images/{split}2017": f"{SITE}/zips/{split}2017.zip" for split in ("train", "val")}
ARCHIVES: dict[str, dict[str, str]] = {  # folder that exists once the archive is unpacked -> URL of the archive
    "stuff": IMAGE_ARCHIVES | {"stuffthingmaps": f"{STUFF_SITE}/stuffthingmaps_trainval2017.zip"},
    "panoptic": IMAGE_ARCHIVES | {PANOPTIC: f"{SITE}/annotations/{PANOPTIC}.zip"},
    "stuff10k": {"cocostuff-10k-v1.1": f"{STUFF_SITE}/cocostuff-10k-v1.1.zip"},
}
MASK_FOLDERS = ("stuffthingmaps", "annotations", "stuffthingmaps_trainval2017")
TREES: dict[str, str] = {
    "stuff": """  images/{train2017,val2017}/000000000139.jpg, or {train2017,val2017}/ without images/
  stuffthingmaps/{train2017,val2017}/000000000139.png, or annotations/ instead of stuffthingmaps/""",
    "panoptic": """  images/{train2017,val2017}/000000000139.jpg, or {train2017,val2017}/ without images/
  annotations/panoptic_{train,val}2017.json
  annotations/panoptic_{train,val}2017/000000000139.png""",
    "stuff10k": """  images/COCO_train2014_000000000077.jpg
  annotations/COCO_train2014_000000000077.mat
  imageLists/{train,test}.txt""",
}


def _stuff_pattern(folder: str) -> str:
    # annotations/ of other layouts contains files with 2017 in their names too
    return f"{folder}/[tv]*2017/*.png" if folder == "annotations" else f"{folder}/*2017"


class COCODataModule(SegmentationDataModule):
    """COCO 2017, with 118,287 training and 5,000 validation images, or the 10,000 images of COCO-Stuff 10k.

    The mean IoU is over the classes that occur in the ground truth, as in COCO-Stuff's evaluator. Crowd segments have
    the class of their category. For COCO 2017, `predict` uses test2017, which has no public labels. For COCO-Stuff 10k,
    "val", "test" and `predict` are the same 1,000 images.

    Args:
        root: Folder of the data set.
        labels: Labels to read. "stuff" (default): COCO-Stuff of 2017, 171 classes. "panoptic": the panoptic annotations
            of 2017, 133 classes (things and merged stuff). "stuff10k": COCO-Stuff 10k, the same 171 classes.
        download: Download missing files into `root` (20 GB for 2017, 2 GB for 10k). Default: false.
        kwargs: Arguments of SegmentationDataModule, from batch_size to eval_transform.
    """

    absent = "gt-only"
    license = "COCO annotations: CC BY 4.0; the images have the terms of Flickr."
    layouts = (
        *(
            Layout(f"COCO-Stuff 164k (masks in {folder}/)", (_stuff_pattern(folder),), {"labels": "stuff"})
            for folder in MASK_FOLDERS
        ),
        Layout(
            "COCO panoptic",
            ("annotations/panoptic_*2017.json", f"{PANOPTIC}/panoptic_*2017.json"),
            {"labels": "panoptic"},
        ),
        Layout(
            "COCO-Stuff 10k",
            ("imageLists/train.txt", "cocostuff-10k-v1.1/imageLists/train.txt"),
            {"labels": "stuff10k"},
        ),
    )
    fixes: ClassVar[Mapping[str, str]] = {
        part: f"unpack or download {archive} again"
        for part, archive in {
            "COCO_train2014": "cocostuff-10k-v1.1.zip",
            "panoptic_": f"{PANOPTIC}.zip",
            ".png": "stuffthingmaps_trainval2017.zip",
            **{f"{split}2017": f"{split}2017.zip" for split in ("train", "val", "test")},
            "": "its zip files",
        }.items()
    }

    def __init__(self, root: str | Path, labels: Labels = "stuff", download: bool = False, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        if labels not in get_args(Labels):
            raise UserError(f"labels is {labels!r}; expected one of {', '.join(get_args(Labels))}")
        self.labels = labels
        self.masks_match_images = labels == "stuff"  # the other kinds list their images in a file
        self.download = download

    @cached_property
    def label_set(self) -> LabelSet:
        """Return the classes; the raw ids are those of the files set by `labels`."""
        if self.labels == "panoptic":
            return load_label_set("coco_panoptic")
        stuff = load_label_set("coco_stuff")
        if self.labels == "stuff":
            return stuff
        pairs = tuple(((raw_id + 1) % 256, train_id) for raw_id, train_id in stuff.raw_to_train)  # 255 becomes 0
        return replace(stuff, name="coco_stuff_10k", raw_to_train=pairs)

    @property
    def published_sizes(self) -> dict[str, int]:
        """Return the number of images that each split should have."""
        if self.labels == "stuff10k":
            return {"train": 9000, "val": 1000, "test": 1000}
        return {"train": 118287, "val": 5000, "test": 40670}

    def prepare_data(self) -> None:
        """Download and unpack missing files if `download` is set."""
        if not self.download:
            return
        archives = {self.root / f: Archive(url) for f, url in ARCHIVES[self.labels].items() if not self._holds(f)}
        download_and_unpack(archives, self.root)
        for archive in (self.root / PANOPTIC).glob("panoptic_*2017.zip"):  # zip files inside the zip file
            if not archive.with_suffix("").is_dir():
                unpack(archive, archive.with_suffix(""))

    def _holds(self, folder: str) -> bool:
        """Return whether the root has the contents of an archive, in this folder or in another place that is read."""
        if folder in IMAGE_ARCHIVES:
            return any(_has_file(self.root / place, ".jpg") for place in (folder, folder.removeprefix("images/")))
        if folder == "stuffthingmaps":
            places = [[self.root / f / f"{split}2017" for split in ("train", "val")] for f in MASK_FOLDERS]
            return any(all(_has_file(place, ".png") for place in both) for both in places)
        if folder == PANOPTIC:
            return all(self._panoptic_folder(f"{split}2017") for split in ("train", "val"))
        return self._folder_10k() is not None

    @property
    def submission(self) -> SubmissionFormat:
        """Return the format of the COCO-Stuff server: one JSON of run-length encoded masks."""
        if self.labels != "stuff":
            raise UserError(
                f"labels is {self.labels!r}; the COCO server for semantic segmentation expects stuff: "
                "give --data.labels stuff"
            )
        return SUBMISSION

    @classmethod
    def replicas(cls) -> dict[str, Replica]:
        """Return the fake replicas of the three kinds of labels."""
        return {
            "": Replica(fake_coco_stuff),
            "panoptic": Replica(fake_coco_panoptic, "--data.labels panoptic"),
            "stuff10k": Replica(fake_coco_stuff10k, "--data.labels stuff10k"),
        }

    def diagnose_raw_ids(self, raw_ids: Counter[int], fix: str) -> str | None:
        """Detect masks with the other numbering of COCO-Stuff, by ids that no file of the right numbering contains."""
        if self.labels == "panoptic":
            return None
        table = dict(self.label_set.raw_to_train)
        unused = {raw_id for raw_id, train_id in table.items() if train_id == IGNORE_INDEX} - {0, 255}
        other_numbering = {182, 255} - table.keys()  # last class and void of the other numbering
        wrong = sorted(raw_ids.keys() & (unused | other_numbering))
        if not wrong:
            return None
        files, others = "stuffthingmaps", "those of COCO-Stuff 10k, which are higher by one"
        if self.labels == "stuff10k":
            files, others = "files of COCO-Stuff 10k", "those of stuffthingmaps, which are lower by one"
        return f"no {files} hold the label(s) {in_ranges(wrong)}; the masks have other numbers, such as {others}: {fix}"

    def source(self, split: Split) -> Source:
        """Return the images of a split."""
        if self.labels == "stuff10k":
            return self._source_10k(split)
        if split in ("test", "predict"):
            return FileSource([Item(key, image) for key, image in self._list_images("test2017").items()])
        year = f"{split}2017"
        images = self._list_images(year)
        if self.labels == "panoptic":
            folder = self._panoptic_folder(year)
            if folder is None:
                raise self._missing_error(f"panoptic_{year}.json")
            segments = PanopticSegments(self.root / folder / f"panoptic_{year}.json")
            if lacking := segments.rows.keys() - images:
                raise MissingFileError(
                    f"{segments.path} lists {len(lacking)} image(s) not in {year}/, such as {min(lacking)}.jpg; "
                    f"unpack or download {year}.zip again"
                )
            masks, what = self._list_masks((f"{folder}/panoptic_{year}",), ".png")
            listed = {key: images[key] for key in sorted(segments.rows)}
            return FileSource([Item(*i) for i in matched(listed, masks, what)], self.label_set, segments.read)
        masks, what = self._list_masks(tuple(f"{folder}/{year}" for folder in MASK_FOLDERS), ".png")
        return FileSource([Item(*i) for i in matched(images, masks, what)], self.label_set)

    def _panoptic_folder(self, year: str) -> str | None:
        return next((f for f in ("annotations", PANOPTIC) if (self.root / f / f"panoptic_{year}.json").is_file()), None)

    def _list_images(self, folder: str) -> dict[str, File]:
        for place in (f"images/{folder}", folder):
            if found := files_below(self.root, place, ".jpg"):
                return found
        raise self._missing_error(f"images of {folder}")

    def _list_masks(self, folders: tuple[str, ...], suffix: str) -> tuple[dict[str, File], str]:
        """List the masks of the first folder that contains any.

        Returns:
            Key -> file, and where the masks were expected, for messages.
        """
        for folder in folders:
            if found := files_below(self.root, folder, suffix):
                archive = [*ARCHIVES[self.labels].values()][-1].rpartition("/")[2]
                return found, f"{self.root / folder}/*{suffix}; unpack or download {archive} again"
        raise self._missing_error(f"masks ({', '.join(folders)})")

    def _folder_10k(self) -> Path | None:
        return next((r for r in (self.root, self.root / "cocostuff-10k-v1.1") if (r / "imageLists").is_dir()), None)

    def _source_10k(self, split: Split) -> Source:
        root = self._folder_10k()
        if root is None:
            raise self._missing_error("imageLists")
        listing = root / "imageLists" / ("train.txt" if split == "train" else "test.txt")
        if not listing.is_file():
            raise MissingFileError(f"there is no list {listing}; unpack or download cocostuff-10k-v1.1.zip again")
        keys = listing.read_text(encoding="utf-8").split()
        labeled = split != "predict"
        items = [
            Item(k, root / "images" / f"{k}.jpg", root / "annotations" / f"{k}.mat" if labeled else None) for k in keys
        ]
        return FileSource(items, self.label_set if labeled else None, _read_10k)

    def _missing_error(self, what: str) -> MissingFileError:
        urls = "\n".join(f"  {url}" for url in ARCHIVES[self.labels].values())
        return MissingFileError(
            f"{self.root} does not hold COCO's {what}. Expected there:\n{TREES[self.labels]}\n"
            f"download=True (--data.download true) downloads and unpacks these:\n{urls}"
        )


def _has_file(folder: Path, suffix: str) -> bool:
    return any(path.suffix == suffix for path in folder.glob("*"))


def _read_10k(file: File) -> NDArray[Any]:
    """Read the label map of a .mat file of COCO-Stuff 10k."""
    return read_mat(file, "S")
