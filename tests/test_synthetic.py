import hashlib
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import PCG64, Generator

from early_fusion_seg.data.synthetic import SceneSource, SyntheticDataModule, street
from early_fusion_seg.data.synthetic.street import scene
from early_fusion_seg.data.synthetic.street_parts import band, disc, fraction, grain, limb, stripes
from early_fusion_seg.errors import UserError

HASH = "d20b8602e9341a06bf18665b6ecacb14fcf0bbe4be500a650c13ca25c3f783f5"  # of scene(2024, 96, 128)


def _digest(image, mask):
    return hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest()


def test_scene_is_the_same_on_every_machine():
    assert _digest(*scene(2024, 96, 128)) == HASH


def test_random_numbers_are_those_of_pcg64():
    words = PCG64(7).random_raw(3)
    draw = street._Draw(7)
    assert draw.below(1000) == words[0] % 1000
    assert draw.noise(2, 4).ravel().tolist() == [b / 256 for b in int(words[1]).to_bytes(8, "little")]
    assert 3 <= draw.between(3, 4) < 4
    uniform = np.array([draw.between(-1, 1) for _ in range(4000)])
    assert abs(uniform.mean()) < 0.03
    assert uniform.std() == pytest.approx(Generator(PCG64(0)).uniform(-1, 1, 100_000).std(), rel=0.03)


def test_seeds_give_different_scenes():
    assert len({_digest(*scene(seed, 16, 16)) for seed in range(50)}) == 50


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 70), st.integers(1, 90))
def test_any_seed_and_size_gives_a_scene(seed, height, width):
    image, mask = scene(seed, height, width)
    assert (image.dtype, image.shape) == (np.uint8, (height, width, 3))
    assert (mask.dtype, mask.shape) == (np.uint8, (height, width))
    assert mask.max() <= 10


def test_scene_is_similar_at_any_size():
    small, large = scene(5, 48, 64)[1], scene(5, 192, 256)[1]
    assert (small == large[1::4, 1::4]).mean() > 0.93


@pytest.mark.parametrize("arguments", [(-1, 8, 8), (0, 0, 8), (0, 8, -2)])
def test_invalid_seed_or_size_is_refused(arguments):
    with pytest.raises(UserError, match="expected a seed from 0 and a size from 1x1"):
        scene(*arguments)


def test_every_class_is_frequent_enough_to_be_learned():
    masks = np.stack([scene(seed, 96, 128)[1] for seed in range(60)])
    share = np.bincount(masks.ravel(), minlength=11) / masks.size
    assert len(share) == 11
    assert share.min() > 0.01, share
    assert share.max() < 0.35, share  # predicting one class everywhere gives a low score
    seen_in = [(masks == k).any((1, 2)).mean() for k in range(11)]
    assert min(seen_in) > 0.4, seen_in


def test_light_and_colors_vary_between_scenes():
    images = np.stack([scene(seed, 48, 64)[0] for seed in range(40)]).astype(float)
    mean_color = images.mean((1, 2))
    assert mean_color.mean(1).std() > 12  # brightness
    assert (mean_color - mean_color.mean(1, keepdims=True)).std() > 4  # tint
    assert images.std((1, 2, 3)).min() > 20  # every scene has contrast


def test_grain_is_one_uniform_value_per_cell():
    a, b = np.meshgrid(np.arange(-20, 20, 0.25, dtype=np.float32), np.arange(-20, 20, 0.25, dtype=np.float32))
    values = grain(a, b, salt=3)
    cells = values.reshape(40, 4, 40, 4)
    assert (cells == cells[:, :1, :, :1]).all()
    corners = cells[:, 0, :, 0]
    assert corners.min() >= 0
    assert corners.max() < 1
    assert corners.mean() == pytest.approx(0.5, abs=0.03)
    assert np.abs(np.corrcoef(corners[:, :-1].ravel(), corners[:, 1:].ravel())[0, 1]) < 0.1
    assert (grain(a, b, salt=4) != values).mean() > 0.9


def test_basic_shapes():
    u, v = np.meshgrid(np.linspace(0, 1, 201, dtype=np.float32), np.linspace(0, 1, 101, dtype=np.float32))
    assert disc(u, v, (0.5, 0.5), (0.3, 0.2)).mean() == pytest.approx(np.pi * 0.3 * 0.2, rel=0.03)
    stroke = np.pi * 0.1**2 + 0.2 * 0.4
    assert limb(u, v, (0.3, 0.5), (0.7, 0.5), 0.2).mean() == pytest.approx(stroke, rel=0.03)
    assert fraction(np.array([-0.25, 2.5], np.float32)).tolist() == [0.75, 0.5]
    assert stripes(np.array([-0.25, 0.25, 1.1], np.float32), 0.2).tolist() == [False, False, True]
    assert band(np.array([0, 1, 2], np.float32), 1, 2).tolist() == [False, True, False]


def test_splits_share_no_scene_for_any_seed():
    digests = [
        _digest(*source.read(i))
        for seed in (0, 1, 7)
        for split in ("train", "val", "test")
        for source in [SyntheticDataModule((12, 16), seed=seed).source(split)]
        for i in range(5)
    ]
    assert len(set(digests)) == len(digests)


def test_samples_have_the_format_of_the_data_modules():
    data = SyntheticDataModule((24, 40), train_scenes=3, val_scenes=2, test_scenes=1)
    assert data.class_names[:3] == ["Sky", "Building", "Pole"]
    assert data.num_classes == len(data.palette) == 11
    assert [len(data.dataset(split)) for split in ("train", "val", "test", "predict")] == [3, 2, 1, 1]
    sample = data.dataset("val")[1]
    assert sample["key"] == "scene000001"
    assert (sample["image"].dtype, sample["image"].shape) == (torch.uint8, (3, 24, 40))
    assert (sample["mask"].dtype, sample["mask"].shape) == (torch.uint8, (24, 40))
    image, mask = scene(2**20 + 1, 24, 40)
    assert np.array_equal(sample["image"].permute(1, 2, 0), image)
    assert np.array_equal(sample["mask"], mask)


def test_predict_gives_the_test_scenes_without_masks():
    data = SyntheticDataModule((24, 40), test_scenes=2)
    test, predict = data.dataset("test")[1], data.dataset("predict")[1]
    assert torch.equal(test["image"], predict["image"])
    assert "mask" not in predict


def test_worker_processes_give_batches():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = SyntheticDataModule((24, 40), train_scenes=4, batch_size=4, num_workers=1)
        (batch,) = data.train_dataloader()
    assert batch["image"].shape == (4, 3, 24, 40)
    assert sorted(batch["key"]) == [f"scene{i:06d}" for i in range(4)]


def test_training_scenes_are_only_flipped():
    dataset = SyntheticDataModule((24, 40), train_scenes=1).dataset("train")
    image, mask = scene(0, 24, 40)
    seen = set()
    for epoch in range(12):
        sample = dataset[(epoch, 0)]
        got = sample["image"].permute(1, 2, 0).numpy()
        flipped = not np.array_equal(got, image)
        assert np.array_equal(got, image[:, ::-1] if flipped else image)
        assert np.array_equal(sample["mask"], mask[:, ::-1] if flipped else mask)
        seen.add(flipped)
    assert seen == {True, False}


def test_crop_size_turns_on_the_default_augmentation_and_a_transform_replaces_it():
    assert SyntheticDataModule((24, 40), crop_size=16).dataset("train")[0]["image"].shape == (3, 16, 16)

    def dark(image, mask):
        return {"image": image // 2, "mask": mask}

    sample = SyntheticDataModule((24, 40), train_transform=dark).dataset("train")[0]
    assert np.array_equal(sample["image"].permute(1, 2, 0), scene(0, 24, 40)[0] // 2)


@pytest.mark.parametrize("count", [2, 2**18])  # few scenes are cached, many are not
def test_few_scenes_are_cached_and_the_cache_is_not_modified(count, monkeypatch):
    drawn = []

    def counted(*arguments):
        drawn.append(arguments)
        return scene(*arguments)

    monkeypatch.setattr("early_fusion_seg.data.synthetic.datamodule.scene", counted)
    source = SceneSource(first=10, count=count, size=(16, 24))
    first = source.read(1)
    expected = _digest(*first)
    for array in first:
        array[:] = 0
    assert _digest(*source.read(1)) == expected
    assert drawn == [(11, 16, 24)] * (1 if count == 2 else 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (0, 8)}, "height is 0; expected a whole number from 1"),
        ({"val_scenes": 0}, "val_scenes is 0"),
        ({"train_scenes": 2**21}, "train_scenes is 2097152"),
        ({"seed": -1}, "seed is -1; expected a whole number, 0 or higher"),
    ],
)
def test_error_names_the_setting_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        SyntheticDataModule(**settings)


@pytest.mark.slow
def test_a_pixel_classifier_on_color_and_position_fails():
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import jaccard_score
    from sklearn.neural_network import MLPClassifier

    data = SyntheticDataModule(train_scenes=600, test_scenes=100)
    (x, y), (x_test, y_test) = _pixels(data.source("train"), 400), _pixels(data.source("test"), 1000)
    mean, std = x.mean(0), x.std(0)
    classifier = MLPClassifier((64, 64), batch_size=1000, learning_rate_init=3e-3, max_iter=25, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # more iterations do not raise the score on unseen scenes
        classifier.fit((x - mean) / std, y)
    miou = jaccard_score(y_test, classifier.predict((x_test - mean) / std), average="macro")
    assert 0.15 < miou <= 0.35  # the lower bound shows that the classifier has learned something


def _pixels(source, per_scene):
    """Return random pixels as (r, g, b, x, y), and their classes."""
    generator = np.random.default_rng(0)
    features, classes = [], []
    for i in range(len(source)):
        image, mask = source.read(i)
        y, x = (generator.integers(0, side, per_scene) for side in mask.shape)
        features.append(np.column_stack([image[y, x], x, y]))
        classes.append(mask[y, x])
    return np.concatenate(features).astype(np.float32), np.concatenate(classes)
