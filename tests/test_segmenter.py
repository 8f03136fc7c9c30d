import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from early_fusion_seg.cli.load_model import check_hparams_match
from early_fusion_seg.data.camvid import CamVidDataModule
from early_fusion_seg.encoder import FrozenEncoder
from early_fusion_seg.encoder.encoder_checkpoint import ENCODER_PREFIX, FORMAT, read_checkpoint
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.optim import lr_factor
from early_fusion_seg.segmenter import ReverseHRNetSeg

SMALL = {"encoder": "resnet18", "encoder_weights": "random", "width": 8, "blocks": 1, "num_classes": 3}


class Stripes:
    """Images of horizontal stripes whose brightness is their class; the first two rows are ignored."""

    def __init__(self, n: int = 8) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, object]:
        rng = np.random.default_rng(index)
        mask = np.repeat(rng.integers(0, 3, (4, 1)), 32, axis=1).repeat(8, axis=0).astype(np.uint8)
        image = np.clip(mask[None] * 100 + rng.integers(0, 30, (3, 32, 32)), 0, 255).astype(np.uint8)
        mask[:2] = 255
        return {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask), "key": f"stripes-{index}"}


def loader(n: int = 8, batch_size: int = 4) -> DataLoader:
    return DataLoader(Stripes(n), batch_size=batch_size)


def trainer(folder: Path, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **(quiet | {"max_epochs": 1, "enable_checkpointing": False} | options))


def fitted(folder: Path, **options) -> tuple[ReverseHRNetSeg, Path]:
    torch.manual_seed(0)
    model = ReverseHRNetSeg(**(SMALL | {"warmup_steps": 2} | options))
    engine = trainer(folder)
    engine.fit(model, loader(), loader(2, 1))
    path = folder / "model.ckpt"
    engine.save_checkpoint(path)
    return model, path


def save(model: ReverseHRNetSeg, path: Path) -> Path:
    engine = trainer(path.parent)
    engine.strategy.connect(model)
    engine.save_checkpoint(path, weights_only=True)
    return path


@pytest.fixture(scope="module")
def fitted_random(tmp_path_factory) -> tuple[ReverseHRNetSeg, Path]:
    return fitted(tmp_path_factory.mktemp("random"))


@pytest.fixture
def encoder_file(tmp_path) -> Path:
    import timm

    torch.manual_seed(3)
    path = tmp_path / "encoder.safetensors"
    save_file(timm.create_model("resnet18", zero_init_last=False).state_dict(), path)
    return path


def same_output(a: ReverseHRNetSeg, b: ReverseHRNetSeg) -> bool:
    images = torch.randint(0, 256, (1, 3, 30, 50), dtype=torch.uint8)
    with torch.no_grad():
        return torch.equal(a.eval()(images), b.eval()(images))


# --- the network as a user calls it


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 61), (64, 64)])
@pytest.mark.parametrize("encoder", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_logits_have_the_size_of_the_image(size, encoder):
    model = ReverseHRNetSeg(**(SMALL | {"encoder": encoder})).eval()
    logits = model(torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8))
    assert logits.shape == (2, 3, *size)
    assert logits.isfinite().all()
    with pytest.raises(UserError, match=r"expected 0\.\.1"):
        model(torch.randn(2, 3, *size) * 5 + 3)


def test_predict_takes_arrays_images_and_paths(fitted_random, tmp_path):
    model, _ = fitted_random
    model.train()
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(array).save(path)
    with torch.no_grad():
        model.eval()
        expected = model(torch.from_numpy(array).permute(2, 0, 1)[None])[0].argmax(0).numpy()
        model.train()
    assert np.array_equal(model.predict(array), expected)
    several = model.predict([array, array / 255.0, Image.fromarray(array), path, str(path)])
    assert all(labels.dtype == np.uint8 and np.array_equal(labels, expected) for labels in several)
    assert model.predict(array[..., 0]).shape == (20, 30)
    assert model.training
    with pytest.raises(UserError, match="shape"):
        model.predict(array[None])


def test_predict_from_threads_changes_neither_labels_nor_the_model():
    model = ReverseHRNetSeg(**SMALL)  # in training mode, in which batch norms would use and change their statistics
    next(m for m in model.network.head.modules() if isinstance(m, nn.BatchNorm2d)).eval()  # as a user may do
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    images = list(np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), dtype=np.uint8))
    one_by_one = [model.predict(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(model.predict, images * 3))
    for labels, expected in zip(together, one_by_one * 3, strict=True):
        assert np.array_equal(labels, expected)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_tensor_is_one_image_or_a_batch_of_images(fitted_random, dtype):
    model, _ = fitted_random
    arrays = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    batch = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    batch = batch if dtype == torch.uint8 else batch.float() / 255
    expected = model.predict(list(arrays))
    assert np.array_equal(model.predict(batch[0]), expected[0])
    for several in (model.predict(batch), model.predict(list(batch)), model.predict(image for image in batch)):
        assert [np.array_equal(a, b) for a, b in zip(several, expected, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(20, 30, 3), r"shape \(20, 30, 3\); expected \(3, h, w\) or \(n, 3, h, w\)"),
        (torch.zeros(20, 30), r"expected \(3, h, w\)"),
        ([torch.zeros(1, 20, 30)], r"shape \(1, 20, 30\); expected \(3, h, w\)"),
        (np.zeros((2, 20, 30, 3)), "shape"),
        (torch.zeros(3, 20, 30, dtype=torch.int64), "expected uint8"),
        (7, "an image is a int; expected an array, a tensor, a PIL image or a path"),
        (None, "an image is a NoneType"),
        (b"image.png", "an image is a int"),
        ("https://example.org/a.jpg", "is a web address; download"),
        (Path(), r"is a folder; give a list of files"),
    ],
)
def test_what_is_no_image_is_refused(fitted_random, image, message):
    with pytest.raises(UserError, match=message):
        fitted_random[0].predict(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": None}, "give num_classes or class_names"),
        ({"class_names": ["a", "b"]}, "num_classes=3, but class_names has 2"),
        ({"num_classes": 256}, "256 classes; expected 1 to 255"),
        ({"palette": [[0, 0, 0]]}, "palette has 1 entries for 3 classes"),
        ({"class_weights": [1.0]}, "class_weights has 1 entries"),
    ],
)
def test_settings_that_disagree_on_the_classes_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ReverseHRNetSeg(**(SMALL | options))


def test_class_names_give_the_number_of_classes():
    model = ReverseHRNetSeg(**(SMALL | {"num_classes": None, "class_names": ["road", "sky"]}))
    assert (model.num_classes, model.class_names) == (2, ["road", "sky"])
    assert ReverseHRNetSeg(**SMALL).class_names == ["class 0", "class 1", "class 2"]


def test_a_model_for_a_data_module_has_its_classes_and_rules(camvid):
    data = CamVidDataModule(camvid)
    model = ReverseHRNetSeg.for_data(data, **(SMALL | {"num_classes": None}))
    assert (model.class_names, model.palette, model.ignore_index) == (data.class_names, data.palette, 255)
    assert model.hparams["absent"] == data.absent == model.metrics["val"].absent == "zero"


@pytest.mark.parametrize(("classes", "ignore_index"), [(10, 255), (11, 254)])
def test_data_with_other_classes_is_refused_before_training(camvid, tmp_path, classes, ignore_index):
    model = ReverseHRNetSeg(**(SMALL | {"num_classes": classes, "ignore_index": ignore_index}))
    message = f"has 11 classes and the ignore index 255, but the model has {classes} classes and {ignore_index};"
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(model, CamVidDataModule(camvid, num_workers=0))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((2, 32, 32), 3), "the label 3, but the model has 3 classes, 0 to 2, and 255 for ignored"),
        (torch.full((2, 32, 32), -1), "the label -1"),
        (torch.zeros(2, 32, 32), r"torch.float32 of the shape \(2, 32, 32\); expected integers"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), r"shape \(2, 1, 32, 32\)"),
        (torch.zeros(1, 32, 32, dtype=torch.uint8), "for 2 images"),
    ],
)
def test_masks_that_do_not_fit_the_model_are_refused(mask, message):
    batch = {"image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "mask": mask, "key": ["a", "b"]}
    with pytest.raises(UserError, match=message):
        ReverseHRNetSeg(**SMALL).training_step(batch, 0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_training_step_needs_no_trainer(dtype, tmp_path):
    batch = {"image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "key": ["a", "b"]}
    model = ReverseHRNetSeg(**SMALL)
    mask = torch.randint(0, 3, (2, 64, 64), dtype=dtype)
    mask[0] = 255
    loss = model.training_step(batch | {"mask": mask}, 0)
    expected = F.cross_entropy(model(batch["image"]), mask.long(), ignore_index=255)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    trainer(tmp_path, accumulate_grad_batches=2).fit(model, loader(), loader(2, 1))
    loss = model.train().training_step(batch | {"mask": mask}, 0)
    expected = F.cross_entropy(model(batch["image"]), mask.long(), ignore_index=255)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_head_does_not_depend_on_where_the_encoder_came_from(encoder_file):
    heads = []
    for weights in ("random", str(encoder_file)):
        torch.manual_seed(5)
        heads.append(ReverseHRNetSeg(**(SMALL | {"encoder_weights": weights})).network.head.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(heads[0].values(), heads[1].values(), strict=True))


# --- training


def test_fit_learns_and_does_not_change_the_frozen_encoder(tmp_path):
    torch.manual_seed(0)
    model = ReverseHRNetSeg(**(SMALL | {"lr": 5e-3, "warmup_steps": 2}))
    encoder = model.network.encoder
    before = encoder.fingerprint(), encoder.state_hash()
    head = [p.clone() for p in model.network.head.parameters()]
    engine = trainer(tmp_path, max_epochs=25, check_val_every_n_epoch=25)
    engine.fit(model, loader(), loader(4, 1))
    assert (encoder.fingerprint(), encoder.state_hash()) == before
    assert not [n for n, m in encoder.named_modules() if m.training]
    assert all(not torch.equal(a, b) for a, b in zip(head, model.network.head.parameters(), strict=True))
    assert engine.callback_metrics["val/mIoU"] > 0.75  # a constant prediction reaches 0.15
    assert engine.callback_metrics["val/pixel_accuracy"] > 0.85
    assert {"train/loss", "train/lr", "val/loss"} <= engine.callback_metrics.keys()
    validated = engine.callback_metrics["val/mIoU"].item()
    (scores,) = engine.test(model, loader(4, 1), verbose=False)
    assert scores["test/mIoU"] == validated
    assert int(model.metrics["test"].images) == 4


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"])
def test_a_head_on_a_frozen_vision_transformer_learns_and_its_checkpoint_is_loaded(tmp_path, encoder, precision):
    torch.manual_seed(0)
    model = ReverseHRNetSeg(**(SMALL | {"encoder": encoder, "lr": 5e-3, "warmup_steps": 2}))
    frozen = model.network.encoder
    before, losses = frozen.state_hash(), []
    model.on_train_batch_end = lambda *_: losses.append(model.trainer.callback_metrics["train/loss"].item())
    engine = trainer(tmp_path, max_epochs=8, limit_val_batches=0, precision=precision)
    engine.fit(model, loader(), loader(2, 1))
    assert np.mean(losses[-2:]) < 0.7 * np.mean(losses[:2])
    assert frozen.state_hash() == before
    engine.save_checkpoint(tmp_path / "model.ckpt")
    loaded = ReverseHRNetSeg.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.network.encoder.fingerprint() == frozen.fingerprint()
    assert same_output(loaded, model)


def test_an_unfrozen_encoder_is_fine_tuned(tmp_path):
    model = ReverseHRNetSeg(**(SMALL | {"freeze_encoder": False, "warmup_steps": 0}))
    before = model.network.encoder.fingerprint()
    trainer(tmp_path).fit(model, loader(), loader(2, 1))
    assert model.network.encoder.fingerprint() != before


def test_predictions_are_scored_at_the_size_of_the_ground_truth(fitted_random, tmp_path):
    model, _ = fitted_random
    trainer(tmp_path).validate(model, loader(3, 1), verbose=False)
    confusion = np.zeros((3, 3), np.int64)
    for sample in (Stripes(3)[i] for i in range(3)):
        with torch.no_grad():
            logits = model.eval().network(sample["image"][None])
        up = nn.functional.interpolate(logits, size=(32, 32), mode="bilinear").argmax(1)[0].numpy()
        mask = sample["mask"].numpy()
        np.add.at(confusion, (mask[mask != 255], up[mask != 255]), 1)
    assert np.array_equal(model.metrics["val"].confusion[:, :3].numpy(), confusion)


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 5.0]])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_loss_of_a_split_is_the_mean_over_its_labeled_pixels(tmp_path, weights, batch_size):
    model = ReverseHRNetSeg(**SMALL, class_weights=weights)
    batches = list(loader(3, batch_size))
    batches[0]["mask"][0, :20] = 255  # 12 rows are left
    engine = trainer(tmp_path)
    engine.validate(model, DataLoader(batches, batch_size=None), verbose=False)
    images, mask = (torch.cat([b[name] for b in batches]) for name in ("image", "mask"))
    with torch.no_grad():
        factors = None if weights is None else torch.tensor(weights)
        whole = nn.functional.cross_entropy(model.eval()(images), mask.long(), factors, ignore_index=255)
    assert engine.callback_metrics["val/loss"].item() == pytest.approx(whole.item())


def test_predict_step_skips_files_that_are_not_images(fitted_random):
    model, _ = fitted_random
    unreadable = {"key": ["a.txt"], "error": ["no image"]}
    assert model.predict_step(unreadable, 0) == unreadable
    assert model.predict_step({"key": []}, 0) == {"key": [], "error": []}  # a process without images
    images = torch.zeros(1, 3, 9, 7, dtype=torch.uint8)
    found = model.eval().predict_step({"key": ["a"], "image": images}, 0)
    assert {name: getattr(value, "shape", value) for name, value in found.items()} == {
        "key": ["a"],
        "prediction": (1, 9, 7),
        "confidence": (1, 9, 7),
    }
    model.predict_probabilities = True
    try:
        probabilities = model.predict_step({"key": ["a"], "image": images}, 0)["probabilities"].float()
    finally:
        model.predict_probabilities = False
    assert torch.equal(found["prediction"], probabilities.argmax(1).to(torch.uint8))
    assert torch.allclose(found["confidence"].float(), 255 * probabilities.amax(1), atol=0.7)


def test_a_loss_that_is_not_finite_raises_an_error_that_names_the_images(tmp_path):
    model = ReverseHRNetSeg(**SMALL)
    with torch.no_grad():
        model.network.head.classifiers["2"].bias.fill_(torch.nan)
    with pytest.raises(UserError, match=r"loss is nan at step 0, on the images stripes-0, .*stripes-3"):
        trainer(tmp_path).fit(model, loader(), loader(2, 1))


@pytest.mark.parametrize("encoder", ["resnet18", "vit_tiny_patch16_224"])
def test_a_batch_with_one_value_at_the_coarsest_stride_is_refused(tmp_path, encoder):
    model = ReverseHRNetSeg(**(SMALL | {"encoder": encoder}))
    with pytest.raises(UserError, match="raise crop_size or batch_size"):
        trainer(tmp_path).fit(model, loader(8, 1), loader(2, 1))
    image, mask = torch.zeros(1, 3, 32, 64, dtype=torch.uint8), torch.zeros(1, 32, 64, dtype=torch.uint8)
    longer = {"image": image, "mask": mask, "key": ["a"]}
    trainer(tmp_path, max_steps=1).fit(model, *[DataLoader([longer], batch_size=None)] * 2)
    assert model.trainer.global_step == 1


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("scaler", "clip", "fused"), [(None, None, True), (object(), None, False), (None, 1.0, False)])
def test_optimizers_are_fused_unless_losses_are_scaled_or_gradients_clipped(optimizer, scaler, clip, fused):
    model = ReverseHRNetSeg(**(SMALL | {"optimizer": optimizer}))
    plugin = SimpleNamespace(scaler=scaler)
    options = {"gradient_clip_val": clip, "estimated_stepping_batches": 10, "callbacks": []}
    model._trainer = SimpleNamespace(precision_plugin=plugin, **options)
    assert model.configure_optimizers()["optimizer"].defaults["fused"] is fused


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_can_be_clipped(tmp_path, optimizer, precision):
    model = ReverseHRNetSeg(**(SMALL | {"optimizer": optimizer}))
    engine = trainer(tmp_path, precision=precision, gradient_clip_val=1e-3, max_steps=2)
    engine.fit(model, loader(), loader(2, 1))
    assert engine.global_step == 2


def test_a_scheduler_of_accumulation_gives_the_same_steps(tmp_path):
    """With a different number of labeled pixels in each batch."""

    class FewLabels(Stripes):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            if index // 2 % 2:
                sample["mask"][4:] = 255
            return sample

    heads = []
    for options in ({"accumulate_grad_batches": 2}, {"callbacks": [GradientAccumulationScheduler({0: 2})]}):
        torch.manual_seed(0)
        model = ReverseHRNetSeg(**(SMALL | {"optimizer": "sgd", "lr": 1.0}))
        images = DataLoader(FewLabels(8), batch_size=2)
        trainer(tmp_path, limit_val_batches=0, **options).fit(model, images, loader(2, 1))
        heads.append(model.network.head.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(heads[0].values(), heads[1].values(), strict=True))


def test_the_learning_rate_reaches_0_with_a_scheduler_of_accumulation(tmp_path):
    model = ReverseHRNetSeg(**SMALL)
    engine = trainer(tmp_path, max_epochs=3, callbacks=[GradientAccumulationScheduler({0: 1, 2: 2})])
    engine.fit(model, loader(6, 2), loader(2, 1))
    assert engine.global_step == 3 + 3 + 2
    assert engine.optimizers[0].param_groups[0]["lr"] == 0


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (50, 5), (5, 1), (2000, 100)])
def test_warmup_takes_at_most_a_tenth_of_the_run(steps, warmup):
    factors = [lr_factor(step, steps, 100, "poly") for step in range(steps)]
    assert factors.index(max(factors)) == warmup - 1
    assert max(factors) > 0.9 or steps == 5


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_norms_and_biases_have_no_weight_decay(tmp_path, optimizer):
    model = ReverseHRNetSeg(**(SMALL | {"optimizer": optimizer, "weight_decay": 0.3}))
    engine = trainer(tmp_path, max_steps=1)
    engine.fit(model, loader(), loader(2, 1))
    assert type(engine.optimizers[0]) is (torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD)
    assert engine.optimizers[0].defaults.get("momentum") == (None if optimizer == "adamw" else 0.9)
    decayed, others = engine.optimizers[0].param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    convolutions = {m.weight for m in model.network.head.modules() if isinstance(m, nn.Conv2d)}
    assert set(decayed["params"]) == convolutions
    assert set(others["params"]) == set(model.network.head.parameters()) - convolutions


def test_a_trained_encoder_has_its_own_learning_rate(tmp_path):
    model = ReverseHRNetSeg(**(SMALL | {"freeze_encoder": False, "lr": 0.2, "encoder_lr": 0.1, "warmup_steps": 0}))
    engine = trainer(tmp_path, max_steps=2)
    engine.fit(model, loader(4, 2), loader(2, 1))
    encoder = {*model.network.encoder.parameters()}
    groups = engine.optimizers[0].param_groups
    assert [group["initial_lr"] for group in groups] == [0.2, 0.2, 0.1, 0.1]
    assert {p for group in groups[2:] for p in group["params"]} == encoder
    assert {p for group in groups[:2] for p in group["params"]} == {*model.parameters()} - encoder


@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_the_learning_rate_follows_the_schedule_at_each_step(tmp_path, schedule):
    model = ReverseHRNetSeg(**(SMALL | {"lr": 0.1, "schedule": schedule, "warmup_steps": 3, "optimizer": "sgd"}))
    rates = []
    model.on_train_batch_end = lambda *_: rates.append(model.trainer.callback_metrics["train/lr"].item())
    trainer(tmp_path, max_epochs=30, limit_val_batches=0).fit(model, loader(4), loader(2, 1))
    t = np.arange(30)
    down = (1 - t / 30) ** 0.9 if schedule == "poly" else 0.5 * (1 + np.cos(np.pi * t / 30))
    np.testing.assert_allclose(rates, 0.1 * down * np.minimum(1, (t + 1) / 3), rtol=1e-6)
    assert [lr_factor(t, 30, 3, schedule) for t in (30, 31)] == pytest.approx([0, 0], abs=1e-12)


def test_training_without_a_last_step_is_refused(tmp_path):
    with pytest.raises(UserError, match="max_epochs or max_steps"):
        trainer(tmp_path, max_epochs=-1, max_steps=-1).fit(ReverseHRNetSeg(**SMALL), loader(), loader(2, 1))


# --- checkpoints


def test_a_checkpoint_with_a_random_encoder_has_all_weights(fitted_random):
    model, path = fitted_random
    stored = torch.load(path, weights_only=True)
    assert "layer1.0.bn1.running_mean" in stored["encoder"]["state_dict"]  # timm's own, unfolded keys
    assert not [k for k in stored["state_dict"] if k.startswith(ENCODER_PREFIX)]
    loaded = ReverseHRNetSeg.load_from_checkpoint(path)
    assert loaded.training
    assert same_output(loaded, model)
    assert loaded.network.encoder.fingerprint() == model.network.encoder.fingerprint()


def test_a_checkpoint_holds_the_encoder_of_a_file(tmp_path, encoder_file):
    model, path = fitted(tmp_path, encoder_weights=str(encoder_file))
    moved = encoder_file.rename(tmp_path / "moved.safetensors")
    loaded = ReverseHRNetSeg.load_from_checkpoint(path)
    assert same_output(loaded, model)
    assert loaded.network.encoder.source == str(encoder_file)
    assert same_output(ReverseHRNetSeg.load_from_checkpoint(path, encoder_weights=str(moved)), model)


@pytest.mark.parametrize("save_encoder", [True, False])
def test_a_checkpoint_can_be_saved_after_the_source_of_the_encoder_has_gone(tmp_path, encoder_file, save_encoder):
    model = ReverseHRNetSeg(**(SMALL | {"encoder_weights": str(encoder_file), "save_encoder": save_encoder}))
    encoder_file.unlink()
    path = save(model, tmp_path / "model.ckpt")
    assert same_output(ReverseHRNetSeg.load_from_checkpoint(path), model)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": np.float64(1e-3), "weight_decay": np.float32(0.5), "warmup_steps": np.int64(3)},
        {"num_classes": np.int64(3), "width": np.int32(8), "compile": np.bool_(False), "ignore_index": np.uint8(255)},
        {"num_classes": None, "class_names": np.array(["a", "b", "c"])},
        {"palette": np.zeros((3, 3), np.uint8), "class_weights": np.ones(3), "loss": {"dice": np.float64(1)}},
        {"class_weights": torch.ones(3), "blocks": (0, 0, 1, 1, 1), "hr_modules": np.array([1, 0, 0, 0, 0])},
        {"encoder_weights": Path("encoder.safetensors")},
    ],
    ids=lambda options: "-".join(options),
)
def test_settings_from_numpy_torch_and_pathlib_are_stored_as_plain_types(tmp_path, options, encoder_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ReverseHRNetSeg(**(SMALL | options))
    path = save(model, tmp_path / "model.ckpt")
    assert same_output(ReverseHRNetSeg.load_from_checkpoint(path), model)
    json.dumps(torch.load(path, weights_only=True)["hyper_parameters"])
    json.dumps([model.class_names, model.palette])


def test_numbers_from_numpy_in_data_modules_and_callbacks_are_stored_as_plain_types(camvid, tmp_path):
    data = CamVidDataModule(camvid, batch_size=np.int64(2), crop_size=np.array([32, 32]), num_workers=0)
    stopping = EarlyStopping("val/loss", patience=np.int64(3), min_delta=np.float64(0.1))
    engine = trainer(tmp_path, callbacks=[stopping])
    model = ReverseHRNetSeg.for_data(data, **(SMALL | {"num_classes": None}))
    engine.fit(model, data)
    engine.save_checkpoint(tmp_path / "model.ckpt")
    stored = read_checkpoint(tmp_path / "model.ckpt")
    assert stored["CamVidDataModule"]["train"]["batch_size"] == 2
    assert same_output(ReverseHRNetSeg.load_from_checkpoint(tmp_path / "model.ckpt"), model)


def test_a_setting_that_is_no_plain_type_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r"lr is a builtins\.object; expected a number"):
        ReverseHRNetSeg(**(SMALL | {"lr": object()}))

    class Extended(ReverseHRNetSeg):
        def __init__(self, tool: object, **options: Any) -> None:
            super().__init__(**options)
            self.save_hyperparameters()

    with pytest.raises(UserError, match=r"tool is a builtins\.object"):
        trainer(tmp_path).fit(Extended(object(), **SMALL), loader())


def test_a_subclass_with_other_arguments_is_loaded(tmp_path):
    class Wide(ReverseHRNetSeg):
        def __init__(self, scale: int) -> None:
            super().__init__(**(SMALL | {"width": 8 * scale}))

    model = Wide(scale=2)
    path = save(model, tmp_path / "model.ckpt")
    assert same_output(Wide.load_from_checkpoint(path), model)


def test_a_checkpoint_of_a_newer_version_is_refused_by_name(tmp_path):
    model = ReverseHRNetSeg(**SMALL)
    path = save(model, tmp_path / "model.ckpt")
    stored = torch.load(path, weights_only=True)
    assert stored["format"] == FORMAT
    torch.save(stored | {"format": FORMAT + 1}, path)
    with pytest.raises(UserError, match=rf"model\.ckpt has the checkpoint format {FORMAT + 1}, but .* up to {FORMAT};"):
        ReverseHRNetSeg.load_from_checkpoint(path)
    with pytest.raises(UserError, match=f"checkpoint format {FORMAT + 1}"):
        trainer(tmp_path).validate(model, loader(2, 1), ckpt_path=path, verbose=False)
    stored["hyper_parameters"]["context"] = "ocr"
    torch.save(stored, path)
    with pytest.raises(UserError, match="has the model setting 'context', which this version"):
        ReverseHRNetSeg.load_from_checkpoint(path)


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "checkpoints").glob("*.ckpt")), ids=lambda p: p.stem)
def test_checkpoints_of_all_formats_are_read(path):
    """Written by earlier versions: `format_N.ckpt` has labels of this image beside its own entries."""
    stored = torch.load(path, weights_only=True)
    expected = stored["expected_labels"].numpy()
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    labels = ReverseHRNetSeg.load_from_checkpoint(path).predict(image)
    assert (labels != expected).mean() < 0.01  # other processors round differently
    assert len(np.unique(expected)) > 1


def test_a_checkpoint_without_a_setting_that_came_later_has_its_default(tmp_path):
    model = ReverseHRNetSeg(**SMALL)
    stored = torch.load(save(model, tmp_path / "model.ckpt"), weights_only=True)
    del stored["hyper_parameters"]["label_smoothing"]
    torch.save(stored, tmp_path / "older.ckpt")
    assert same_output(ReverseHRNetSeg.load_from_checkpoint(tmp_path / "older.ckpt"), model)
    check_hparams_match(dict(model.hparams), stored["hyper_parameters"], "older.ckpt")
    with pytest.raises(UserError, match=r"model\.label_smoothing is 0\.1, but 0\.0 in older\.ckpt"):
        check_hparams_match({"label_smoothing": 0.1}, stored["hyper_parameters"], "older.ckpt")


@pytest.mark.parametrize("encoder", ["resnet18", "vit_tiny_patch16_224"])
def test_a_fine_tuned_encoder_is_stored_and_can_be_saved_again(tmp_path, encoder):
    model, path = fitted(tmp_path, freeze_encoder=False, encoder=encoder)
    assert model.network.encoder.fingerprint() != FrozenEncoder(encoder, "random").fingerprint()
    loaded = ReverseHRNetSeg.load_from_checkpoint(path)
    assert same_output(loaded, model)
    assert loaded.network.encoder.source == "fine-tuned from random"
    again = save(loaded, tmp_path / "again.ckpt")
    again_loaded = ReverseHRNetSeg.load_from_checkpoint(again)
    assert same_output(again_loaded, model)
    assert again_loaded.network.encoder.source == "fine-tuned from random"


def test_an_encoder_fine_tuned_from_a_file_is_stored_and_resumed(tmp_path, encoder_file):
    model, path = fitted(tmp_path, freeze_encoder=False, encoder_weights=str(encoder_file))
    fingerprint = model.network.encoder.fingerprint()
    start = ReverseHRNetSeg(**(SMALL | {"freeze_encoder": False, "encoder_weights": str(encoder_file)}))
    assert start.network.encoder.fingerprint() != fingerprint
    trainer(tmp_path).validate(start, loader(2, 1), ckpt_path=path, verbose=False)
    assert start.network.encoder.fingerprint() == fingerprint
    encoder_file.unlink()
    loaded = ReverseHRNetSeg.load_from_checkpoint(path)
    assert loaded.network.encoder.source == f"fine-tuned from {encoder_file}"


def test_a_loaded_model_is_saved_with_all_weights_license_and_source(fitted_random, tmp_path):
    model, path = fitted_random
    stored = torch.load(path, weights_only=True)
    stored["encoder"]["license"] = "cc-by-nc-4.0"
    torch.save(stored, tmp_path / "licensed.ckpt")
    loaded = ReverseHRNetSeg.load_from_checkpoint(tmp_path / "licensed.ckpt")
    save(loaded, tmp_path / "again.ckpt")
    again = ReverseHRNetSeg.load_from_checkpoint(tmp_path / "again.ckpt")
    assert same_output(again, model)
    assert (again.network.encoder.license, again.network.encoder.source) == ("cc-by-nc-4.0", "random")


class Explosive:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_checkpoint_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder": {}, "hyper_parameters": {}, "state_dict": Explosive()}, "evil.ckpt")
    with pytest.raises(UserError, match=r"evil\.ckpt holds a \w+\.mkdir; only tensors and plain types are read"):
        read_checkpoint("evil.ckpt")
    assert not Path("exploded").exists()


def test_an_error_about_another_encoder_names_both(fitted_random, tmp_path, encoder_file):
    _, path = fitted_random
    with pytest.raises(UserError, match=r"resnet18 \(random.* this model has mobilenetv3_small_050 \(random"):
        ReverseHRNetSeg.load_from_checkpoint(path, encoder="mobilenetv3_small_050", encoder_weights="random")
    with pytest.raises(UserError, match=r"resnet18 \(random.* this model has resnet18 \(.*encoder\.safetensors"):
        ReverseHRNetSeg.load_from_checkpoint(path, encoder_weights=str(encoder_file))


def test_a_random_encoder_of_another_machine_is_loaded_from_the_checkpoint(fitted_random, tmp_path):
    model, path = fitted_random
    stored = torch.load(path, weights_only=True)
    stored["encoder"]["state_dict"]["conv1.weight"] *= 1 + 1e-6
    again = ReverseHRNetSeg(**SMALL)
    again.network.encoder.load_timm_state_dict(stored["encoder"]["state_dict"])
    stored["encoder"]["fingerprint"] = again.network.encoder.fingerprint()
    torch.save(stored, tmp_path / "elsewhere.ckpt")
    fresh = ReverseHRNetSeg(**SMALL)
    trainer(tmp_path).validate(fresh, loader(2, 1), ckpt_path=tmp_path / "elsewhere.ckpt", verbose=False)
    assert fresh.network.encoder.fingerprint() == stored["encoder"]["fingerprint"]
    assert fresh.network.encoder.fingerprint() != model.network.encoder.fingerprint()


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_missing_and_unexpected_head_keys_are_refused(fitted_random, tmp_path, change):
    _, path = fitted_random
    stored = torch.load(path, weights_only=True)
    if change == "missing":
        del stored["state_dict"]["network.head.classifiers.2.bias"]
    else:
        stored["state_dict"]["network.head.unexpected"] = torch.zeros(1)
    torch.save(stored, tmp_path / "changed.ckpt")
    with pytest.raises(UserError, match=r"changed\.ckpt does not fit the model"):
        ReverseHRNetSeg.load_from_checkpoint(tmp_path / "changed.ckpt")
    with pytest.raises(RuntimeError, match=r"network\.head\.(classifiers\.2\.bias|unexpected)"):
        trainer(tmp_path).validate(ReverseHRNetSeg(**SMALL), loader(2, 1), ckpt_path=tmp_path / "changed.ckpt")


def test_a_truncated_missing_remote_or_foreign_checkpoint_is_refused(fitted_random, tmp_path):
    _, path = fitted_random
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(path.read_bytes()[:1000])
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(UserError, match=r"truncated\.ckpt is damaged"):
        ReverseHRNetSeg.load_from_checkpoint(truncated)
    with pytest.raises(UserError, match=r"foreign\.ckpt was not written by"):
        read_checkpoint(foreign)
    with pytest.raises(UserError, match="remote address"):
        ReverseHRNetSeg.load_from_checkpoint("https://example.org/model.ckpt")
    with pytest.raises(MissingFileError, match="there is no checkpoint"):
        ReverseHRNetSeg.load_from_checkpoint(tmp_path / "missing.ckpt")
    with pytest.raises(UserError, match="no entry 'encoder'"):
        ReverseHRNetSeg(**SMALL).on_load_checkpoint({"state_dict": {}})


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    torch.manual_seed(0)
    uninterrupted = ReverseHRNetSeg(**(SMALL | {"warmup_steps": 2}))
    start = {k: v.clone() for k, v in uninterrupted.network.head.state_dict().items()}
    trainer(tmp_path, max_epochs=2).fit(uninterrupted, loader(), loader(2, 1))

    class StopError(Exception):
        pass

    first = ReverseHRNetSeg(**(SMALL | {"warmup_steps": 2}))
    first.network.head.load_state_dict(start)
    engine = trainer(tmp_path, max_epochs=2)

    def on_train_epoch_end() -> None:
        engine.save_checkpoint(tmp_path / "half.ckpt")
        raise StopError

    first.on_train_epoch_end = on_train_epoch_end
    with pytest.raises(StopError):
        engine.fit(first, loader(), loader(2, 1))
    second = ReverseHRNetSeg(**(SMALL | {"warmup_steps": 2}))
    trainer(tmp_path, max_epochs=2).fit(second, loader(), loader(2, 1), ckpt_path=tmp_path / "half.ckpt")
    for a, b in zip(uninterrupted.network.head.parameters(), second.network.head.parameters(), strict=True):
        assert torch.equal(a, b)


# --- options that must not change the result


def heads_after(folder: Path, model: dict[str, object], **options: object) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = ReverseHRNetSeg(**(SMALL | {"warmup_steps": 2} | model))
    trainer(folder, **options).fit(made, loader(16), loader(2, 1))
    return [p.detach().clone() for p in made.network.head.parameters()]


def test_activation_checkpointing_does_not_change_training(tmp_path):
    plain, checkpointed = (heads_after(tmp_path, {"activation_checkpointing": r}) for r in (False, True))
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradient_clipping_limits_the_step(tmp_path):
    model = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0, "warmup_steps": 0}
    torch.manual_seed(0)
    before = [p.detach().clone() for p in ReverseHRNetSeg(**(SMALL | model)).network.head.parameters()]
    lengths = []
    for clip in (None, 0.01):
        after = heads_after(tmp_path, model, max_steps=1, max_epochs=-1, gradient_clip_val=clip)
        lengths.append(float(torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm()))
    assert lengths[0] > 0.02
    assert lengths[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore")  # warnings of torch.compile
@pytest.mark.parametrize("encoder", ["resnet18", "vit_tiny_patch16_224"])
def test_a_compiled_network_trains_the_same_and_its_checkpoint_loads_without_compiling(tmp_path, encoder):
    plain, _ = fitted(tmp_path, optimizer="sgd", encoder=encoder)
    compiled, path = fitted(tmp_path, optimizer="sgd", encoder=encoder, compile=True)
    assert compiled.network.head._compiled_call_impl is not None
    assert compiled.network.encoder._compiled_call_impl is not None
    assert not [key for key in torch.load(path, weights_only=True)["state_dict"] if "_orig_mod" in key]
    for a, b in zip(plain.network.head.parameters(), compiled.network.head.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    loaded = ReverseHRNetSeg.load_from_checkpoint(path)
    assert loaded.network.head._compiled_call_impl is None


# --- precision


@pytest.fixture(scope="module")
def well_trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    torch.manual_seed(0)
    model = ReverseHRNetSeg(**(SMALL | {"lr": 5e-3, "warmup_steps": 2}))
    engine = trainer(folder, max_epochs=60, check_val_every_n_epoch=60)
    engine.fit(model, loader(), loader(2, 1))
    engine.save_checkpoint(folder / "model.ckpt")
    return folder / "model.ckpt"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_scores_in_low_precision_equal_those_in_float32(well_trained, tmp_path, precision):
    scores, types = {}, {}
    for kind in ("32-true", precision):
        model = ReverseHRNetSeg.load_from_checkpoint(well_trained)
        seen = types.setdefault(kind, [])
        model.network.encoder.register_forward_hook(lambda _, __, out, s=seen: s.append({m.dtype for m in out}))
        engine = trainer(tmp_path, precision=kind)
        engine.validate(model, loader(160), verbose=False)
        scores[kind] = {name: value.item() for name, value in engine.callback_metrics.items()}
        assert model.metrics["val"].confusion.dtype == torch.int64
    assert scores["32-true"]["val/mIoU"] > 0.5
    for name in ("val/mIoU", "val/pixel_accuracy"):
        assert scores[precision][name] == pytest.approx(scores["32-true"][name], abs=0.002)
    assert scores[precision]["val/loss"] == pytest.approx(scores["32-true"]["val/loss"], rel=0.01)
    assert types[precision][0] == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.filterwarnings("ignore:You passed `Trainer.accelerator='cpu', precision='16-mixed'")  # uses bf16
def test_low_precision_training_with_an_unlabeled_batch_and_loading_its_checkpoint(tmp_path, precision):
    torch.manual_seed(0)
    model = ReverseHRNetSeg(**(SMALL | {"warmup_steps": 0}))
    batches = list(loader(8))
    batches[0]["mask"][:] = 255
    engine = trainer(tmp_path, precision=precision)
    engine.fit(model, DataLoader(batches, batch_size=None), loader(2, 1))
    assert all(bool(p.isfinite().all()) for p in model.network.head.parameters())
    assert engine.callback_metrics["train/loss"].isfinite()
    path = tmp_path / "low.ckpt"
    engine.save_checkpoint(path)
    for other in ("32-true", "bf16-true"):
        fresh = trainer(tmp_path, precision=other)
        fresh.validate(ReverseHRNetSeg(**SMALL), loader(2, 1), ckpt_path=path, verbose=False)
        assert fresh.callback_metrics["val/mIoU"].isfinite()
    assert ReverseHRNetSeg.load_from_checkpoint(path).predict(np.zeros((9, 7, 3), np.uint8)).shape == (9, 7)


def test_training_and_evaluation_need_no_float64_on_the_device(tmp_path, device_without_float64):
    with device_without_float64:
        model = ReverseHRNetSeg(**SMALL, loss={"cross_entropy": 1.0, "ohem": 1.0, "dice": 1.0}, label_smoothing=0.1)
        engine = trainer(tmp_path, accumulate_grad_batches=2)
        engine.fit(model, loader(), loader(2, 1))
        engine.test(model, loader(2, 1), verbose=False)
    assert engine.global_step == 1
