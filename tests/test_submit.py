import importlib
import json
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer
from PIL import ExifTags, Image
from pycocotools import mask as coder

from early_fusion_seg import (
    CityscapesDataModule,
    COCODataModule,
    MapillaryVistasDataModule,
    ReverseHRNetSeg,
    VOCDataModule,
)
from early_fusion_seg.__main__ import main
from early_fusion_seg.cli.evaluate import score_folder
from early_fusion_seg.cli.submit import problems
from early_fusion_seg.data import SegmentationDataModule
from early_fusion_seg.data.cityscapes import fake_cityscapes
from early_fusion_seg.data.coco.replica import fake_coco_stuff
from early_fusion_seg.data.coco.submission import stuff_entries
from early_fusion_seg.data.mapillary import fake_mapillary
from early_fusion_seg.data.voc import fake_voc

MAKE = {
    "cityscapes": (fake_cityscapes, CityscapesDataModule),
    "coco": (fake_coco_stuff, COCODataModule),
    "mapillary": (fake_mapillary, MapillaryVistasDataModule),
    "voc": (fake_voc, VOCDataModule),
}


def make(name: str, root: Path) -> SegmentationDataModule:
    write, kind = MAKE[name]
    return kind(write(root, images=2))


def write_truth(name: str, data: SegmentationDataModule, output: Path) -> Path:
    """Write the ground truth of val as a submission; void becomes class 0 where the server rejects void."""
    source = data.source("val")
    for i in range(len(source)):
        truth = source.read_labels(i)
        truth = np.where(truth == 255, 0, truth).astype(np.uint8) if name == "voc" else truth
        data.submission.write(data.submission.path(output, source.key(i)), truth, data.label_set)
    return data.submission.write_archive(output, [item.key for item in source.items])


def checkpoint(path: Path, names: list[str]) -> Path:
    model = ReverseHRNetSeg(class_names=names, encoder="resnet18", encoder_weights="random", width=4, blocks=1)
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def run(name: str, root: Path, ckpt: Path, output: Path) -> int:
    return main(["submit", name, "--data.root", str(root), "--ckpt_path", str(ckpt), "--output", str(output)])


def check(name: str, root: Path, place: Path, *more: str) -> int:
    return main(["submit", name, "--data.root", str(root), "--check", str(place), *more])


@pytest.mark.parametrize("name", MAKE)
def test_a_submission_is_written_checked_and_resumed(name: str, tmp_path: Path, capsys, monkeypatch) -> None:
    data = make(name, tmp_path / "data")
    ckpt, output = checkpoint(tmp_path / "model.ckpt", data.class_names), tmp_path / "out"
    assert run(name, tmp_path / "data", ckpt, output) == 0
    assert f"written: {output / data.submission.archive}" in "".join(capsys.readouterr().out.splitlines())
    assert check(name, tmp_path / "data", output) == 0
    assert "is ready to submit" in capsys.readouterr().out
    source = data.source("predict")
    paths = sorted((output / data.submission.folder).iterdir())
    assert [path.name for path in paths] == [f"{source.key(i)}.png" for i in range(2)]
    model = ReverseHRNetSeg.load_from_checkpoint(ckpt).eval()
    expected = data.label_set.decode(model.predict(source.items[1].image))
    with Image.open(paths[1]) as image:
        assert image.mode == ("P" if name == "voc" else "L")
        np.testing.assert_array_equal(image, expected)
        if name == "voc":
            assert image.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    paths[0].unlink()  # as after an interruption: existing PNGs are kept
    calls = []
    zeros = lambda self, image: calls.append(1) or np.zeros(image.shape[:2], np.uint8)  # noqa: E731 - used once
    monkeypatch.setattr(ReverseHRNetSeg, "predict", zeros)
    before = paths[1].stat().st_mtime_ns
    assert run(name, tmp_path / "data", ckpt, output) == 0
    assert (len(calls), paths[1].stat().st_mtime_ns) == (1, before)


@pytest.mark.parametrize("name", ["cityscapes", "mapillary", "voc"])
def test_the_ground_truth_as_a_submission_scores_one(name: str, tmp_path: Path) -> None:
    data = make(name, tmp_path / "data")
    archive = write_truth(name, data, tmp_path / "out")
    unpacked = tmp_path / "unpacked"
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(unpacked)
    else:
        with tarfile.open(archive) as opened:
            assert all(n.startswith("results/VOC2012/Segmentation/comp6_test_cls/2") for n in opened.getnames())
            opened.extractall(unpacked, filter="data")
    assert check(name, data.root, unpacked, "--split", "val") == 0
    scores = score_folder(data, "val", unpacked).compute()
    assert float(scores["per_class"].nanmean()) == 1.0


def test_the_ground_truth_of_cityscapes_scores_one_in_the_official_evaluator(tmp_path: Path) -> None:
    data = make("cityscapes", tmp_path / "data")
    write_truth("cityscapes", data, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the evaluator's imports
        official = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    official.args.evalInstLevelScore, official.args.JSONOutput, official.args.quiet = False, False, True
    official.args.predictionPath, official.args.predictionWalk = str(tmp_path / "out/labels"), None
    truth = sorted(str(path) for path in (tmp_path / "data/gtFine/val").rglob("*_labelIds.png"))
    predicted = [official.getPrediction(official.args, path) for path in truth]
    result = official.evaluateImgLists(predicted, truth, official.args)
    assert result["averageScoreClasses"] == 1.0


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # pycocotools' decode
def test_coco_results_hold_each_pixel_once_with_official_ids(tmp_path: Path) -> None:
    data = make("coco", tmp_path / "data")
    archive = write_truth("coco", data, tmp_path / "out")
    entries = json.loads(archive.read_text())
    source = data.source("val")
    for i in range(2):
        stored = np.asarray(Image.open(source.items[i].mask)).astype(int)
        decoded = np.zeros(stored.shape, int)
        covered = np.zeros(stored.shape, int)
        for entry in entries:
            if entry["image_id"] == int(source.key(i)):
                pixels = coder.decode(entry["segmentation"])
                decoded += pixels.astype(int) * entry["category_id"]
                covered += pixels
        assert (covered == 1).all()
        stuff = (stored >= 91) & (stored < 182)  # COCO ids from 92 on
        np.testing.assert_array_equal(decoded[stuff], stored[stuff] + 1)
        assert (decoded[stored < 91] == 183).all()
    assert check("coco", data.root, archive, "--split", "val") == 0


def gray(shape: tuple[int, int], value: int) -> Image.Image:
    return Image.fromarray(np.full(shape, value, np.uint8))


@pytest.mark.parametrize(("name", "damage", "message"), [
    ("cityscapes", lambda p: p.unlink(), "has no prediction for 1 of 2"),
    ("cityscapes", lambda p: gray((64, 127), 7).save(p), "is 127x64 pixels .* its image is 128x64"),
    ("cityscapes", lambda p: gray((64, 128), 34).save(p), "holds the labels 34, which"),
    ("cityscapes", lambda p: gray((64, 128), 7).convert("P").save(p), r"has the mode P; expected L \(gray"),
    ("cityscapes", lambda p: gray((64, 128), 7).convert("RGB").save(p), "has the mode RGB"),
    ("cityscapes", lambda p: p.write_bytes(b"no image"), "not an image"),
    ("voc", lambda p: gray((50, 60), 20).save(p), r"has the mode L; expected P \(indexed"),
    ("voc", lambda p: gray((50, 60), 255).convert("P").save(p), "holds the labels"),
    ("mapillary", lambda p: gray((60, 80), 124).save(p), "holds the labels 124"),
])  # fmt: skip
def test_problems_of_a_folder_are_reported(name: str, damage, message: str, tmp_path: Path, capsys) -> None:
    data = make(name, tmp_path / "data")
    write_truth(name, data, tmp_path / "out")
    assert check(name, data.root, tmp_path / "out", "--split", "val") == 0
    damage(sorted((tmp_path / "out" / data.submission.folder).iterdir())[1])
    capsys.readouterr()
    assert check(name, data.root, tmp_path / "out", "--split", "val") == 1
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if __import__("re").search(message, line)], printed
    assert "1 problem(s)" in printed


@pytest.mark.parametrize(("change", "message"), [
    (lambda entries: entries.pop(), "has masks of"),
    (lambda entries: [e for e in list(entries) if e["image_id"] == 0 and not entries.remove(e)], "lacks image 0"),
    (lambda entries: entries[0].update(category_id=91), "has the category 91; expected 92..183"),
    (lambda entries: [e["segmentation"].update(size=[1, 2]) for e in entries], "has masks of"),
    (lambda entries: entries[0].pop("image_id"), "cannot be read as COCO-Stuff's results"),
])  # fmt: skip
def test_problems_of_coco_results_are_reported(change, message: str, tmp_path: Path) -> None:
    data = make("coco", tmp_path / "data")
    archive = write_truth("coco", data, tmp_path / "out")
    entries = json.loads(archive.read_text())
    change(entries)
    archive.write_text(json.dumps(entries))
    found = list(problems(data.submission, data, data.source("val"), tmp_path / "out"))
    assert found
    assert any(message in line for line in found)


def test_many_problems_are_counted(tmp_path: Path, capsys) -> None:
    data = CityscapesDataModule(fake_cityscapes(tmp_path / "data", images=25))
    write_truth("cityscapes", data, tmp_path / "out")
    for path in (tmp_path / "out/labels").iterdir():
        gray((64, 128), 40).save(path)
    assert check("cityscapes", data.root, tmp_path / "out", "--split", "val") == 1
    printed = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert printed[20:] == ["and 5 more", f"{tmp_path / 'out'}: 25 problem(s)"]


def test_stuff_and_things() -> None:
    raw = np.array([[0, 90, 91, 181]])
    assert [entry["category_id"] for entry in stuff_entries(7, raw)] == [92, 182, 183]


@pytest.mark.parametrize(("args", "message"), [
    (["camvid"], "camvid has no test server; the data sets that have one are cityscapes"),
    (["coco", "--data.labels", "panoptic"], "give --data.labels stuff"),
    (["cityscapes", "--data.labels", "labelTrainIds"], "expects labelIds: omit --data.labels"),
    (["cityscapes"], "needs --ckpt_path FILE and --output FOLDER"),
])  # fmt: skip
def test_a_data_set_without_a_server_or_with_other_labels_is_refused(
    args, message: str, tmp_path: Path, capsys
) -> None:
    root = fake_cityscapes(tmp_path / "data", images=1)
    assert main(["submit", args[0], "--data.root", str(root), *args[1:]]) == 2
    assert message in capsys.readouterr().err


def test_files_of_two_checkpoints_are_never_mixed(tmp_path: Path, capsys) -> None:
    data = make("cityscapes", tmp_path / "data")
    ckpt, output = checkpoint(tmp_path / "model.ckpt", data.class_names), tmp_path / "out"
    assert run("cityscapes", data.root, ckpt, output) == 0
    ckpt.write_bytes(ckpt.read_bytes() + b"other")
    assert run("cityscapes", data.root, ckpt, output) == 2
    assert f"{output} holds files of another checkpoint" in capsys.readouterr().err
    (output / "checkpoint.sha256").unlink()
    assert run("cityscapes", data.root, ckpt, output) == 2
    assert f"{output} holds files that submit did not write" in capsys.readouterr().err


@pytest.mark.parametrize("name", MAKE)
def test_a_damaged_file_is_not_packed(name: str, tmp_path: Path, capsys) -> None:
    data = make(name, tmp_path / "data")
    ckpt, output = checkpoint(tmp_path / "model.ckpt", data.class_names), tmp_path / "out"
    assert run(name, data.root, ckpt, output) == 0
    damaged = sorted((output / data.submission.folder).iterdir())[0]
    damaged.write_bytes(b"no image")
    (output / data.submission.archive).unlink()
    capsys.readouterr()
    assert run(name, data.root, ckpt, output) == 1
    assert f"{damaged} is not an image" in capsys.readouterr().out
    assert not (output / data.submission.archive).exists()


def test_train_ids_are_not_ready_to_submit(tmp_path: Path, capsys) -> None:
    data = make("cityscapes", tmp_path / "data")
    write_to = tmp_path / "predicted"
    write_to.mkdir()
    for path in (tmp_path / "data/gtFine/val").rglob("*_labelTrainIds.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 255, 0, mask)).save(write_to / path.name)
    assert check("cityscapes", data.root, write_to, "--split", "val") == 1
    assert "these look like train ids" in capsys.readouterr().out


def test_an_output_that_cannot_be_written_gives_one_line(tmp_path: Path, capsys) -> None:
    data = make("cityscapes", tmp_path / "data")
    ckpt, output = checkpoint(tmp_path / "model.ckpt", data.class_names), tmp_path / "file"
    output.touch()
    assert run("cityscapes", data.root, ckpt, output) == 2
    printed = capsys.readouterr().err
    assert str(output) in printed
    assert "Traceback" not in printed


def test_a_checkpoint_of_other_classes_is_refused(tmp_path: Path, capsys) -> None:
    root = fake_cityscapes(tmp_path / "data", images=1)
    ckpt = checkpoint(tmp_path / "model.ckpt", ["a", "b"])
    assert run("cityscapes", root, ckpt, tmp_path / "out") == 2
    assert "class 0 is 'road' in the data, but 'a'" in capsys.readouterr().err


@pytest.mark.parametrize("name", MAKE)
def test_rotated_test_images_can_be_submitted(name: str, tmp_path: Path, capsys) -> None:
    data = make(name, tmp_path / "data")
    turned = data.source("predict").items[0].image
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(turned) as image:
        image.save(turned, exif=exif)
    ckpt, output = checkpoint(tmp_path / "model.ckpt", data.class_names), tmp_path / "out"
    assert run(name, data.root, ckpt, output) == 0, capsys.readouterr().out
    assert check(name, data.root, output) == 0


def test_predictions_of_other_splits_may_lie_beside_those_to_check(tmp_path: Path) -> None:
    data = make("mapillary", tmp_path / "data")
    write_truth("mapillary", data, tmp_path / "out")
    (tmp_path / "data/training/images" / f"{data.source('val').key(0)}_2.jpg").write_bytes(b"")
    (tmp_path / "data/training/v2.0/labels" / f"{data.source('val').key(0)}_2.png").write_bytes(b"")
    place = tmp_path / "out/labels"
    gray((8, 8), 0).save(place / f"{data.source('val').key(0)}_2.png")
    assert check("mapillary", data.root, place, "--split", "val") == 0
