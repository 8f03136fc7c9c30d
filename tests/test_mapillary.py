import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import SAMPLES, needs_samples

from early_fusion_seg import MapillaryVistasDataModule
from early_fusion_seg.data.mapillary import fake_mapillary, read_config
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.labels import load_label_set


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A replica of the download of version 2.0."""
    return fake_mapillary(tmp_path_factory.mktemp("data") / "mapillary", images=2)


def by_config(indices: np.ndarray, config: Path) -> np.ndarray:
    """Number the evaluated labels in their order, using only the config file."""
    evaluated = [i for i, label in enumerate(json.loads(config.read_text())["labels"]) if label["evaluate"]]
    return np.array([[evaluated.index(i) if i in evaluated else 255 for i in row] for row in indices.tolist()])


@pytest.mark.parametrize(("version", "classes"), [(None, 116), ("v2.0", 116), ("v1.2", 65)])
def test_versions_in_the_download_of_version_2(both: Path, version: str | None, classes: int) -> None:
    dm = MapillaryVistasDataModule(both, version=version)
    found = version or "v2.0"
    sample = dm.dataset("val")[1]
    stored = np.asarray(Image.open(both / "validation" / found / "labels/va00000000000000000001.png"))
    np.testing.assert_array_equal(sample["mask"], by_config(stored, both / f"config_{found}.json"))
    assert (sample["key"], dm.found_version, dm.num_classes) == ("va00000000000000000001", found, classes)
    assert (dm.label_set.name, dm.absent, dm.pred_void) == (f"mapillary_{found}", "nan-skip", "drop")
    assert [len(dm.dataset(split)) for split in ("train", "val", "test", "predict")] == [2, 2, 2, 2]
    assert dm.dataset("predict")[0].keys() == {"key", "image"}


def test_the_download_of_version_1(tmp_path: Path) -> None:
    fake_mapillary(tmp_path, images=1, version="v1.1")
    dm = MapillaryVistasDataModule(tmp_path)
    assert (dm.found_version, dm.num_classes, dm.class_names[0]) == ("v1.1", 65, "Bird")
    stored = np.asarray(Image.open(tmp_path / "validation/labels/va00000000000000000000.png"))
    np.testing.assert_array_equal(dm.dataset("val")[0]["mask"], by_config(stored, tmp_path / "config.json"))


def test_config_file_defines_which_labels_are_evaluated(tmp_path: Path) -> None:
    fake_mapillary(tmp_path, images=1)
    path = tmp_path / "config_v2.0.json"
    config = json.loads(path.read_text())
    for i in (0, 1, 50):
        config["labels"][i]["evaluate"] = False
    config["labels"][31]["evaluate"] = True
    path.write_text(json.dumps(config))
    dm = MapillaryVistasDataModule(tmp_path)
    assert dm.num_classes == 114
    assert dm.class_names[0] == "Ambiguous Barrier"
    assert "Person Group" in dm.class_names
    stored = np.asarray(Image.open(tmp_path / "training/v2.0/labels/tr00000000000000000000.png"))
    mask = MapillaryVistasDataModule(tmp_path, train_transform=lambda **data: data).dataset("train")[0]["mask"]
    np.testing.assert_array_equal(mask, by_config(stored, path))


def test_missing_config_file_gives_a_warning_and_the_packaged_table(tmp_path: Path) -> None:
    fake_mapillary(tmp_path, images=1)
    for path in tmp_path.glob("config_*.json"):
        path.unlink()
    with pytest.warns(UserWarning, match=r"no config_v2.0.json.*mapillary_v2.0 of this package, a guess for 7"):
        assert MapillaryVistasDataModule(tmp_path).num_classes == 116
    with pytest.warns(UserWarning, match=r"no config_v1.2.json.*mapillary_v1.2 of this package$"):
        assert MapillaryVistasDataModule(tmp_path, version="v1.2").label_set == load_label_set("mapillary_v1.2")


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"labels": [{"readable": "Bird"}]}', '{"labels": []}', '{"labels": [3]}']
)
def test_error_names_the_invalid_config_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"config.json is not a config file of Mapillary Vistas .*zip file again"):
        read_config(path, "x")


def test_errors_name_missing_files(both: Path, tmp_path: Path) -> None:
    for use in (lambda dm: dm.label_set, lambda dm: dm.dataset("train")):
        with pytest.raises(MissingFileError, match=r"(?s)nowhere does not hold.*config_v2.0.json.*www.mapillary.com"):
            use(MapillaryVistasDataModule("nowhere"))
    with pytest.raises(UserError, match="expected one of"):
        MapillaryVistasDataModule(both, version="v3")
    fake_mapillary(tmp_path, images=2)
    (tmp_path / "training/v2.0/labels/tr00000000000000000001.png").unlink()
    with pytest.raises(
        MissingFileError, match=r"1 image.*tr00000000000000000001.jpg; expected .*v2.0/labels/\*.png; .*again"
    ):
        MapillaryVistasDataModule(tmp_path).dataset("train")


@needs_samples
def test_real_files() -> None:
    root = SAMPLES / "mapillary" / "crop100"
    real = read_config(SAMPLES / "mapillary" / "config_v1.1.json", "mapillary_v1.2")
    assert real == load_label_set("mapillary_v1.2")
    dm = MapillaryVistasDataModule(root, version="v1.2", train_transform=lambda **data: data)
    mask = dm.dataset("train")[0]["mask"]
    assert {dm.class_names[i] for i in mask.unique()} == {"Building", "Pole", "Street Light"}
    stored = np.asarray(Image.open(next((root / "training/v1.2/labels").glob("*.png"))))
    np.testing.assert_array_equal(mask, stored)  # only 65 is ignored
    newer = MapillaryVistasDataModule(root, train_transform=lambda **data: data)
    with pytest.warns(UserWarning, match="guess"):
        mask = newer.dataset("train")[0]["mask"]
    assert {newer.class_names[i] for i in mask.unique()} == {"Building", "Pole", "Street Light"}
