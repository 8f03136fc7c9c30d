import math
import re
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_runs import SIZE, TINY_MODEL
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

from early_fusion_seg import ReverseHRNetSeg
from early_fusion_seg.__main__ import main
from early_fusion_seg.callbacks import step_timer as timing
from early_fusion_seg.callbacks.step_timer import TimedBatch
from early_fusion_seg.callbacks.validate_at_end import ValidateAtEnd
from early_fusion_seg.cli import usage
from early_fusion_seg.cli.estimate.command import EstimateCLI
from early_fusion_seg.cli.estimate.figures import (
    Rate,
    Saved,
    batches_and_steps,
    duration,
    largest_that_fits,
    limited,
    rate,
    validations,
)
from early_fusion_seg.data.camvid import fake_camvid_segnet
from early_fusion_seg.data.dataset import SegmentationDataset
from early_fusion_seg.errors import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")

IMAGES = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_camvid_segnet(tmp_path_factory.mktemp("estimate") / "camvid", images=IMAGES, size=SIZE)


def options(data: Path, *more: str) -> list[str]:
    small = [f"--data.root={data}", "--data.crop_size=[32,32]", "--data.batch_size=2", "--data.num_workers=0"]
    run = ["--trainer.max_epochs=20", "--trainer.accelerator=cpu", "--steps=4", "--warmup=1"]
    return ["--config=camvid", *small, *run, *TINY_MODEL, *more]


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Return the printed lines by title."""
    lines: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines()[1:]:
        if line.startswith("Data loading"):
            lines["advice"] = [line]
        elif line[:18].strip():
            title = line[:18].strip()
            lines[title] = [line[18:]]
        else:
            lines[title].append(line[18:])
    return lines


def seconds(text: str) -> float:
    """Parse a duration."""
    units = {"s": 1, "min": 60, "h": 3600, "d": 86400}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (s|min|h|d)\b", text))


# --- the whole command


def test_estimate_measures_real_steps_and_leaves_no_files(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    temporary = Path(tempfile.mkdtemp())  # not below tmp_path: the workers' sockets there need short names
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    args = options(data, "--output=run", "--logger=tensorboard", "--data.num_workers=1", "--data.rare_class_share=0.5")
    assert main(["estimate", *args]) == 0
    shown = printed(capsys)
    assert not [*tmp_path.iterdir(), *temporary.iterdir()]
    temporary.rmdir()
    images, batch, size = re.fullmatch(
        r"([\d.]+) images/s, ([\d.]+) s per batch of (\d)", shown["training"][0]
    ).groups()
    assert size == "2"
    assert float(images) * float(batch) == pytest.approx(2, rel=0.05)
    assert 0 <= int(shown["waiting for data"][0].split("%")[0]) <= 100
    assert shown["largest batch"] == ["not measured: needs a CUDA GPU"]
    total, *parts = shown["whole run"]
    assert seconds(total) == pytest.approx(sum(map(seconds, parts)), rel=0.1)
    assert re.fullmatch(r"80 batches: .*", parts[0])  # 20 epochs of 4: the ninth image is dropped
    assert seconds(parts[0].split(":")[1]) == pytest.approx(80 * float(batch), rel=0.1)
    assert re.fullmatch(r"10 validations of 9 batches: .*", parts[1])
    assert re.fullmatch(r"at most 40 checkpoints written: .*", parts[2])
    written = (trained / "checkpoints" / "last.ckpt").stat().st_size / 2**20
    count, mebibytes = re.fullmatch(r"best and last: (\d) x ([\d.]+) MiB", shown["checkpoints"][0]).groups()
    assert count == "2"
    assert float(mebibytes) == pytest.approx(written, rel=0.02)
    memory = re.match(r"([\d.]+) (MiB|GiB) of resident memory, the whole process; 1 data load", shown["peak memory"][0])
    amount, unit = memory.groups()
    now = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8")).group(1))
    assert float(amount) * {"MiB": 2**10, "GiB": 2**20}[unit] == pytest.approx(now, rel=0.1)


class FakeClock:
    """A clock that advances only in the patched functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.steps, self.read, self.scored = 0.0, 0, 0, 0
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(timing, "time", clock)
        monkeypatch.setattr("early_fusion_seg.cli.estimate.command.time", clock)
        methods = {SegmentationDataset: "__getitem__", Trainer: "save_checkpoint"}
        methods_of_model = ("training_step", "validation_step")
        for kind, name in [*methods.items(), *((ReverseHRNetSeg, name) for name in methods_of_model)]:
            self.wrap(monkeypatch, kind, name)

    def wrap(self, monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> None:
        original = getattr(kind, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += getattr(self, name.strip("_"))()
            return original(*args, **kwargs)

        monkeypatch.setattr(kind, name, slow)

    def getitem(self) -> float:
        self.read += 1
        return 0.25

    def training_step(self) -> float:
        self.steps += 1
        return 1.5 if self.steps > 2 else 1000.0  # the first two are warmup steps

    def validation_step(self) -> float:
        self.scored += 1
        return 0.5 if self.scored > 1 else 1000.0

    def save_checkpoint(self) -> float:
        return 3.0


def test_the_figures_follow_from_the_clock(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = FakeClock(monkeypatch)
    assert main(["estimate", *options(data, "--warmup=1", "--trainer.accumulate_grad_batches=2", "--steps=4")]) == 0
    shown = printed(capsys)
    assert clock.steps == (1 + 4) * 2  # beyond the epoch's 4 batches
    assert clock.scored == 1 + 4
    assert shown["training"] == ["1 images/s, 2 s per batch of 2"]
    assert shown["waiting for data"] == ["25% of the time"]
    assert shown["advice"][0].startswith("Data loading slows training down: raise --data.num_workers (now 0; ")
    assert shown["whole run"] == [
        "5 min 48 s",
        "80 batches (40 steps): 2 min 40 s",  # 160 s
        "10 validations of 9 batches: 1 min 8 s",  # 67.5 s
        "at most 40 checkpoints written: 2 min 0 s",
    ]


def test_a_slow_loader_gives_advice(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = SegmentationDataset.__getitem__
    monkeypatch.setattr(SegmentationDataset, "__getitem__", lambda *a: (time.sleep(0.5), read(*a))[1])
    args = options(data, "--steps=1", "--warmup=0", "--trainer.limit_val_batches=0")
    assert main(["estimate", *args]) == 0
    shown = printed(capsys)
    share = float(shown["waiting for data"][0].split("%")[0]) / 100
    batch = seconds(shown["training"][0].split(",")[1])
    assert share * batch >= 0.95  # two images, half a second each, whatever the step takes
    assert "advice" in shown
    assert not any("validations" in part for part in shown["whole run"])


def test_little_waiting_gives_no_advice(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeClock(monkeypatch).getitem = lambda: 0.1
    assert main(["estimate", *options(data, "--warmup=2")]) == 0
    shown = printed(capsys)
    assert shown["waiting for data"] == ["12% of the time"]  # 0.2 of 1.7 s
    assert "advice" not in shown


def test_counts_do_not_depend_on_the_seed(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for seed in ("1", "2"):
        with monkeypatch.context() as patch:
            FakeClock(patch)
            assert main(["estimate", *options(data, "--steps=1", f"--seed_everything={seed}")]) == 0
        shown.append(printed(capsys))
        del shown[-1]["peak memory"]
    assert shown[0] == shown[1]


def test_no_checkpoints_are_counted_if_checkpointing_is_off(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = options(data, "--steps=1", "--warmup=0", "--trainer.enable_checkpointing=false", "--data.batch_size=20")
    assert main(["estimate", *args, "--trainer.limit_val_batches=1"]) == 0
    shown = printed(capsys)
    assert shown["checkpoints"] == ["none"]
    assert len(shown["whole run"]) == 3
    assert shown["training"][0].endswith("per batch of 9")  # the split has 9 images


def test_no_logger_is_used(data: Path) -> None:
    own = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=x"]
    for more in (["--logger=wandb"], own):
        assert EstimateCLI(options(data, *more)).trainer.loggers == []


def test_estimate_is_listed_and_has_the_options_of_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\n  estimate " in usage()
    with pytest.raises(SystemExit):
        main(["estimate", "--help"])
    text = capsys.readouterr().out
    for name in ("--steps", "--warmup", "--model.width", "--data.help", "--ckpt_path", "--trainer.NAME"):
        assert name in text
    assert len(text.splitlines()) < 140


@pytest.mark.parametrize(("more", "sentence"), [
    (["--data.root=/none"], "/none is not a folder"),
    (["--steps=0"], "--steps is 0; expected at least 1"),
    (["--warmup=-1"], "--warmup is -1; expected at least 0"),
    (["--trainer.max_epochs=-1"], "the run has no end; set --trainer.max_epochs or --trainer.max_steps"),
    (["--model.widht=3"], "early-fusion-seg estimate --help lists the options"),
    (["--trainer.precision=7"], "trainer.precision"),
    (["--ckpt_path={ckpt}", "--model.width=8"], "model.width is 8, but 4 in "),
])  # fmt: skip
def test_a_user_error_is_one_line(
    more: list[str], sentence: str, data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", *options(data, "--trainer.max_epochs=3", *(a.format(ckpt=checkpoint) for a in more))]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("early-fusion-seg: error: ")
    assert sentence in captured.err.splitlines()[0]
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


# --- the length of the run, from fixed rates


RATES = Rate(4.0, 2.0, 0.1), Rate(4.0, 0.5, 0.1), Saved(10, 0.0)


@pytest.mark.parametrize(("more", "lines"), [
    ([], ["80 batches: 2 min 40 s", "10 validations of 9 batches: 45 s"]),
    (["--trainer.devices=2"],  # 5 images each
     ["40 batches: 1 min 20 s", "10 validations of 5 batches: 25 s", "computed for 2 processes, not measured; "]),
    (["--trainer.devices=2", "--trainer.max_epochs=null", "--trainer.max_steps=40"],  # as many steps as with one device
     ["40 batches: 1 min 20 s", "10 validations of 5 batches: 25 s", "computed for 2 processes, not measured; "]),
    (["--trainer.max_epochs=null", "--trainer.max_steps=30", "--trainer.accumulate_grad_batches=3"],
     ["60 batches (30 steps): 2 min 0 s", "8 validations of 9 batches: 36 s"]),
    (["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=0.5", "--data.eval_batch_size=2"],
     ["40 batches: 1 min 20 s", "10 validations of 2 batches: 10 s"]),
    (["--trainer.limit_val_batches=0"], ["80 batches: 2 min 40 s"]),
    (["--trainer.val_check_interval=00:01:00:00"], ["80 batches: 2 min 40 s", "validations at intervals of time"]),
    (["--trainer.max_epochs=null"], ["4000 batches: 2 h 13 min", "500 validations of 9 batches: 37 min 30 s"]),
    (["--trainer.max_time=00:01:00:00"],
     ["80 batches: 2 min 40 s", "10 validations of 9 batches: 45 s", "trainer.max_time may end the run earlier"]),
    (["--ckpt_path={ckpt}"],
     ["80 batches: 2 min 40 s", "10 validations of 9 batches: 45 s", "the whole run is counted"]),
    (["--trainer.callbacks=lightning.pytorch.callbacks.RichProgressBar"],
     ["80 batches: 2 min 40 s", "10 validations of 9 batches: 45 s", "trainer.callbacks are not measured"]),
    (["--trainer.fast_dev_run=true"], ["1 batches: 2 s", "1 validations of 1 batches: 0.5 s"]),
])  # fmt: skip
def test_the_length_of_a_run_follows_from_its_configuration(
    more: list[str], lines: list[str], data: Path, checkpoint: Path
) -> None:
    cli = EstimateCLI(options(data, *(arg.format(ckpt=checkpoint) for arg in more)))
    shown = [line for line in cli.whole_run(*RATES)[1:] if "checkpoints written" not in line]
    assert len(shown) == len(lines)
    assert all(line.startswith(start) for line, start in zip(shown, lines, strict=True))


class Counter(Callback):
    def __init__(self) -> None:
        self.batches = self.validations = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def on_validation_start(self, *_: Any) -> None:
        self.validations += 1


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # vectors need no workers
@pytest.mark.parametrize("run", [
    {"max_epochs": 3},
    {"max_epochs": 3, "max_steps": 15, "check_val_every_n_epoch": 2},
    {"max_steps": 13},
    {"max_steps": 14, "check_val_every_n_epoch": 2},
    {"max_steps": 20, "check_val_every_n_epoch": 2, "accumulate_grad_batches": 3},
    {"max_epochs": 2, "val_check_interval": 0.25},
    {"max_epochs": 2, "val_check_interval": 0.5, "accumulate_grad_batches": 4},
    {"max_epochs": 3, "val_check_interval": 3, "check_val_every_n_epoch": 2},
    {"max_steps": 23, "val_check_interval": 6, "check_val_every_n_epoch": None},
    {"max_epochs": 1, "check_val_every_n_epoch": 5},
])  # fmt: skip
def test_batches_steps_and_validations_equal_those_of_lightning(run: dict[str, Any]) -> None:
    counter, epoch = Counter(), 10
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", num_sanity_val_steps=0, callbacks=[counter, ValidateAtEnd()], **off, **run)
    every = trainer.check_val_every_n_epoch  # before ValidateAtEnd changes it
    trainer.fit(BoringModel(), DataLoader(RandomDataset(32, epoch)), DataLoader(RandomDataset(32, 1)))
    limits = (run.get("max_epochs", -1), run.get("max_steps", -1))
    batches, steps = batches_and_steps(epoch, run.get("accumulate_grad_batches", 1), *limits)
    assert (batches, steps) == (counter.batches, trainer.global_step)
    assert validations(batches, epoch, every, run.get("val_check_interval", 1.0)) == counter.validations


def test_a_run_without_batches() -> None:
    assert batches_and_steps(0, 1, 5, -1) == (0, 0)
    assert validations(0, 1, 1, 1.0) == 0
    assert limited(7, 0.0) == 0


# --- rates and formats


def test_warmup_is_left_out_unless_there_is_nothing_else() -> None:
    timed = [TimedBatch(i, 4, 0.5 + 10 * (i < 2), 1.0 + 10 * (i < 2)) for i in (0, 0, 1, 1, 2, 2, 3)]
    assert rate(timed, warmup=2) == Rate(4.0, 1.0, 0.5)
    assert rate(timed, warmup=0).batch == pytest.approx((7 + 40) / 7)
    assert rate(timed[:2], warmup=5) == Rate(4 / 11, 11.0, 10.5 / 11)  # fewer steps than warmup steps


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0 s"), (9.87, "9.9 s"), (10.4, "10 s"), (59.4, "59 s"), (59.8, "1 min 0 s"), (119.9, "2 min 0 s"),
    (3599.7, "1 h 0 min"), (7199.9, "2 h 0 min"), (86399, "1 d 0 h"), (84000, "23 h 20 min"), (90000, "1 d 1 h"),
])  # fmt: skip
def test_durations(value: float, text: str) -> None:
    assert duration(value) == text


# --- the largest batch


def test_the_largest_batch_is_found_to_one_image_in_sixteen() -> None:
    for capacity in range(200):
        for start in (1, 8, 100):
            tried: list[int] = []
            good, bad = largest_that_fits(lambda n, c=capacity, t=tried: t.append(n) or n <= c, start)
            assert good <= capacity < bad
            assert bad - good <= max(1, good // 16)
            assert len(tried) <= 2 * math.log2(max(start, capacity, 2)) + 3
            assert len(set(tried)) == len(tried)
            assert min(tried) >= 1


def test_the_search_stops_at_the_limit() -> None:
    assert largest_that_fits(lambda n: True, 3, limit=100) == (100, None)
    assert largest_that_fits(lambda n: True, 300, limit=100) == (300, None)


@pytest.fixture
def little_memory(data: Path, monkeypatch: pytest.MonkeyPatch) -> EstimateCLI:
    """A command with memory for batches of up to 5 images."""
    step = ReverseHRNetSeg.training_step

    def refuse(self: ReverseHRNetSeg, batch: Any, index: int) -> Any:
        if len(batch["image"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, batch, index)

    monkeypatch.setattr(ReverseHRNetSeg, "training_step", refuse)
    return EstimateCLI(options(data, "--data.batch_size=6", "--steps=1", "--trainer.accumulate_grad_batches=4"))


def test_batches_are_tried_until_one_does_not_fit(little_memory: EstimateCLI) -> None:
    assert largest_that_fits(little_memory.fits, 2) == (5, 6)
    assert little_memory.largest_batch().startswith("not measured")
    little_memory.device = torch.device("cuda")
    little_memory.fits = lambda images: images <= 11
    assert little_memory.largest_batch() == "11 images per process (12 do not fit)"
    little_memory.fits = lambda images: True
    assert little_memory.largest_batch() == "4096 images per process or more"


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_fits(little_memory: EstimateCLI) -> None:
    with pytest.raises(UserError, match=r"a batch of 6 images does not fit into memory; lower --data\.batch_size"):
        little_memory.time_training()
    fits, little_memory.device = little_memory.fits, torch.device("cuda")
    little_memory.one_device_trainer = on_the_cpu(little_memory)
    with pytest.raises(UserError, match=r"a batch of 6 images does not fit into the memory of the GPU; lower "
                                        r"--data\.batch_size to 5"):  # fmt: skip
        little_memory.time_training()
    assert fits(5)
    little_memory.fits = lambda images: False
    with pytest.raises(UserError, match=r"even one does not fit: lower --data\.crop_size"):
        little_memory.raise_out_of_memory()


def on_the_cpu(cli: EstimateCLI) -> Any:
    make = cli.one_device_trainer

    def make_on_cpu(*callbacks: Any, **limits: Any) -> Trainer:
        cli.device = torch.device("cpu")
        try:
            return make(*callbacks, **limits)
        finally:
            cli.device = torch.device("cuda")

    return make_on_cpu


def test_memory_may_run_out_in_a_later_step(little_memory: EstimateCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    little_memory.datamodule.batch_size = 2
    step, done = ReverseHRNetSeg.training_step, []

    def refuse(self: ReverseHRNetSeg, batch: Any, index: int) -> Any:
        done.append(index)
        if len(done) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, batch, index)

    monkeypatch.setattr(ReverseHRNetSeg, "training_step", refuse)
    with pytest.raises(UserError, match="a batch of 2 images does not fit into memory"):
        little_memory.time_training()


def test_another_error_in_a_step_is_raised(little_memory: EstimateCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("sizes differ")

    for name in ("training_step", "validation_step"):
        monkeypatch.setattr(ReverseHRNetSeg, name, broken)
    with pytest.raises(RuntimeError, match="sizes differ"):
        little_memory.time_training()
    with pytest.raises(RuntimeError, match="sizes differ"):
        little_memory.time_validation()


def test_validation_that_does_not_fit_is_refused(little_memory: EstimateCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ReverseHRNetSeg, "validation_step", refuse)
    with pytest.raises(UserError, match="validation does not fit into memory"):
        little_memory.time_validation()


def test_the_clock_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    timing.clock(torch.device("cpu"))
    assert not done
    timing.clock(torch.device("cuda", 0))
    assert done == [torch.device("cuda", 0)]


def test_gpu_memory_is_reported_for_training_and_validation(
    little_memory: EstimateCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: list[int] = [3 * 2**30, 2**20]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.pop(0))
    gpu = little_memory.device = torch.device("cuda")
    validation, training = timing.peak_memory(gpu), timing.peak_memory(gpu)
    assert little_memory.memory_text(training, validation) == "1.0 MiB on the GPU in training, 3.0 GiB in validation"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_everything_is_measured(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = options(data, "--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.precision=16-mixed")
    assert main(["estimate", *args]) == 0
    shown = printed(capsys)
    assert re.fullmatch(r"[\d.]+ .iB on the GPU in training, [\d.]+ .iB in validation", shown["peak memory"][0])
    assert re.match(r"\d+ images per process", shown["largest batch"][0])
