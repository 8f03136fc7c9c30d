"""A user's own albumentations transforms: the page that documents them, from YAML and from Python."""

import re
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_runs import QUICK, QUIET, TINY_MODEL
from torch import Tensor

from early_fusion_seg import CamVidDataModule, ReverseHRNetSeg
from early_fusion_seg.__main__ import main
from early_fusion_seg.data.dataset import SegmentationDataset, Source
from early_fusion_seg.errors import UserError

PAGE = Path(__file__).parents[1] / "docs" / "datasets.md"
FILL = {"fill": 255, "fill_mask": 255}


def documented(language: str) -> str:
    """The only code block in this language of the section "Your own augmentation"."""
    section = PAGE.read_text(encoding="utf-8").split("\n## Your own augmentation\n")[1].split("\n## ")[0]
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return str(block)


class Recorder:
    """Replace a step of the model by one that keeps the images and masks that it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        original = getattr(ReverseHRNetSeg, step)

        def keep(model: ReverseHRNetSeg, batch: dict[str, Any], index: int) -> Any:
            self.batches.append((batch["image"], batch["mask"]))
            return original(model, batch, index)

        monkeypatch.setattr(ReverseHRNetSeg, step, keep)


def is_gray(images: Tensor) -> bool:
    return torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])


@pytest.mark.usefixtures("elsewhere")
def test_the_documented_yaml_acts_on_training_and_validation(
    camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my.yaml").write_text(documented("yaml"), encoding="utf-8")
    command, *_ = documented("bash").splitlines()
    assert command == "early-fusion-seg fit --config camvid --config my.yaml --data.root CAMVID"
    plain = CamVidDataModule(camvid, num_workers=0).dataset("val")[0]
    assert not is_gray(plain["image"][None])
    training, validation = Recorder(monkeypatch, "training_step"), Recorder(monkeypatch, "validation_step")
    args = command.replace("CAMVID", str(camvid)).split()[1:]
    assert main([*args, "--data.batch_size=2", "--trainer.fast_dev_run=true", *TINY_MODEL, *QUICK, *QUIET]) == 0
    ((images, masks),) = training.batches
    assert images.shape == (2, 3, 352, 480)
    assert masks.shape == (2, 352, 480)
    assert is_gray(images)
    assert 255 in masks  # the images are smaller than the crop
    ((images, masks),) = validation.batches
    assert is_gray(images)
    assert torch.equal(masks[0], plain["mask"])  # untouched


@pytest.mark.usefixtures("elsewhere")
def test_the_documented_python_gives_the_same_samples_as_the_yaml(
    camvid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my.yaml").write_text(documented("yaml"), encoding="utf-8")
    Path("CAMVID").symlink_to(camvid)
    scope: dict[str, Any] = {}
    exec(documented("python"), scope)
    training = Recorder(monkeypatch, "training_step")
    args = ["fit", "--config=camvid", "--config=my.yaml", "--data.root=CAMVID", "--data.batch_size=3"]
    assert main([*args, "--trainer.fast_dev_run=true", *TINY_MODEL, *QUICK, *QUIET]) == 0
    dataset = scope["data"].dataset("train")
    samples = [dataset[0, position] for position in range(3)]
    ((images, masks),) = training.batches
    for sample in samples:
        same = [torch.equal(sample["image"], images[i]) and torch.equal(sample["mask"], masks[i]) for i in range(3)]
        assert same.count(True) == 1


@pytest.mark.usefixtures("elsewhere")
def test_a_run_with_own_transforms_can_be_repeated_from_its_configuration(camvid: Path) -> None:
    Path("my.yaml").write_text(documented("yaml").replace("352", "32").replace("480", "32"), encoding="utf-8")
    own = ["--config=camvid", "--config=my.yaml", f"--data.root={camvid}", "--data.batch_size=2"]
    rest = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", *TINY_MODEL, *QUICK, *QUIET]
    assert main(["fit", *own, *rest, "--output=first"]) == 0
    assert main(["fit", "--config=first/config.yaml", "--output=second"]) == 0
    weights = [
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in ("first", "second")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class GradientSource(Source):
    """One image that brightens to the right and downwards; its mask is its gray value in steps of 16."""

    def __len__(self) -> int:
        return 1

    def key(self, index: int) -> str:
        return "gradient"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows, cols = np.mgrid[:60, :90]
        gray = (rows + cols).astype(np.uint8)  # 0..148
        return np.stack([gray] * 3, -1), gray // 16


@pytest.mark.parametrize(
    "transform",
    [
        A.RandomCrop(40, 50),
        A.HorizontalFlip(p=1.0),
        A.Affine(rotate=(-20, 20), scale=(0.8, 1.2), shear=(-5, 5), **FILL, p=1.0),
        A.Compose(
            [
                A.RandomScale(scale_limit=(-0.5, 1.0), p=1.0),
                A.Affine(rotate=(-20, 20), **FILL, p=1.0),
                A.RandomCrop(40, 50, pad_if_needed=True, **FILL),
                A.OneOf([A.HorizontalFlip(p=1.0), A.VerticalFlip(p=1.0)], p=1.0),
            ]
        ),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_spatial_transforms_change_image_and_mask_together(transform: A.BasicTransform) -> None:
    whole = SegmentationDataset(GradientSource())[0]
    dataset = SegmentationDataset(GradientSource(), transform)
    for epoch in range(10):
        sample = dataset[epoch, 0]
        gray, mask = sample["image"][0].int(), sample["mask"].int()
        assert sample["image"].shape[1:] == mask.shape
        assert mask.shape != whole["mask"].shape or not torch.equal(mask, whole["mask"].int())
        filled = F.pad((mask == 255).float(), (2, 2, 2, 2), value=1.0)  # what lies beyond the edge may be filled too
        near_fill = F.max_pool2d(filled[None], 5, stride=1)[0] > 0  # gray is blended there
        inner = (gray % 16 > 3) & (gray % 16 < 12) & ~near_fill  # not where two labels meet
        assert inner.sum() > 200
        assert torch.equal(mask[inner], gray[inner] // 16)


def epochs(data: CamVidDataModule, count: int = 2) -> list[dict[str, tuple[bytes, bytes]]]:
    """The training images and masks of some epochs, by name."""
    loader, result = data.train_dataloader(), []
    for _ in range(count):
        samples = [zip(b["key"], b["image"], b["mask"], strict=True) for b in loader]
        result.append({key: (bytes(i.numpy()), bytes(m.numpy())) for batch in samples for key, i, m in batch})
    return result


def test_samples_differ_between_epochs_and_are_the_same_for_any_number_of_workers(camvid: Path) -> None:
    def own(workers: int) -> CamVidDataModule:
        transforms = [A.RandomCrop(24, 24), A.HorizontalFlip(), A.Affine(rotate=(-20, 20), **FILL, p=1.0)]
        return CamVidDataModule(camvid, batch_size=1, num_workers=workers, train_transform=A.Compose(transforms))

    first, second = alone = epochs(own(0))
    assert first.keys() == second.keys()
    assert len(first) == 3
    assert all(first[key] != second[key] for key in first)
    assert epochs(own(0)) == alone
    assert epochs(own(1)) == alone
    assert epochs(own(2)) == alone


@pytest.mark.parametrize("value", [0.5, 1 / 255, 256, -1])
def test_a_mask_that_does_not_hold_class_numbers_is_refused(value: float) -> None:
    def scaled(image: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": image, "mask": np.full(mask.shape, value)}

    with pytest.raises(UserError, match=r"mask of torch\.\w+ for .*, with values that are not whole numbers in 0"):
        SegmentationDataset(GradientSource(), scaled)[0]


def test_a_mask_of_whole_numbers_may_have_any_dtype() -> None:
    def as_floats(image: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": image, "mask": mask.astype(np.float32)}

    plain = SegmentationDataset(GradientSource())[0]["mask"]
    assert torch.equal(SegmentationDataset(GradientSource(), as_floats)[0]["mask"], plain)
