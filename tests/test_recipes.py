import shlex
from pathlib import Path

import pytest
from cli_runs import QUICK, QUIET, TINY_MODEL, epochs_logged

from early_fusion_seg.__main__ import main
from early_fusion_seg.cli.fake_data import replicas

pytestmark = pytest.mark.filterwarnings("ignore:no pixel of")  # two images do not have all classes


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("kind", replicas())
def test_fit_runs_on_every_fake_data_set(kind: str, tmp_path: Path) -> None:
    assert main(["fake-data", kind, "data", "--images", "2", "--size", "48", "64"]) == 0
    data = shlex.split(replicas()[kind][1])
    batch = ["--data.root=data", "--data.crop_size=32", "--data.batch_size=2", "--trainer.fast_dev_run=true"]
    assert main(["fit", *data, *batch, *TINY_MODEL, *QUICK, *QUIET]) == 0


@pytest.mark.usefixtures("elsewhere")
def test_the_monitored_score_is_a_number_if_the_mean_of_the_benchmark_is_nan(tmp_path: Path) -> None:
    assert main(["fake-data", "voc", "data", "--images", "2", "--size", "16", "16"]) == 0  # some classes are absent
    batch = ["--data.root=data", "--data.crop_size=16", "--data.batch_size=2", "--output=run", "--trainer.max_epochs=1"]
    often = ["--trainer.max_steps=-1", "--trainer.check_val_every_n_epoch=1"]
    assert main(["fit", "--config=voc", *batch, *often, *TINY_MODEL, *QUICK, *QUIET]) == 0
    assert epochs_logged(Path("run")) == [0]
    scores = [line for line in Path("run/metrics.csv").read_text().splitlines() if "nan" in line.lower()]
    assert scores == []
    checkpoint = "run/checkpoints/best.ckpt"
    args = ["validate", "--config=voc", "--data.root=data", f"--ckpt_path={checkpoint}", "--output=run"]
    assert main([*args, *QUICK, QUIET[0]]) == 0
    results = Path("run/results.json").read_text()
    assert '"miou": null' in results
    assert '"pred_void": "error"' in results
