import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from early_fusion_seg.cli.devices import distributed_settings

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


@pytest.mark.parametrize("given", [{}, {"devices": 1}, {"devices": 2, "strategy": "fsdp"}, {"devices": "-1"}])
def test_settings_of_one_process_and_of_other_strategies_do_not_change(monkeypatch, given):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed_settings(SETTINGS | given) == {}
