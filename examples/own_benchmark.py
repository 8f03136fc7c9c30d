"""A data set of your own as a data module, which every command takes by its class path.

With this file where Python finds it (`export PYTHONPATH=examples`):

    early-fusion-seg doctor --data own_benchmark.LeavesDataModule --data.root LEAVES
    early-fusion-seg fit --data own_benchmark.LeavesDataModule --data.root LEAVES --trainer.max_epochs 50
    early-fusion-seg submit --data own_benchmark.LeavesDataModule --data.root LEAVES --ckpt_path CHECKPOINT --output OUT

LEAVES holds photos/{train,val,test}/NAME.jpg and labels/{train,val}/NAME.png with the numbers 0, 1, 2 and 9.
"""

from early_fusion_seg import LabelSet
from early_fusion_seg.data import FileSource, Item, Layout, SegmentationDataModule, Source, Split, SubmissionFormat
from early_fusion_seg.data.listing import files_below, matched
from early_fusion_seg.errors import MissingFileError

LEAVES = LabelSet(
    name="leaves",
    class_names=("background", "healthy", "rust"),
    palette=((0, 0, 0), (0, 160, 0), (180, 90, 20)),
    raw_to_train=((0, 0), (1, 1), (2, 2), (9, 255)),  # 9 is ignored
)


class LeavesDataModule(SegmentationDataModule):
    """Leaves: photographs with healthy and rusty parts."""

    absent = "gt-only"  # classes without ground truth are left out of the mean
    layouts = (Layout("Leaves", ("labels/train",), {}),)
    fixes = {"labels/": "ask for the labels again", "": "copy the photographs again"}  # noqa: RUF012 - never changed

    @property
    def label_set(self) -> LabelSet:
        """Return the classes."""
        return LEAVES

    @property
    def submission(self) -> SubmissionFormat:
        """Return what the test server takes."""
        return SubmissionFormat("leaves.zip", "leaves.example.org")

    def source(self, split: Split) -> Source:
        """Return the images of a split; "test" and "predict" have no labels."""
        folder = "test" if split == "predict" else split
        images = files_below(self.root, f"photos/{folder}", ".jpg")
        if not images:
            raise MissingFileError(f"{self.root} has no photos/{folder}/*.jpg; copy the photographs there")
        if folder == "test":
            return FileSource([Item(key, image) for key, image in images.items()])
        masks = files_below(self.root, f"labels/{folder}", ".png")
        expected = f"{self.root}/labels/{folder}/NAME.png"
        return FileSource([Item(*item) for item in matched(images, masks, expected)], LEAVES)
