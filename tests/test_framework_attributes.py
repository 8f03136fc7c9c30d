"""Attributes of the frameworks that we read or write although they are private or not documented.

A failure says what a new version has changed, and which module of ours to look at.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jsonargparse
import pytest
import timm
import torch
from huggingface_hub import errors
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from timm import layers
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torchmetrics import Metric

from early_fusion_seg.encoder.onednn_blocks import CONV, CONV_INTO, find_operator


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1)


TRAINER = {  # module of ours -> attributes of a Trainer
    "segmenter": ["datamodule", "callbacks", "precision_plugin", "gradient_clip_val", "num_training_batches"],
    "callbacks/last_checkpoint": [
        "fit_loop.total_batch_idx",
        "fit_loop.epoch_loop.val_loop.batch_progress.total.processed",
        "fast_dev_run",
        "is_last_batch",
        "should_stop",
        "strategy.root_device",
    ],
    "callbacks/throughput": ["log_every_n_steps"],
    "callbacks/validate_at_end": ["check_val_every_n_epoch", "max_steps"],
    "callbacks/results": ["state.fn", "strategy.reduce", "limit_val_batches", "test_dataloaders", "val_dataloaders"],
    "callbacks/best_checkpoint": ["strategy.broadcast"],
    "cli/output": ["checkpoint_callbacks"],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in TRAINER.items() for name in names])
def test_attributes_of_a_trainer(trainer: Trainer, module: str, name: str) -> None:
    value: Any = trainer
    for part in name.split("."):
        assert hasattr(value, part), f"Lightning's Trainer has no {name} any more; {module}.py uses it"
        value = getattr(value, part)


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def source(thing: Any) -> str:
    return inspect.getsource(thing)


OTHERS: list[tuple[str, str, Callable[[], bool]]] = [  # module of ours, what it uses, whether it is there
    ("segmenter", "DDP reads _ddp_params_and_buffers_to_ignore of the module",
     lambda: "_ddp_params_and_buffers_to_ignore" in source(nn.parallel.DistributedDataParallel)),
    ("segmenter", "GradientAccumulationScheduler.get_accumulate_grad_batches(epoch)",
     lambda: parameters(GradientAccumulationScheduler.get_accumulate_grad_batches) == ["self", "epoch"]),
    ("segmenter", "LightningModule.hparams is a dict with attributes",
     lambda: type(LightningModule().hparams).__name__ == "AttributeDict"),
    ("inference/eval_copy", "nn.Module keeps its parts in _modules and a compiled forward in _compiled_call_impl",
     lambda: {"_modules", "training"} <= nn.Module().__dict__.keys() and nn.Module._compiled_call_impl is None),
    ("callbacks/ema", "torch._foreach_lerp_", lambda: callable(torch._foreach_lerp_)),
    ("callbacks/last_checkpoint", "progress trackers have ready, started and processed",
     lambda: {"ready", "started", "processed"} <= _ProcessedTracker().__dict__.keys()),
    ("callbacks/last_checkpoint", "SIGTERMException", lambda: issubclass(SIGTERMException, SystemExit)),
    ("callbacks/last_checkpoint", "Trainer.val_check_batch is set by the fit loop",
     lambda: "val_check_batch" in source(type(Trainer(accelerator="cpu", logger=False).fit_loop))),
    ("callbacks/best_checkpoint", "ModelCheckpoint compares with best_k_models and kth_value",
     lambda: all(name in source(ModelCheckpoint) for name in ("best_k_models", "kth_value", "kth_best_model_path"))),
    ("callbacks/narrow_progress_bar", "RichProgressBar.configure_columns(trainer)",
     lambda: parameters(RichProgressBar.configure_columns) == ["self", "trainer"]),
    ("callbacks/run_config", "SaveConfigCallback.save_config(trainer, pl_module, stage)",
     lambda: parameters(SaveConfigCallback.save_config) == ["self", "trainer", "pl_module", "stage"]),
    ("callbacks/loggers", "WandbLogger.log_image and log_table",
     lambda: callable(WandbLogger.log_image) and callable(WandbLogger.log_table)),
    ("cli/command_cli", "hooks of LightningCLI",
     lambda: all(callable(getattr(LightningCLI, name, None)) for name in (
         "init_parser", "add_default_arguments_to_parser", "add_core_arguments_to_parser", "parse_arguments",
         "before_instantiate_classes", "instantiate_classes", "instantiate_trainer"))),
    ("cli/parsing", "jsonargparse's help formatter has _get_help_string and add_argument",
     lambda: parameters(jsonargparse.DefaultHelpFormatter._get_help_string) == ["self", "action"]
     and parameters(jsonargparse.DefaultHelpFormatter.add_argument) == ["self", "action"]),
    ("cli/output", "rank_zero_only.rank", lambda: hasattr(rank_zero_only, "rank")),
    ("metrics", "torchmetrics' Metric wraps compute in _wrap_compute(compute)",
     lambda: parameters(Metric._wrap_compute) == ["self", "compute"]),
    ("encoder/weights", "huggingface_hub.errors has HTTPError and HfHubHTTPError",
     lambda: issubclass(errors.HTTPError, Exception) and issubclass(errors.HfHubHTTPError, Exception)),
    ("encoder/frozen_encoder", "timm's FeatureGetterNet has model and feature_info",
     lambda: all(hasattr(timm.create_model("test_resnet", features_only=True, feature_cls="getter"), name)
                 for name in ("model", "feature_info"))),
    ("encoder/fold_batch_norm", "timm's BatchNormAct2d has drop and act",
     lambda: all(hasattr(layers.BatchNormAct2d(4), name) for name in ("drop", "act"))),
    ("encoder/onednn_blocks", "timm's residual blocks have these parts",
     lambda: all(hasattr(block(64, 16), name) for block in (BasicBlock, Bottleneck)
                 for name in ("conv1", "conv2", "act1", "act2", "downsample"))),
    ("encoder/onednn_blocks", "torch._C._len_torch_dispatch_stack", lambda: torch._C._len_torch_dispatch_stack() == 0),
    ("encoder/onednn_blocks", "arguments of oneDNN's operators",
     lambda: not torch.backends.mkldnn.is_available() or None not in (find_operator(*CONV), find_operator(*CONV_INTO))),
]  # fmt: skip


@pytest.mark.parametrize(("module", "what", "present"), OTHERS, ids=[what for _, what, _ in OTHERS])
def test_other_attributes(module: str, what: str, present: Callable[[], bool]) -> None:
    assert present(), f"changed: {what}; {module}.py relies on it"


def test_the_argument_parser_words_its_messages_as_we_shorten_them() -> None:
    """`cli/messages.py` turns them into sentences."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--width", type=int)
    with pytest.raises(
        jsonargparse.ArgumentError, match=r'Parser key "width":\n  Expected a <class .int.>\. Got value: x'
    ):
        parser.parse_args(["--width=x"])
