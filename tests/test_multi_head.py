"""Several heads on one encoder pass give the same bits as each model alone."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from early_fusion_seg import InferenceSettings, MultiHead, ReverseHRNetSeg
from early_fusion_seg.errors import UserError
from early_fusion_seg.inference import InputSize

DOCS = Path(__file__).parents[1] / "docs" / "inference.md"
RANDOM = {"encoder": "resnet18", "encoder_weights": "random"}


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 101, 3), np.uint8)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def heads() -> list[ReverseHRNetSeg]:
    """Models of other widths, plans, streams, classes and temperatures, each of which predicts several classes."""
    torch.manual_seed(0)
    models = [
        ReverseHRNetSeg(5, width=4, **RANDOM),
        ReverseHRNetSeg(3, width=8, plan="progressive", **RANDOM),
        ReverseHRNetSeg(5, width=4, extra_stream=False, **RANDOM),
    ]
    for model, temperature in zip(models, (1.0, 2.0, 0.5), strict=True):
        model.temperature = temperature
        with torch.no_grad():
            bias = model.network.head.classifiers["4"].bias
            bias -= model.eval()(to_tensor(pixels())).mean((0, 2, 3))
        model.train()
    return models


@pytest.fixture(scope="module")
def models() -> list[ReverseHRNetSeg]:
    return heads()


@pytest.fixture(scope="module")
def multi_head(models) -> MultiHead:
    return MultiHead(models)


@pytest.fixture
def image() -> np.ndarray:
    return pixels()


@pytest.mark.parametrize(
    "settings", [{}, {"flip": True, "scales": (0.5, 1.0)}, {"scale": 0.7, "window": 32, "overlap": 16}]
)
def test_each_head_gives_the_bits_of_its_model_and_the_encoder_runs_as_often_as_for_one(settings, image, monkeypatch):
    alone = heads()
    multi_head = MultiHead(heads())
    given: list[list[torch.Tensor]] = []
    for model in alone:
        model.inference = InferenceSettings(**settings)
        given.append([])
        model.network.encoder.register_forward_pre_hook(lambda _, x, seen=given[-1]: seen.append(x[0]))
    multi_head.inference = InferenceSettings(**settings)
    given.append([])
    (encoder,) = {model.network.encoder for model in multi_head.models}
    encoder.register_forward_pre_hook(lambda _, x, seen=given[-1]: seen.append(x[0]))
    found = multi_head.predict([image, image[:40]], probabilities=True)
    expected = [model.predict([image, image[:40]], probabilities=True) for model in alone]
    for i in range(2):
        assert [result.shape[0] for result in found[i]] == [5, 3, 5]
        for result, other in zip(found[i], expected, strict=True):
            np.testing.assert_array_equal(result, other[i])
    for one in given[:-1]:
        assert len(one) == len(given[-1]) > 1
        assert all(torch.equal(a, b) for a, b in zip(one, given[-1], strict=True))


def test_labels_are_those_of_each_model(models, multi_head, image):
    for labels, model in zip(multi_head.predict(image), models, strict=True):
        assert len(np.unique(labels)) > 1
        np.testing.assert_array_equal(labels, model.predict(image))


def test_the_modes_of_the_models_stay(models, multi_head, image):
    assert all(model.training for model in models)
    multi_head.predict(image)
    assert all(model.network.head.training for model in models)


def save(model: ReverseHRNetSeg, path: Path) -> Path:
    trainer = Trainer(max_epochs=0, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def test_checkpoints_of_other_encoders_are_refused_by_name(models, tmp_path):
    other = ReverseHRNetSeg(2, encoder="resnet10t", encoder_weights="random", width=4)
    paths = [save(models[0], tmp_path / "road.ckpt"), save(other, tmp_path / "defects.ckpt")]
    with pytest.raises(UserError, match=r"defects.ckpt has the encoder resnet10t .*road.ckpt has resnet18"):
        MultiHead.from_checkpoints(paths)
    loaded = MultiHead.from_checkpoints(paths[:1] * 2)
    assert loaded.names == [str(paths[0])] * 2


def test_other_input_sizes_of_training_are_refused_by_name_unless_one_is_given(image):
    models = heads()
    models[1].trained_at = InputSize(0.5)
    multi_head = MultiHead(models, ["a.ckpt", "b.ckpt", "c.ckpt"])
    with pytest.raises(UserError, match=r"b.ckpt was trained with scale 0.5, but a.ckpt with scale 1; give one input"):
        multi_head.predict(image)
    multi_head.inference = InferenceSettings(scale=0.5)
    labels = multi_head.predict(image)[1]
    np.testing.assert_array_equal(labels, models[1].predict(image))
    assert (labels != MultiHead(heads()).predict(image)[1]).any()


def test_an_ensemble_averages_the_probabilities(image):
    first, _, last = heads()
    expected = sum(model.predict(image, probabilities=True).astype(np.float32) for model in (first, last)) / 2
    multi_head = MultiHead([first, last])
    model = multi_head.ensemble()
    assert model is first
    np.testing.assert_allclose(model.predict(image, probabilities=True), expected, atol=1e-3)
    np.testing.assert_array_equal(model.plain_predictor().labels(to_tensor(image)), multi_head.predict(image)[0][None])
    assert (model.predict(image) != multi_head.predict(image)[0]).any()


def test_an_ensemble_of_other_classes_is_refused_and_none_is_trained(models):
    with pytest.raises(UserError, match="2 has the classes class 0, class 1, class 2, but 1 has"):
        MultiHead(models).ensemble()
    first, _, last = heads()
    model = MultiHead([first, last]).ensemble()
    with pytest.raises(UserError, match="trained one by one"):
        model.setup("fit")


def test_the_lines_of_the_documentation_run(models, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, model in zip(("road", "defects"), models, strict=False):
        save(model, Path(f"{name}.ckpt"))
    Image.fromarray(image).save("photo.png")
    Path("photo.png").rename("photo.jpg")  # without the losses of JPEG
    (block,) = re.findall(r"^```python\n(.*?MultiHead.*?)^```", DOCS.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, np.ndarray] = {}
    exec(block, found)
    for name, model in zip(("road", "defects"), heads(), strict=False):
        model.inference = InferenceSettings(flip=True)
        np.testing.assert_array_equal(found[name], model.predict(image))
