import pytest
import torch
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from early_fusion_seg.cli.devices import distributed_settings, is_first_process
from early_fusion_seg.errors import UserError

SETTINGS = {
    "accelerator": "auto", "strategy": "auto", "devices": "auto", "num_nodes": 1, "accumulate_grad_batches": 1,
    "sync_batchnorm": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "gpus", "static", "sync"),
    [
        ({}, 4, True, True),
        ({"devices": 2}, 0, True, False),
        ({"devices": "0,1", "accumulate_grad_batches": 2}, 4, False, True),
        ({"devices": [0, 1], "strategy": "ddp"}, 4, True, True),
        ({"devices": 1, "num_nodes": 2, "accelerator": "cpu"}, 4, True, False),
    ],
)
def test_several_processes_get_ddp_options_and_sync_batch_norm_on_gpus(monkeypatch, given, gpus, static, sync):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    settings = distributed_settings(SETTINGS | given)
    strategy = settings["strategy"]
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True, "static_graph": static}
    assert settings["sync_batchnorm"] is sync


@pytest.mark.parametrize("given", [{}, {"devices": 1}, {"strategy": "single_device"}, {"devices": "-1"}])
def test_settings_of_one_process_do_not_change(monkeypatch, given):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed_settings(SETTINGS | given) == {}


@pytest.mark.parametrize("strategy", ["ddp_spawn", {"class_path": "lightning.pytorch.strategies.DDPStrategy"}])
def test_other_kinds_of_ddp_are_used_with_a_warning(strategy):
    with pytest.warns(UserWarning, match="is not tested; use ddp"):
        assert distributed_settings(SETTINGS | {"devices": 2, "strategy": strategy}) == {}


@pytest.mark.parametrize(
    "strategy", ["fsdp", "deepspeed_stage_2", {"class_path": "lightning.pytorch.strategies.FSDPStrategy"}]
)
def test_strategies_that_shard_the_model_are_refused(strategy):
    with pytest.raises(UserError, match=r"is not supported: .* ddp"):
        distributed_settings(SETTINGS | {"devices": 2, "strategy": strategy})


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),  # torchrun
        ({"RANK": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),  # torchrun, second machine
        ({"LOCAL_RANK": "1"}, False),  # started by Lightning
        ({"NODE_RANK": "1"}, False),  # started by hand on the second machine
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_one_process_of_a_run_writes_its_files(variables, first, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", _get_rank() or 0)  # as at the start of a process
    assert is_first_process() is first
