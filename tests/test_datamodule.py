import copy
import itertools
import pickle
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from early_fusion_seg import ReverseHRNetSeg, SyntheticDataModule
from early_fusion_seg.data import datamodule
from early_fusion_seg.data.datamodule import SegmentationDataModule, Split
from early_fusion_seg.data.dataset import FileSource, Item, SegmentationDataset, Source, collate
from early_fusion_seg.data.folder import FolderDataModule, fake_folder
from early_fusion_seg.data.transforms import TrainAugmentation
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.labels import LabelSet

LABELS = LabelSet("toy", ("a", "b"), ((1, 2, 3), (4, 5, 6)), ((0, 0), (1, 1)))


class ToySource(Source):
    def __init__(self, count: int, broken: tuple[int, ...] = (), grow: int = 0) -> None:
        self.count, self.broken, self.grow = count, broken, grow

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"k{index}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self.broken:
            raise UserError(f"k{index}.png is broken")
        rng = np.random.default_rng(index)
        size = (20 + self.grow * index, 24)
        return rng.integers(0, 256, (*size, 3), np.uint8), rng.integers(0, 2, size, np.uint8)


class ToyDataModule(SegmentationDataModule):
    def __init__(self, toy: ToySource, **kwargs: Any) -> None:
        super().__init__("nowhere", **{"num_workers": 0, **kwargs})
        self.toy = toy

    @property
    def label_set(self) -> LabelSet:
        return LABELS

    def source(self, split: Split) -> Source:
        return self.toy


def process(world: int, rank: int, module: Any = None, root: Path = Path("nowhere")) -> Any:
    """Return what a data module reads of the trainer of one of several processes."""
    state = SimpleNamespace(fn=TrainerFn.VALIDATING)
    names = {"world_size": world, "global_rank": rank, "lightning_module": module, "default_root_dir": str(root)}
    return SimpleNamespace(**names, state=state)


def keys(loader: Any) -> list[list[str]]:
    return [batch["key"] for batch in loader]


def flat(lists: Iterable[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(lists))


def test_classes_and_rules_need_no_setup_and_no_files() -> None:
    dm = ToyDataModule(ToySource(3))
    assert (dm.class_names, dm.num_classes, dm.palette) == (["a", "b"], 2, [[1, 2, 3], [4, 5, 6]])
    assert (dm.ignore_index, dm.absent, dm.license) == (255, "nan-skip", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"eval_batch_size": -1}, "eval_batch_size is -1"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"rare_class_share": 1.01}, "rare_class_share is 1.01; expected a number from 0 to 1"),
        ({"rare_class_share": -0.1}, "rare_class_share is -0.1"),
        ({"rare_class_share": float("nan")}, "rare_class_share is nan"),
        ({"crop_size": 0}, "crop_height is 0"),
        ({"crop_size": (32, 32, 3)}, "expected one number, or height and width"),
        ({"crop_size": (5, -1)}, "crop_width is -1"),
    ],
)
def test_invalid_values_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ToyDataModule(ToySource(1), **arguments)


def test_train_batch_has_the_documented_shapes_and_types() -> None:
    dm = ToyDataModule(ToySource(5), batch_size=2, crop_size=16, scale=2.0)
    batch = next(iter(dm.train_dataloader()))
    assert batch["image"].shape == (2, 3, 16, 16)
    assert batch["mask"].shape == (2, 16, 16)
    assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
    assert len(batch["key"]) == 2


def test_evaluation_gives_each_image_once_and_unchanged() -> None:
    toy = ToySource(3, grow=1)
    for loader in (ToyDataModule(toy).val_dataloader(), ToyDataModule(toy).test_dataloader()):
        for index, batch in enumerate(loader):
            image, mask = toy.read(index)
            assert batch["key"] == [f"k{index}"]
            np.testing.assert_array_equal(batch["image"][0].permute(1, 2, 0), image)
            np.testing.assert_array_equal(batch["mask"][0], mask)


def test_scale_applies_to_training_images_only() -> None:
    dm = ToyDataModule(ToySource(2), scale=0.5)
    for split, size in {"train": (10, 12), "val": (20, 24), "test": (20, 24), "predict": (20, 24)}.items():
        sample = dm.dataset(split)[0]
        assert sample["image"].shape == (3, *size)
        assert sample["mask"].shape == size


def test_short_last_training_batch_is_dropped_unless_it_is_the_only_one() -> None:
    assert [len(k) for k in keys(ToyDataModule(ToySource(7), batch_size=3).train_dataloader())] == [3, 3]
    assert [len(k) for k in keys(ToyDataModule(ToySource(2), batch_size=3).train_dataloader())] == [2]
    val = ToyDataModule(ToySource(7), eval_batch_size=3).val_dataloader()
    assert [len(k) for k in keys(val)] == [3, 3, 1]


def test_order_and_augmentation_depend_only_on_seed_and_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    def epochs(seed: int, workers: int, start: int = 0) -> list[list[dict[str, Any]]]:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        loader = ToyDataModule(ToySource(6), batch_size=2, num_workers=workers).train_dataloader()
        loader.sampler.set_epoch(start)
        return [list(loader), list(loader)]

    def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
        pairs = zip(left, right, strict=True)
        return all(a["key"] == b["key"] and torch.equal(a["image"], b["image"]) for a, b in pairs)

    first, second = epochs(seed=3, workers=0)
    assert not same(first, second)
    torch.rand(5), np.random.rand(5)  # noqa: NPY002  # changes the global generators, which must not matter
    again = epochs(seed=3, workers=2)
    assert same(first, again[0])
    assert same(second, again[1])
    assert same(second, epochs(seed=3, workers=0, start=1)[0])
    assert not same(first, epochs(seed=4, workers=0)[0])
    assert sorted(flat(batch["key"] for batch in first)) == [f"k{i}" for i in range(6)]


def test_augmentation_of_an_image_differs_with_seed_epoch_and_position() -> None:
    def image(seed: int, epoch: int, position: int) -> torch.Tensor:
        source = ToySource(2)
        source.read = lambda index: ToySource.read(source, 0)  # type: ignore[method-assign]  # equal images
        return SegmentationDataset(source, TrainAugmentation((16, 16)), seed=seed)[epoch, position]["image"]

    first = image(3, 0, 0)
    assert torch.equal(first, image(3, 0, 0))
    for other in ((4, 0, 0), (3, 1, 0), (3, 0, 1)):
        assert not torch.equal(first, image(*other))


@pytest.mark.parametrize("workers", [0, 2])
def test_own_dataloader_augments_differently_in_each_pass_and_only_in_training(workers: int) -> None:
    def passes(split: Split, transform: A.BasicTransform | None = None) -> list[list[torch.Tensor]]:
        dm = ToyDataModule(ToySource(3), crop_size=16, eval_transform=transform)
        loader = DataLoader(dm.dataset(split), num_workers=workers, persistent_workers=workers > 0)
        return [[batch["image"] for batch in loader] for _ in range(3)]

    torch.manual_seed(0)
    first, second, third = passes("train")
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([*first, *second, *third], 2))
    torch.manual_seed(0)
    again = passes("train")
    assert all(torch.equal(a, b) for a, b in zip(first, again[0], strict=True))
    first, second, third = passes("val", A.Affine(translate_px=(-9, 9), p=1.0))  # draws, but equally in each pass
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


def test_processes_split_the_images() -> None:
    dm = ToyDataModule(ToySource(7), batch_size=1)
    shares: dict[str, list[str]] = {"train": [], "val": []}
    for rank in range(3):
        dm.trainer = process(3, rank)
        shares["train"] += flat(keys(dm.train_dataloader()))
        shares["val"] += flat(keys(dm.val_dataloader()))
    assert sorted(shares["val"]) == [f"k{i}" for i in range(7)]  # each exactly once
    assert set(shares["train"]) <= set(shares["val"])
    assert len(shares["train"]) == 6  # every process takes equally many steps, and no image twice


@pytest.mark.parametrize("n", [15, 16, 17])
def test_batches_of_all_processes_together_equal_those_of_one_process(n: int) -> None:
    dm = ToyDataModule(ToySource(n), batch_size=8)
    whole = keys(dm.train_dataloader())
    parts = ToyDataModule(ToySource(n), batch_size=4)
    shares = []
    for rank in range(2):
        parts.trainer = process(2, rank)
        shares.append(keys(parts.train_dataloader()))
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in whole]


@pytest.mark.parametrize("workers", [0, 1])
def test_process_without_images_gets_one_empty_batch(workers: int) -> None:
    dm = ToyDataModule(ToySource(2), num_workers=workers)
    ours = SimpleNamespace(accepts_empty_batches=ReverseHRNetSeg.accepts_empty_batches)
    dm.trainer = process(3, 2, ours)
    for loader in (dm.val_dataloader(), dm.test_dataloader(), dm.predict_dataloader()):
        assert list(loader) == [{"key": []}]
        assert len(loader) == 1


def test_process_without_images_gets_an_image_of_another_one_if_the_module_is_not_ours() -> None:
    shares: list[list[str]] = []
    for rank in range(5):
        dm = ToyDataModule(ToySource(2))
        dm.trainer = process(5, rank, Recorder())
        for loader in (dm.val_dataloader, dm.test_dataloader, dm.predict_dataloader):
            with pytest.warns(UserWarning, match=r"2 images for 5 processes, .* use at most 2 process\(es\)"):
                batches = list(loader())
            assert all("image" in batch for batch in batches)
        shares.append(flat(batch["key"] for batch in batches))
    assert shares == [["k0"], ["k1"], ["k0"], ["k1"], ["k0"]]


@pytest.mark.parametrize("workers", [0, 1])
def test_interrupted_epoch_resumes_with_the_same_batches(workers: int) -> None:
    def batches(loader: Any, count: int) -> list[tuple[list[str], torch.Tensor]]:
        return [(b["key"], b["image"]) for b, _ in zip(loader, range(count), strict=False)]

    whole = ToyDataModule(ToySource(10), batch_size=2, num_workers=workers, crop_size=16).train_dataloader()
    expected = [batches(whole, 5) for _ in range(2)]
    for epoch, done in ((0, 3), (1, 2), (0, 5), (0, 0)):
        first = ToyDataModule(ToySource(10), batch_size=2, crop_size=16).train_dataloader()
        first.sampler.set_epoch(epoch)
        iterator = iter(first)
        for _ in range(done):
            next(iterator)
        source = ToySource(10)
        read: list[int] = []
        source.read = lambda i, r=source.read, seen=read: seen.append(i) or r(i)
        second = ToyDataModule(source, batch_size=2, num_workers=workers, crop_size=16).train_dataloader()
        read.clear()  # the masks were checked
        second.load_state_dict(first.state_dict())
        start = epoch + (done == 5)
        second.sampler.set_epoch(start)
        rest = batches(second, 6)
        remaining = expected[start][done % 5 :]
        assert [k for k, _ in rest] == [k for k, _ in remaining]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(rest, remaining, strict=True))
        assert workers or len(read) == 2 * len(remaining)  # skipped images are not decoded


class RareSource(ToySource):
    """Images of which every fifth has class 1, in one place."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = np.full((60, 80, 3), index, np.uint8), np.zeros((60, 80), np.uint8)
        if index % 5 == 0:
            mask[40:50, 60:70] = 1
        return image, mask


RARE: dict[str, Any] = {"crop_size": 16, "random_scale": (1.0, 1.0), "rare_class_share": 0.6}


def test_rare_class_share_gives_crops_centered_on_rare_classes() -> None:
    def masks(share: float, **more: Any) -> list[tuple[str, torch.Tensor]]:
        dm = ToyDataModule(RareSource(200), **(RARE | {"rare_class_share": share} | more))
        return [(batch["key"][i], batch["mask"][i]) for batch in dm.train_dataloader() for i in range(8)]

    plain, rare = masks(0.0), masks(0.6)
    assert sum(bool((mask == 1).any()) for _, mask in plain) < 20
    centered = [key for key, mask in rare if (mask[7:9, 7:9] == 1).all()]
    assert 85 < len(centered) < 155
    assert {int(key[1:]) % 5 for key in centered} == {0}
    assert len(set(centered)) > 30
    ordinary = [(a, b) for (a, m), (b, n) in zip(plain, rare, strict=True) if a == b and torch.equal(m, n)]
    assert 60 < len(ordinary) < 110  # the other samples are unchanged
    key = max(centered, key=centered.count)
    same = [mask for other, mask in rare if other == key and (mask[7:9, 7:9] == 1).all()]
    assert any(not torch.equal(same[0], mask) for mask in same[1:])  # an image drawn again has another crop

    def own(image: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        return {"image": image[:16, :16], "mask": mask[:16, :16]}

    own_crops = masks(0.6, train_transform=own)
    assert [key for key, _ in own_crops] == [key for key, _ in rare]  # images are chosen, but not crops
    assert not any((mask == 1).any() for _, mask in own_crops)


@pytest.mark.parametrize("n", [30, 31, 33])
def test_processes_split_the_images_drawn_for_rare_classes(n: int, tmp_path: Path) -> None:
    def contents(loader: Any) -> list[list[tuple[str, bytes]]]:
        pairs = [zip(b["key"], b["image"], b["mask"], strict=True) for b in loader]
        return [sorted((k, bytes(i.numpy()) + bytes(m.numpy())) for k, i, m in batch) for batch in pairs]

    dm = ToyDataModule(RareSource(n), batch_size=6, **RARE)
    whole = [contents(loader) for loader in [dm.train_dataloader()] for _ in range(2)]  # two epochs
    assert whole[0] != whole[1]
    for world, workers in ((1, 1), (2, 0), (3, 1)):
        shares = []
        for rank in range(world):
            part = ToyDataModule(RareSource(n), batch_size=6 // world, num_workers=workers, **RARE)
            part.trainer = process(world, rank, root=tmp_path)
            loader = part.train_dataloader()
            shares.append([contents(loader) for _ in range(2)])
        for epoch in range(2):
            together = [
                sorted(itertools.chain(*parts)) for parts in zip(*(share[epoch] for share in shares), strict=True)
            ]
            assert together == whole[epoch]


def test_rare_classes_with_more_processes_than_images(tmp_path: Path) -> None:
    indices: list[tuple[int, ...]] = []
    for rank in range(5):
        dm = ToyDataModule(RareSource(2), batch_size=4, **(RARE | {"rare_class_share": 1.0}))
        dm.trainer = process(5, rank, root=tmp_path)
        indices += dm.train_dataloader().sampler
    assert {len(index) for index in indices} == {4}
    assert [place for *_, place in indices] == [0, 1, 0, 1, 0]


def test_each_epoch_draws_other_rare_classes() -> None:
    sampler: Any = ToyDataModule(RareSource(99), **(RARE | {"rare_class_share": 1.0})).train_dataloader().sampler
    first, second = list(sampler), list(sampler)
    assert [place for *_, place in first] == [place for *_, place in second] == [*range(99)]
    assert [index[1:3] for index in first] != [index[1:3] for index in second]
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_interrupted_epoch_resumes_with_the_same_rare_classes() -> None:
    def loader() -> Any:
        return ToyDataModule(RareSource(40), batch_size=4, **RARE).train_dataloader()

    expected = list(loader())
    first, second = loader(), loader()
    for _, _ in zip(range(3), first, strict=False):
        pass
    second.load_state_dict(first.state_dict() | {"batches": 3})
    rest = list(second)
    assert [batch["key"] for batch in rest] == [batch["key"] for batch in expected[3:]]
    assert all(torch.equal(a["mask"], b["mask"]) for a, b in zip(rest, expected[3:], strict=True))


def test_pixels_are_not_counted_without_rare_class_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SegmentationDataModule, "class_pixel_counts", lambda self: pytest.fail("counted"))
    sampler: Any = ToyDataModule(ToySource(3)).train_dataloader().sampler
    assert {len(index) for index in sampler} == {2}


def test_class_pixel_counts_and_weights_are_those_of_the_training_masks(tmp_path: Path) -> None:
    dm = FolderDataModule(fake_folder(tmp_path / "data", images=4), scale=0.5, num_workers=0)
    masks = [FileSource.read_labels(dm.source("train"), i) for i in range(4)]
    counts = np.array([[(mask == label).sum() for label in range(3)] for mask in masks])
    np.testing.assert_array_equal(dm.class_pixel_counts(), counts)
    share = counts.sum(0) / counts.sum()
    assert dm.class_weights("inverse-log") == pytest.approx((1 / np.log(1.02 + share)).tolist())
    for rank in (1, 0):  # only rank 0 writes into the folder of the run
        assert not (tmp_path / "run").exists()
        dm.trainer = process(2, rank, root=tmp_path / "run")
        dm.class_pixel_counts()
    assert (tmp_path / "run/class_pixel_counts.npz").is_file()
    dm.source = lambda split: FileSource([Item("a", tmp_path / "a.jpg")])
    with pytest.raises(UserError, match="FolderDataModule's training images have no labels to count classes in"):
        dm.class_weights("median")


@pytest.mark.parametrize(
    ("count", "batch_size", "seed", "prefix", "message"),
    [
        (10, 5, 0, "k", "with batches of 2; this run has batches of 5"),
        (12, 2, 0, "k", "with 10 images; this run has 12 images"),
        (10, 2, 0, "m", r"with images whose names have the checksum \d+; this run has images whose names"),
        (10, 2, 7, "k", "with the seed 0; this run has the seed 7"),
    ],
)
def test_resuming_within_an_epoch_of_another_order_is_refused(
    count: int, batch_size: int, seed: int, prefix: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = ToyDataModule(ToySource(10), batch_size=2).train_dataloader()
    next(iter(loader))
    monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
    source = ToySource(count)
    source.key = lambda index: f"{prefix}{index}"  # type: ignore[method-assign]
    other = ToyDataModule(source, batch_size=batch_size).train_dataloader()
    other.load_state_dict(loader.state_dict())
    with pytest.raises(UserError, match=f"middle of epoch 1 {message}.*, so it would leave out or repeat images"):
        next(iter(other))


def test_images_may_be_added_before_a_new_epoch() -> None:
    loader = ToyDataModule(ToySource(4), batch_size=2).train_dataloader()
    list(loader)
    other = ToyDataModule(ToySource(6), batch_size=2).train_dataloader()
    other.load_state_dict(loader.state_dict())
    other.sampler.set_epoch(1)
    assert len(list(other)) == 3


def test_without_a_seed_the_order_differs_between_runs_but_not_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED")
    first, second, resumed = (ToyDataModule(ToySource(20), batch_size=2) for _ in range(3))
    order = keys(first.train_dataloader())
    assert order != keys(second.train_dataloader())
    assert order == keys(first.train_dataloader())  # as with reload_dataloaders_every_n_epochs
    for _, _ in zip(range(3), first.train_dataloader(), strict=False):
        pass
    resumed.load_state_dict(first.state_dict())
    assert keys(resumed.train_dataloader()) == order[3:]


def test_all_processes_take_the_seed_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = keys(ToyDataModule(ToySource(20)).train_dataloader())
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setattr(datamodule, "all_gather_object", lambda value: ["0", value])  # as on rank 1
    assert keys(ToyDataModule(ToySource(20)).train_dataloader()) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_used_data_module_can_be_pickled(tmp_path: Path, workers: int) -> None:
    dm = FolderDataModule(fake_folder(tmp_path), batch_size=2, num_workers=workers, rare_class_share=0.5)
    expected = keys(dm.train_dataloader())
    list(dm.val_dataloader())
    for copied in (pickle.loads(pickle.dumps(dm)), copy.deepcopy(dm)):
        assert keys(copied.train_dataloader()) == expected
    trainer = Trainer(max_epochs=1, num_sanity_val_steps=0, default_root_dir=tmp_path, **QUIET)
    trainer.fit(Recorder(), datamodule=dm)
    assert keys(pickle.loads(pickle.dumps(dm)).train_dataloader()) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_file_ends_training_and_evaluation_with_its_message(workers: int) -> None:
    dm = ToyDataModule(ToySource(4, broken=(2,)), batch_size=2, num_workers=workers)
    for loader in (dm.train_dataloader(), dm.val_dataloader()):
        with pytest.raises(UserError) as caught:
            list(loader)
        assert str(caught.value) == "k2.png is broken"
    with pytest.raises(UserError, match=r"^k2\.png is broken$"):
        dm.dataset("val")[2]


def test_all_missing_files_are_counted(tmp_path: Path) -> None:
    dm = FolderDataModule(fake_folder(tmp_path, images=9), num_workers=0, eval_batch_size=3)
    loader = dm.val_dataloader()
    gone = [tmp_path / f"masks/val/{number:03}.png" for number in range(1, 9)]
    for path in gone:
        path.unlink()
    (tmp_path / "images/val/000.jpg").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        list(loader)
    first = ", ".join(map(str, gone[:5]))
    assert str(caught.value) == (
        f"{tmp_path}/images/val/000.jpg is not an image that can be read; 8 file(s) do not exist: {first} and 3 more"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_predict_reports_a_broken_file_and_continues(workers: int) -> None:
    dm = ToyDataModule(ToySource(3, broken=(1,)), num_workers=workers)
    batches = list(dm.predict_dataloader())
    assert [batch["key"] for batch in batches] == [["k0"], ["k1"], ["k2"]]
    assert batches[1] == {"key": ["k1"], "error": ["k1.png is broken"]}
    assert "image" in batches[0]
    assert "image" in batches[2]


def test_error_names_images_of_different_sizes_in_a_batch() -> None:
    with pytest.raises(UserError, match=r"differ in size \(k\d 24x2\d, k\d 24x2\d\); set crop_size"):
        list(ToyDataModule(ToySource(2, grow=1), batch_size=2).train_dataloader())
    assert len(list(ToyDataModule(ToySource(2, grow=1), batch_size=2, crop_size=[8, 8]).train_dataloader())) == 1


def test_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="the split is 'vall'; expected one of train, val, test, predict"):
        SyntheticDataModule().dataset("vall")


def test_split_without_images_is_refused() -> None:
    with pytest.raises(MissingFileError, match="the val split below nowhere has no images"):
        ToyDataModule(ToySource(0)).dataset("val")


def test_user_transforms_may_normalize_and_return_tensors() -> None:
    normalize = A.Compose([A.Normalize(), ToTensorV2()])
    dm = ToyDataModule(ToySource(2), batch_size=2, train_transform=normalize, eval_transform=A.HorizontalFlip(p=1.0))
    batch = next(iter(dm.train_dataloader()))
    assert batch["image"].dtype == torch.float32
    assert batch["image"].shape == (2, 3, 20, 24)
    assert batch["mask"].dtype == torch.uint8
    index = int(batch["key"][0][1:])
    image, mask = dm.toy.read(index)
    expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(batch["image"][0].permute(1, 2, 0), expected, atol=1e-5)
    np.testing.assert_array_equal(batch["mask"][0], mask)
    np.testing.assert_array_equal(dm.dataset("val")[0]["mask"], dm.toy.read(0)[1][:, ::-1])


def test_user_transform_may_return_floats_and_views() -> None:
    def flip(image: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        return {"image": image[:, ::-1] / 255, "mask": mask[:, ::-1]}

    sample = SegmentationDataset(ToySource(1), flip)[0]
    image, mask = ToySource(1).read(0)
    np.testing.assert_allclose(sample["image"].permute(1, 2, 0), image[:, ::-1] / 255, atol=1e-6)
    np.testing.assert_array_equal(sample["mask"], mask[:, ::-1])


def test_errors_name_files_that_do_not_match(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=2)
    image, mask = tmp_path / "images/train/000.jpg", tmp_path / "masks/train/000.png"
    labels = LabelSet.from_csv(tmp_path / "labels.csv")
    source = FileSource([Item("x", image, mask), Item("y", image)], labels)
    assert source.key(0) == "x"
    assert source.read(0)[1].max() <= 255
    assert source.read(1)[1] is None
    assert "mask" not in SegmentationDataset(source)[1]
    with pytest.raises(UserError, match=r"masks/train/000\.png holds \d labels that .*'toy'.* 1 in \d+ pix"):
        FileSource([Item("x", image, mask)], LabelSet("toy", ("a",), ((0, 0, 0),), ((0, 0),))).read(0)
    other = fake_folder(tmp_path / "other", images=1, size=(30, 40)) / "masks/train/000.png"
    with pytest.raises(UserError, match=r"000\.jpg is 48x36 .*other/masks/train/000\.png is 40x30"):
        FileSource([Item("x", image, other)], labels).read(0)
    with pytest.raises(MissingFileError, match=r"gone\.png"):
        FileSource([Item("x", image, tmp_path / "gone.png")], labels).read(0)


def test_collate_lists_every_error() -> None:
    samples = [{"key": "a", "error": "1"}, {"key": "b", "image": torch.zeros(3, 2, 2)}, {"key": "c", "error": "2"}]
    assert collate(samples) == {"key": ["a", "b", "c"], "error": ["1", "2"]}


def test_one_process_at_a_time_prepares_data(tmp_path: Path) -> None:
    root = tmp_path / "data"

    def prepare_data() -> None:
        if not (root / "complete").exists():
            root.mkdir()  # fails if another one is at work
            time.sleep(0.2)
            (root / "complete").touch()

    def prepare(_: int) -> bool:
        dm = ToyDataModule(ToySource(1))
        dm.root, dm.prepare_data = root, prepare_data  # type: ignore[method-assign]
        dm.prepare_in_turn()
        return (root / "complete").exists()

    with ThreadPoolExecutor(3) as pool:  # each opens the lock by itself, as a process does
        assert list(pool.map(prepare, range(3))) == [True] * 3


def test_workers_are_persistent_and_memory_is_pinned_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, workers in itertools.product((False, True), (0, 1)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        loader = ToyDataModule(ToySource(1), num_workers=workers).val_dataloader()
        assert (loader.pin_memory, loader.persistent_workers, loader.num_workers) == (cuda, workers > 0, workers)


def test_opencv_uses_one_thread_in_workers() -> None:
    def count(image: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        return {"image": np.full_like(image, cv2.getNumThreads()), "mask": mask}

    dm = ToyDataModule(ToySource(1), num_workers=1, eval_transform=count)
    assert next(iter(dm.val_dataloader()))["image"].unique().tolist() == [1]


def test_default_number_of_workers_is_1_to_4() -> None:
    assert 1 <= ToyDataModule(ToySource(1), num_workers=None).num_workers <= 4


class Recorder(LightningModule):
    """A model that learns nothing and records its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[str, str, int]] = []

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        self.seen += [("train", key, int(image.sum())) for key, image in zip(batch["key"], batch["image"], strict=True)]
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        self.seen += [("val", key, 0) for key in batch["key"]]

    def predict_step(self, batch: dict[str, Any], index: int) -> list[str]:
        return batch["key"] + batch.get("error", [])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


@pytest.mark.parametrize("workers", [None, 0])
def test_lightning_fits_and_predicts_without_a_warning(
    tmp_path: Path, workers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # resets the variable after the test, which seed_everything sets too
    seed_everything(1, verbose=False)
    fake_folder(tmp_path, images=4)
    model = Recorder()
    dm = FolderDataModule(tmp_path, batch_size=2, num_workers=workers)
    Trainer(max_epochs=2, num_sanity_val_steps=0, **QUIET).fit(model, datamodule=dm)
    names = [f"{i:03}.jpg" for i in range(4)]
    passes = [[key for _, key, _ in model.seen[start : start + 4]] for start in (0, 4, 8, 12)]
    assert [sorted(keys) for keys in passes] == [names] * 4
    assert passes[1] == passes[3] == names
    sums = [{key: total for split, key, total in model.seen[start : start + 4]} for start in (0, 8)]
    assert all(sums[0][name] != sums[1][name] for name in names)  # another augmentation each epoch

    (tmp_path / "images" / "train" / "000.jpg").write_text("no image")
    dm = FolderDataModule(tmp_path / "images", num_workers=workers)
    predicted = Trainer(**QUIET).predict(model, datamodule=dm)
    assert [entry[0] for entry in predicted] == [f"{s}/{n}" for s in ("train", "val") for n in names]
    assert "is not an image" in predicted[0][1]


def test_lightning_overfits_the_same_augmented_batch(tmp_path: Path) -> None:
    fake_folder(tmp_path, images=4)
    model, dm = Recorder(), FolderDataModule(tmp_path, batch_size=2, num_workers=0)
    with pytest.warns(UserWarning, match="turning off the train dataloader shuffling"):
        Trainer(max_epochs=2, overfit_batches=1, num_sanity_val_steps=0, **QUIET).fit(model, datamodule=dm)
    seen = [entry for entry in model.seen if entry[0] == "train"]
    assert len(seen) == 4
    assert seen[:2] == seen[2:]


def test_default_transform_has_the_crop_size() -> None:
    dm = ToyDataModule(ToySource(1), crop_size=9)
    assert isinstance(dm.train_transform, TrainAugmentation)
    assert dm.train_transform.crop_size == (9, 9)


def test_random_scale_is_passed_to_the_default_augmentation():
    dm = ToyDataModule(ToySource(4), random_scale=(1.0, 1.0), crop_size=(20, 24))
    sample, plain = dm.dataset("train")[0], ToyDataModule(ToySource(4)).dataset("val")[0]
    mask = plain["mask"]
    assert torch.equal(sample["mask"], mask) or torch.equal(sample["mask"], mask.flip(1))
    with pytest.raises(UserError, match=r"random_scale is \(2\.0, 0\.5\)"):
        ToyDataModule(ToySource(4), random_scale=(2.0, 0.5))


def test_plot_draws_images_next_to_their_labels(tmp_path: Path) -> None:
    dm = FolderDataModule(fake_folder(tmp_path, size=(160, 320)), crop_size=(160, 320), batch_size=3, num_workers=0)
    batch = next(iter(dm.train_dataloader()))
    picture = np.asarray(dm.plot(batch))
    image = batch["image"][1].permute(1, 2, 0).numpy()
    rows, cols = picture.shape[0] - 160, picture.shape[1] - 320
    places = [(y, x) for y in range(rows) for x in range(cols) if (picture[y, x] == image[0, 0]).all()]
    assert any((picture[y : y + 160, x : x + 320] == image).all() for y, x in places)
    floats = dm.plot({**batch, "image": batch["image"].float() / 255})
    np.testing.assert_array_equal(np.asarray(floats), picture)
    sample = dm.dataset("val")[0]
    one = np.asarray(dm.plot(sample))
    assert one.shape[0] < picture.shape[0] / 2
    without = {key: value for key, value in sample.items() if key != "mask"}
    assert np.asarray(dm.plot(without)).shape[0] < one.shape[0]  # no labels, no legend
