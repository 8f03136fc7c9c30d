"""Exported files against the model, on sizes that exporters get wrong; see also test_same_padding.py."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from early_fusion_seg import ReverseHRNetSeg
from early_fusion_seg.__main__ import main
from early_fusion_seg.cli import export as command
from early_fusion_seg.errors import UserError
from early_fusion_seg.export import graph, metadata, onnx, parity, program
from early_fusion_seg.inference import InferenceSettings, InputSize
from early_fusion_seg.segmenter import predictor_of_heads

try:
    import onnx as onnx_package
    import onnxruntime
    import onnxscript  # noqa: F401  # torch.onnx imports it
except ImportError:
    pytest.skip("export to ONNX needs the extra onnx", allow_module_level=True)
if tuple(map(int, torch.__version__.split(".")[:2])) < graph.LOWEST_TORCH:
    pytest.skip("export needs a newer PyTorch", allow_module_level=True)

EXAMPLES = Path(__file__).parents[1] / "examples" / "deploy"
SIZES = ((1, 1, 1), (1, 5, 33), (3, 17, 31), (1, 32, 64), (1, 63, 129), (1, 225, 130), (1, 9, 2051))
ENCODERS = (
    "resnet50", "tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto", "regnety_002",
    "vit_tiny_patch16_224",
)  # fmt: skip
# the exporters warn of what they call themselves
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::DeprecationWarning:onnxscript")


def build(encoder: str = "resnet18", **options: object) -> ReverseHRNetSeg:
    """Make a model whose logits differ from pixel to pixel and class to class."""
    torch.manual_seed(0)
    model = ReverseHRNetSeg(num_classes=5, encoder=encoder, encoder_weights="random", width=8, **options)
    for norm in (m for m in model.network.head.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_var.uniform_(0.1, 0.5)
    for classifier in model.network.head.classifiers.values():
        classifier.weight.data *= 5
        classifier.bias.data.zero_()
    return model


def check(model: ReverseHRNetSeg, run: parity.Run, scale: float = 1.0) -> None:
    predictor = predictor_of_heads([model], InferenceSettings(scale=scale, window=None))
    for images in parity.sample_images(SIZES):
        assert parity.compare(predictor, run, images).equal, images.shape


@pytest.fixture(scope="module")
def model() -> ReverseHRNetSeg:
    model = build()
    model.temperature = 1.7
    return model


@pytest.fixture(scope="module")
def traced(model) -> torch.export.ExportedProgram:
    return graph.trace(graph.ImageToLabels(model.network, 1.0, model.temperature, scores=True))


@pytest.fixture(scope="module")
def onnx_file(traced, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    onnx.write_onnx(traced, path, {"class_names": '["a", "b"]'})
    return path


def expected(model: ReverseHRNetSeg, images: Tensor, scale: float = 1.0) -> Tensor:
    """Return probabilities by PyTorch's plain functions."""
    size = [max(1, round(side * scale)) for side in images.shape[-2:]]
    given = F.interpolate(images / 255, size, mode="bilinear", antialias=scale < 0.5).clamp(0, 1)
    logits = model.eval().network(given)
    return (F.interpolate(logits, images.shape[-2:], mode="bilinear") / model.temperature).softmax(1)


@torch.no_grad()
def test_onnxruntime_gives_labels_and_probabilities_of_any_size(model, onnx_file):
    run = onnx.load_onnx(onnx_file)
    check(model, run)
    (images,) = parity.sample_images([(2, 46, 79)])
    labels, probabilities = run(images)
    assert (labels.dtype, probabilities.dtype) == (torch.uint8, torch.float32)
    torch.testing.assert_close(probabilities, expected(model, images), rtol=1e-3, atol=1e-4)
    assert torch.equal(labels.long(), probabilities.argmax(1))
    assert len(labels.unique()) > 2


@torch.no_grad()
def test_a_pt2_file_gives_the_same(model, traced, tmp_path):
    path = tmp_path / "model.pt2"
    program.write_program(traced, path, {})
    run = program.load_program(path)
    check(model, run)
    (images,) = parity.sample_images([(2, 46, 79)])
    torch.testing.assert_close(run(images)[1], expected(model, images), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("scale", [0.5, 0.4, 1.5])
def test_resizing_is_inside(scale, tmp_path):
    model = build()
    traced = graph.trace(graph.ImageToLabels(model.network, scale, scores=True))
    onnx.write_onnx(traced, tmp_path / "model.onnx", {})
    program.write_program(traced, tmp_path / "model.pt2", {})
    (images,) = parity.sample_images([(2, 40, 80)])
    for run in (onnx.load_onnx(tmp_path / "model.onnx"), program.load_program(tmp_path / "model.pt2")):
        check(model, run, scale)
        torch.testing.assert_close(run(images)[1], expected(model, images, scale), rtol=1e-2, atol=1e-3)


def test_an_onnx_file_names_its_free_dimensions_and_holds_no_paths(onnx_file):
    loaded = onnx_package.load(onnx_file)
    onnx_package.checker.check_model(loaded, full_check=True)
    assert [(o.domain, o.version) for o in loaded.opset_import] == [("", 18)]
    session = onnxruntime.InferenceSession(onnx_file)
    described = [(v.name, v.type, v.shape) for v in (*session.get_inputs(), *session.get_outputs())]
    assert described == [
        ("image", "tensor(uint8)", ["n", 3, "h", "w"]),
        ("labels", "tensor(uint8)", ["n", "h", "w"]),
        ("probabilities", "tensor(float)", ["n", 5, "h", "w"]),
    ]
    assert session.get_modelmeta().custom_metadata_map == {"class_names": '["a", "b"]'}
    assert str(Path(graph.__file__).parent).encode() not in onnx_file.read_bytes()
    kinds = {node.op_type for node in loaded.graph.node}
    assert not kinds & {"BatchNormalization", "If", "Loop"}


def test_whole_logits_are_those_of_lazy_logits(model):
    with torch.no_grad():
        (lazy,) = model.predictor().forward(torch.randint(0, 256, (2, 3, 37, 75), dtype=torch.uint8))
        torch.testing.assert_close(graph.whole_logits(lazy), lazy.logits(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("factor", "exact"), [(0.25, True), (0.5, True), (0.75, True), (2.5, True), (0.7, False)])
def test_sides_are_rounded_like_the_predictors(factor, exact):
    # floats make 31.499... of 45 * 0.7
    sides = [side for side in range(1, 3000) if exact or abs(side * factor % 1 - 0.5) > 1e-9]
    assert [graph.rounded_product(side, factor) for side in sides] == [max(1, round(side * factor)) for side in sides]


def test_parity_counts_wrong_and_undecided_pixels(model):
    (images,) = parity.sample_images([(1, 20, 30)])
    predictor = predictor_of_heads([model], InferenceSettings(window=None))
    labels = predictor.labels(images)
    same = parity.compare(predictor, lambda _: [labels], images)
    assert same == parity.Comparison((1, 20, 30), 600, 0, 0, None)
    assert same.equal
    other = labels.clone()
    other[0, :2] += 1
    found = parity.compare(predictor, lambda _: [other], images)
    assert found.wrong + found.undecided == 60
    assert found.wrong > 50
    assert not found.equal
    close = parity.compare(predictor, lambda _: [labels, predictor.probabilities(images).float() + 0.01], images)
    assert close.difference == pytest.approx(0.01, abs=1e-3)
    assert not close.equal


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(("plan", "extra_stream"), [("early", True), ("progressive", False)])
def test_encoders_and_plans(encoder, plan, extra_stream, tmp_path):
    model = build(encoder, plan=plan, extra_stream=extra_stream)
    traced = graph.trace(graph.ImageToLabels(model.network))
    onnx.write_onnx(traced, tmp_path / "model.onnx", {})
    check(model, onnx.load_onnx(tmp_path / "model.onnx"))
    program.write_program(traced, tmp_path / "model.pt2", {})
    check(model, program.load_program(tmp_path / "model.pt2"))


@pytest.mark.slow
def test_an_encoder_that_fixes_the_size_is_refused():
    message = r"vit_small_patch16_dinov3 cannot be exported: .* \(Eq\(.*, \d+\)\); use another encoder"
    with pytest.raises(UserError, match=message):
        graph.trace(graph.ImageToLabels(build("vit_small_patch16_dinov3").network))


# --- the command


@pytest.fixture
def quick(monkeypatch) -> None:
    """Compare on two sizes."""
    monkeypatch.setattr(command, "SIZES", SIZES[1:3])


@pytest.mark.parametrize(
    ("kind", "absent"),
    [
        ("onnx", ["torch", "early_fusion_seg"]),
        pytest.param("pt2", ["timm", "lightning", "early_fusion_seg"], marks=pytest.mark.slow),
    ],
)
def test_the_command_writes_a_file_that_an_example_runs_like_predict(
    kind, absent, checkpoint, camvid, quick, elsewhere, capsys
):
    assert main(["export", "--ckpt_path", str(checkpoint), "--format", kind, "--output", "out"]) == 0
    printed = capsys.readouterr().out
    assert "image uint8 (n, 3, h, w) -> labels uint8 (n, h, w); n, h and w are free" in printed
    assert "license of the encoder's weights: not stated (resnet18)" in printed
    assert read_metadata(f"out/model.{kind}") == metadata_of(ReverseHRNetSeg.load_from_checkpoint(checkpoint))
    photographs = Path("photographs")
    photographs.mkdir()
    for path in sorted((camvid / "val").iterdir()):
        Image.open(path).resize((53, 38)).save(photographs / path.name)
    assert main(["predict", "--ckpt_path", str(checkpoint), "--data.root", "photographs", "--output", "ours"]) == 0
    script = (
        f"import runpy, sys; sys.modules |= dict.fromkeys({absent}); "
        f"runpy.run_path({str(EXAMPLES / f'{kind}_predict.py')!r}, run_name='__main__')"
    )
    words = [sys.executable, "-c", script, f"out/model.{kind}", "photographs", "theirs"]
    subprocess.run(words, check=True, timeout=100)
    written = sorted(path.relative_to("ours") for path in Path("ours").glob("*/*.png"))
    assert len(written) == 6
    for name in written:
        ours, theirs = Image.open("ours" / name), Image.open("theirs" / name)
        assert (ours.mode, ours.size, ours.getpalette()) == (theirs.mode, theirs.size, theirs.getpalette())
        assert np.mean(np.array(ours) != np.array(theirs)) < 1e-3  # pixels whose two highest logits are nearly equal


def read_metadata(path: str) -> dict[str, str]:
    if path.endswith("onnx"):
        return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    extra = {program.METADATA: ""}
    torch.export.load(path, extra_files=extra)
    return json.loads(extra[program.METADATA])


def metadata_of(model: ReverseHRNetSeg) -> dict[str, str]:
    encoder = model.network.encoder
    return {
        "class_names": json.dumps(model.class_names),
        "palette": json.dumps(model.palette),
        "encoder": "resnet18",
        "encoder_weights": "random",
        "encoder_fingerprint": encoder.fingerprint(),
        "encoder_license": "not stated",
        "input_scale": "1.0",
        "temperature": "1.0",
        "library": f"early-fusion-seg {version('early-fusion-seg')}",
    }


def test_a_file_that_differs_from_the_model_is_kept_and_the_exit_code_is_1(
    checkpoint, traced, quick, elsewhere, monkeypatch, capsys
):
    monkeypatch.setattr(command, "trace", lambda _: traced)  # saves the time of another one
    monkeypatch.setattr(command, "load_program", lambda _: lambda images: [torch.full_like(images[:, 0], 255)])
    assert main(["export", "--ckpt_path", str(checkpoint), "--format", "pt2", "--output", "out"]) == 1
    assert "NOT equal to the model" in capsys.readouterr().out
    assert Path("out/model.pt2").is_file()


@pytest.mark.parametrize("name", onnx.PACKAGES)
def test_a_missing_package_is_named(name, monkeypatch, capsys):
    monkeypatch.setattr(onnx, "find_spec", lambda asked: None if asked == name else object())
    assert main(["export", "--ckpt_path", "x.ckpt"]) == 2
    assert f"needs {name}, which is not installed: pip install 'early-fusion-seg[onnx]'" in capsys.readouterr().err


def test_the_scale_of_training_is_used_and_a_short_side_is_refused(model):
    model = build()
    assert command.fixed_scale(model, None) == 1.0
    model.trained_at = InputSize(scale=0.25)
    assert command.fixed_scale(model, None) == 0.25
    model.trained_at = InputSize(short_side=520)
    with pytest.raises(UserError, match=r"trained at short_side 520, .*give --scale X"):
        command.fixed_scale(model, None)
    assert command.fixed_scale(model, 2.0) == 2.0


def test_an_old_pytorch_is_refused(model, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(UserError, match=r"needs PyTorch 2\.14 or newer, found 2\.9\.1\+cpu"):
        graph.trace(graph.ImageToLabels(model.network))


def test_scores_come_from_the_results_beside_the_checkpoint_or_a_file(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    assert metadata.read_results(None, checkpoint) is None
    results = {"data": "CamVidDataModule", "split": "val", "miou": 0.5, "other": 1}
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    assert metadata.read_results(None, checkpoint) == results
    encoder = build().network.encoder
    facts = metadata.build_metadata(encoder, ["a"], [[1, 2, 3]], 0.5, 1.0, results)
    assert {
        "data": "CamVidDataModule",
        "split": "val",
        "miou": "0.5",
        "palette": "[[1, 2, 3]]",
    }.items() <= facts.items()
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(UserError, match=r"bad\.json cannot be read as results .*; give the results\.json"):
        metadata.read_results(tmp_path / "bad.json", checkpoint)
