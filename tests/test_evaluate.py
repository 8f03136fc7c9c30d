import glob
import importlib
import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from toy_folder import folder_data

from early_fusion_seg import (
    CityscapesDataModule,
    COCODataModule,
    FolderDataModule,
    MapillaryVistasDataModule,
    VOCDataModule,
)
from early_fusion_seg.__main__ import main
from early_fusion_seg.callbacks import PredictionWriter
from early_fusion_seg.cli.evaluate import find_predictions, score_folder
from early_fusion_seg.data import SegmentationDataModule
from early_fusion_seg.data.cityscapes import fake_cityscapes
from early_fusion_seg.data.coco.replica import fake_coco_stuff
from early_fusion_seg.data.folder import fake_folder
from early_fusion_seg.data.mapillary import fake_mapillary
from early_fusion_seg.data.voc import fake_voc
from early_fusion_seg.errors import MissingFileError, UserError

Masks = dict[str, np.ndarray]


def read(folder: Path, pattern: str) -> Masks:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob(pattern))}


def with_errors(masks: Masks, raw_ids: list[int], seed: int) -> Masks:
    """Make predictions: the ground truth with blocks of random labels."""
    rng = np.random.default_rng(seed)
    changed = {}
    for name, mask in masks.items():
        changed[name] = mask.copy()
        for _ in range(6):
            top, left = rng.integers(mask.shape[0]), rng.integers(mask.shape[1])
            changed[name][top : top + 15, left : left + 20] = rng.choice(raw_ids)
    return changed


def write(masks: Masks, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in masks.items():
        Image.fromarray(mask).save(folder / name)
    return folder


def compare(data: SegmentationDataModule, folder: Path, per_class: list[float], mean: float) -> None:
    scores = score_folder(data, "val", folder).compute()
    np.testing.assert_allclose(scores["per_class"], per_class, atol=1e-12, equal_nan=True)
    np.testing.assert_allclose(scores["miou"], mean, atol=1e-12, equal_nan=True)


CITYSCAPES = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


@pytest.mark.parametrize(("truth_ids", "predicted_ids"), [
    (range(34), range(34)),  # void in both
    ([7, 8, 11, 26], [7, 8, 11, 26]),  # classes absent from both
    ([7, 8, 0, 26], [7, 8, 26, 31, 0, 4]),  # a class that occurs in predictions only, and void predictions
])  # fmt: skip
def test_cityscapes_equals_cityscapesscripts(tmp_path: Path, truth_ids, predicted_ids) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the evaluator's imports
        official = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    fake_cityscapes(tmp_path, images=3)
    folder = tmp_path / "gtFine/val/frankfurt"
    truth = {n: np.array([*truth_ids], np.uint8)[m % len(truth_ids)] for n, m in read(folder, "*_labelIds.png").items()}
    write(truth, folder)
    predicted = write(with_errors(truth, [*predicted_ids], seed=1), tmp_path / "predicted")
    official.args.evalInstLevelScore, official.args.JSONOutput, official.args.quiet = False, False, True
    pairs = [sorted(glob.glob(str(f / "*_labelIds.png"))) for f in (predicted, folder)]  # noqa: PTH207 - the evaluator takes strings
    result = official.evaluateImgLists(*pairs, official.args)
    names = CityscapesDataModule(tmp_path).class_names
    compare(CityscapesDataModule(tmp_path), predicted, [result["classScores"][n] for n in names],
            result["averageScoreClasses"])  # fmt: skip


def counts(truth: Masks, predicted: Masks, size: int) -> np.ndarray:
    """Count pairs of labels, in plain numpy."""
    matrix = np.zeros((size, size), np.int64)
    for name in truth:
        np.add.at(matrix, (truth[name].astype(int).ravel(), predicted[name].astype(int).ravel()), 1)
    return matrix


def ious(matrix: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())


@pytest.mark.parametrize("absent", [False, True])
def test_mapillary_leaves_out_labels_that_are_not_evaluated(tmp_path: Path, absent: bool) -> None:
    fake_mapillary(tmp_path, images=3, version="v1.1")
    folder = tmp_path / "validation/labels"
    truth = read(folder, "*.png")
    if absent:
        truth = {name: np.where(mask < 20, 20, mask).astype(np.uint8) for name, mask in truth.items()}
        write(truth, folder)
    predicted = with_errors(truth, [3, 30, 40, 65], seed=2)
    assert any((mask == 65).any() for mask in predicted.values())
    iou = ious(counts(truth, predicted, 66)[:65, :65])  # only label 65 is not evaluated
    assert np.isnan(iou).any()
    compare(MapillaryVistasDataModule(tmp_path), write(predicted, tmp_path / "predicted"), iou, np.nanmean(iou))


@pytest.mark.parametrize("absent", [False, True])
def test_voc_is_the_plain_mean_and_rejects_void(tmp_path: Path, absent: bool) -> None:
    fake_voc(tmp_path, images=8)
    folder = tmp_path / "VOCdevkit/VOC2012/SegmentationClass"
    truth = read(folder, "2008*.png")
    if absent:
        truth = {name: np.where(mask == 20, 0, mask).astype(np.uint8) for name, mask in truth.items()}
        write(truth, folder)
    predicted = with_errors(truth, [0, 5, 7], seed=3)
    predicted = {n: np.where(truth[n] == 255, 0, np.minimum(m, 20)).astype(np.uint8) for n, m in predicted.items()}
    if absent:
        predicted = {n: np.where(m == 20, 1, m).astype(np.uint8) for n, m in predicted.items()}
    iou = ious(counts(truth, predicted, 256)[:21, :21])
    dm = VOCDataModule(tmp_path)
    compare(dm, write(predicted, tmp_path / "predicted"), iou, iou.mean())
    assert math.isnan(iou.mean()) == absent
    if absent:  # null in JSON
        assert main(["evaluate", "voc", "--data.root", str(tmp_path), "--predictions", str(tmp_path / "predicted"),
                     "--output", str(tmp_path / "out")]) == 0  # fmt: skip
        assert json.loads((tmp_path / "out/results.json").read_text())["miou"] is None
    name, mask = next(iter(predicted.items()))
    mask[truth[name] == 255] = 255  # the devkit refuses it anywhere in the file
    assert (mask == 255).any()
    write({name: mask}, tmp_path / "predicted")
    with pytest.raises(UserError, match=rf"{name} has \d+ void pixels"):
        score_folder(dm, "val", tmp_path / "predicted")


def test_coco_stuff_counts_only_classes_of_the_ground_truth(tmp_path: Path) -> None:
    fake_coco_stuff(tmp_path, images=3)
    folder = tmp_path / "stuffthingmaps/val2017"
    truth = {n: np.where((m < 60) & (m > 10), 0, m).astype(np.uint8) for n, m in read(folder, "*.png").items()}
    write(truth, folder)
    predicted = with_errors(truth, [0, 50, 100, 255], seed=4)  # 50 occurs in predictions only
    matrix = counts(truth, predicted, 256)[:255]
    in_truth = matrix.sum(1) > 0
    valid = matrix.copy()
    hit = valid[:, :255].diagonal()
    union = valid.sum(1) + valid[:, :255].sum(0) - hit
    mean = (hit[in_truth] / union[in_truth]).mean()
    scores = score_folder(COCODataModule(tmp_path), "val", write(predicted, tmp_path / "predicted")).compute()
    np.testing.assert_allclose(scores["miou"], mean, atol=1e-12)
    assert math.isnan(scores["per_class"][45])  # 50 less the ids 11, 25, 28, 29 and 44, which never occur
    np.testing.assert_allclose(scores["per_class"].nanmean(), mean)


def test_the_command_prints_and_writes_the_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_cityscapes(tmp_path, images=2)
    predicted = tmp_path / "predicted"
    write(read(tmp_path / "gtFine/val/frankfurt", "*_labelIds.png"), predicted)
    args = ["evaluate", "cityscapes", "--data.root", str(tmp_path), "--predictions", str(predicted)]
    assert main([*args, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "CityscapesDataModule val: 2 images" in printed
    assert "encoder" not in printed
    results = json.loads((tmp_path / "out/results.json").read_text())
    expected = {"miou": 1.0, "images": 2, "absent": "nan-skip", "pred_void": "fn", "encoder": None, "checkpoint": None}
    assert expected.items() <= results.items()
    assert results["predictions"] == str(predicted)
    as_train_ids = write(read(tmp_path / "gtFine/val/frankfurt", "*_labelTrainIds.png"), tmp_path / "train_ids")
    args[-1] = str(as_train_ids)
    assert main([*args, "--ids", "train"]) == 0
    assert "100.0" in capsys.readouterr().out
    assert main(args) == 2
    error = capsys.readouterr().err
    assert "labelTrainIds.png holds the label 255" in error
    assert "if these are train ids, give --ids train" in error


def test_wrong_folders_of_predictions_are_explained(tmp_path: Path) -> None:
    fake_cityscapes(tmp_path, images=2)
    dm = CityscapesDataModule(tmp_path)
    truth = read(tmp_path / "gtFine/val/frankfurt", "*_labelIds.png")
    with pytest.raises(MissingFileError, match="nowhere is not a folder; give the folder of the predictions"):
        score_folder(dm, "val", Path("nowhere"))
    one, two = ({name: mask} for name, mask in truth.items())
    folder = write(one, tmp_path / "predicted")
    with pytest.raises(MissingFileError, match=r"no prediction for 1 of 2 images; .* frankfurt_000001_000019.png"):
        score_folder(dm, "val", folder)
    write({name: mask[:, :100] for name, mask in two.items()}, folder)
    with pytest.raises(UserError, match=r"frankfurt_000001.* is 100x64 pixels .*; its ground truth is 128x64"):
        score_folder(dm, "val", folder)
    write(two, folder / "deeper")
    with pytest.raises(UserError, match="frankfurt_000001_000019 has 2 predictions"):
        score_folder(dm, "val", folder)
    with pytest.raises(UserError, match="test split has no labels"):
        score_folder(dm, "test", folder)


def test_predictions_are_found_by_key(tmp_path: Path) -> None:
    names = ["a_1.png", "deep/a_1_b_pred.png", "x.png", "a_1.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_predictions(tmp_path, ["a_1", "a_1_b"])
    assert found == {"a_1": tmp_path / "a_1.png", "a_1_b": tmp_path / "deep/a_1_b_pred.png"}


def test_predictions_are_found_with_suffixes_and_folders(tmp_path: Path) -> None:
    for name in ("masks/a/x.jpg.png", "masks/b/x.png", "masks/deep/y.png", "overlays/b/x.jpg.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    masks = tmp_path / "masks"
    expected = {"a/x": masks / "a/x.jpg.png", "b/x.jpg": masks / "b/x.png", "y": masks / "deep/y.png"}
    assert find_predictions(tmp_path, ["a/x", "b/x.jpg", "y"]) == expected


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()
    return folder


def test_predictions_are_found_in_any_unicode_form_and_case_of_the_suffix(tmp_path: Path) -> None:
    plain, apart = "caf\u00e9", "cafe\u0301"  # they look the same
    folder = touch(tmp_path, f"{apart}.PNG", f"b_{plain}.png")
    found = {plain: folder / f"{apart}.PNG", f"b_{apart}": folder / f"b_{plain}.png"}
    assert find_predictions(folder, [plain, f"b_{apart}"]) == found


def test_an_exact_name_is_preferred_and_belongs_to_its_own_image_alone(tmp_path: Path) -> None:
    folder = touch(tmp_path / "a", "shot_1.png", "shot_1_overlay.png", "shot_1_2.png", "shot_1_2_overlay.png")
    assert find_predictions(folder, ["shot_1"], ["shot_1_2"]) == {"shot_1": folder / "shot_1.png"}
    (folder / "shot_1.png").unlink()
    assert find_predictions(folder, ["shot_1"], ["shot_1_2"]) == {"shot_1": folder / "shot_1_overlay.png"}
    (folder / "shot_1_overlay.png").unlink()
    with pytest.raises(MissingFileError, match="no prediction for 1 of 1 images"):
        find_predictions(folder, ["shot_1"], ["shot_1_2.jpg"])


def test_predictions_of_all_splits_may_lie_in_one_folder(tmp_path: Path) -> None:
    data = FolderDataModule(folder_data(tmp_path / "data", {"train": ["a_1_2", "b"], "val": ["a_1", "b"]}))
    masks = tmp_path / "data/masks"
    assert float(score_folder(data, "val", masks).compute()["miou"]) == 1.0  # train/b.png is not that of val
    flat = write(read(masks / "train", "a*.png") | read(masks / "val", "*.png"), tmp_path / "flat")
    assert float(score_folder(data, "val", flat).compute()["miou"]) == 1.0
    (flat / "a_1.png").unlink()
    with pytest.raises(MissingFileError, match=r"no prediction for 1 of 2 images; expected, for example, a_1\.png"):
        score_folder(data, "val", flat)
    write(read(masks / "train", "*.png"), tmp_path / "other/train")
    with pytest.raises(MissingFileError, match="no prediction for 2 of 2"):
        score_folder(data, "val", tmp_path / "other")


SWAPPED = "0,1,ground,#404040\n1,0,plant,#dc3c3c"  # raw ids that are other train ids


@pytest.mark.parametrize("layout", ["run", "run/masks", "marked", "copy", "plain"])
def test_what_predict_wrote_is_read_as_train_ids(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = FolderDataModule(folder_data(tmp_path / "data", {"val": ["x", "y"]}, SWAPPED))
    predicted = PredictionWriter(tmp_path / "run")
    source = data.source("val")
    for i in range(2):
        image, truth = source.read(i)
        predicted.on_predict_batch_end(
            Trainer(accelerator="cpu", logger=False),
            SimpleNamespace(palette=data.palette),
            {"prediction": torch.from_numpy(truth)[None]},
            {"key": [f"{source.key(i)}.png"], "image": torch.from_numpy(image).permute(2, 0, 1)[None]},
        )
    shutil.copytree(tmp_path / "run/masks", tmp_path / "marked")
    copies = {"copy": lambda image: image, "plain": lambda image: Image.fromarray(np.asarray(image))}
    if layout in copies:
        (tmp_path / layout).mkdir()
        for path in (tmp_path / "run/masks").glob("*.png"):
            copies[layout](Image.open(path)).save(tmp_path / layout / path.name)
    args = ["evaluate", "folder", f"--data.root={data.root}", f"--predictions={tmp_path / layout}"]
    assert main(args) == 0
    printed = capsys.readouterr().out
    known = layout != "plain"  # gray, and elsewhere: nothing tells that these are train ids
    assert ("are read as train ids; --ids raw reads them as raw ids" in printed) == known
    assert ("mIoU 100.0" in " ".join(printed.replace("│", " ").split())) == known
    assert main([*args, "--ids=raw"]) == 0
    assert "mIoU 0.0" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    monkeypatch.chdir(tmp_path / "run/masks")
    assert float(score_folder(data, "val", Path()).compute()["miou"]) == 1.0


def test_raw_ids_in_the_colors_of_their_classes_are_raw_ids(tmp_path: Path) -> None:
    data = FolderDataModule(folder_data(tmp_path / "data", {"val": ["x"]}, SWAPPED))
    mask = Image.open(tmp_path / "data/masks/val/x.png")
    mask.putpalette([0x40, 0x40, 0x40, 0xDC, 0x3C, 0x3C])
    (tmp_path / "predicted").mkdir()
    mask.save(tmp_path / "predicted/x.png")
    assert float(score_folder(data, "val", tmp_path / "predicted").compute()["miou"]) == 1.0


@pytest.mark.parametrize(("output", "file"), [("scores", "scores/results.json"), ("new/a.json", "new/a.json")])
def test_output_is_a_folder_or_a_json_file(
    output: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_data(tmp_path / "data", {"val": ["x"]})
    args = ["evaluate", "folder", f"--data.root={data}", f"--predictions={data / 'masks/val'}"]
    assert main([*args, f"--output={tmp_path / output}"]) == 0
    assert f"written: {tmp_path / file}" in capsys.readouterr().out
    assert json.loads((tmp_path / file).read_text())["miou"] == 1.0


def test_the_ground_truth_of_a_folder_scores_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_folder(tmp_path / "data", images=2)
    args = ["evaluate", "folder", "--data.root", str(tmp_path / "data"), "--predictions"]
    assert main([*args, str(tmp_path / "data/masks/val")]) == 0
    assert "mIoU 100.0" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_train_ids_read_as_raw_ids_give_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_cityscapes(tmp_path, images=2)
    masks = read(tmp_path / "gtFine/val/frankfurt", "*_labelTrainIds.png")
    write({name: np.where(mask == 255, 0, mask) for name, mask in masks.items()}, tmp_path / "train_ids")
    args = ["evaluate", "cityscapes", "--data.root", str(tmp_path), "--predictions", str(tmp_path / "train_ids")]
    assert main(args) == 0
    assert (
        "% of the predicted pixels have ignored labels; if these are train ids, give --ids train"
        in capsys.readouterr().out
    )
    assert main([*args, "--ids", "train"]) == 0
    assert "give --ids" not in capsys.readouterr().out


@pytest.mark.parametrize(("args", "message"), [
    ([], "expected one of camvid, cityscapes"),
    (["imagenet"], "DATASET is 'imagenet'"),
    (["voc", "--predictions", "x"], "data.root"),
    (["coco", "--data.root", "x", "--predictions", "x", "--data.labels", "things"], "data.labels"),
    (["voc", "--data.root", "nowhere", "--predictions", "x"], "nowhere does not hold"),
])  # fmt: skip
def test_wrong_arguments_give_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *args]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "coco", "--help"])
    assert "--predictions" in capsys.readouterr().out


def test_one_class_is_scored_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder_data(tmp_path / "data", {"val": ["x"]}, "0,255,background,#000000\n1,0,cat,#dc3c3c")
    args = ["evaluate", "folder", f"--data.root={data}", f"--predictions={data / 'masks/val'}", "--output"]
    assert main([*args, str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["per_class"] == {"cat": 1.0}
    assert "cat" in capsys.readouterr().out


@pytest.mark.parametrize("absent", ["nan-skip", "zero"])
def test_a_split_without_a_labeled_pixel_has_no_score_and_says_so(
    absent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderDataModule, "absent", absent)
    data = folder_data(tmp_path / "data", {"val": ["x", "y"]}, "0,255,a,#000000\n1,255,b,#000000\n2,0,cat,#dc3c3c")
    args = ["evaluate", "folder", f"--data.root={data}", f"--predictions={data / 'masks/val'}", "--output"]
    with pytest.warns(UserWarning, match="the 2 images scored have no labeled pixel"):
        assert main([*args, str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text(), parse_constant=pytest.fail)
    assert [results[name] for name in ("miou", "pixel_accuracy", "mean_accuracy", "fw_iou")] == [None] * 4
    assert results["per_class"] == {"cat": None}
    assert not {"inf", "nan"} & set(capsys.readouterr().out.split())
