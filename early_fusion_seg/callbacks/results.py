"""ResultsWriter: write the scores to `results.json`, log them, and print a table."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from early_fusion_seg.callbacks.loggers import log_images, log_results
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.atomic import replace_file
from early_fusion_seg.io.terminal import plain
from early_fusion_seg.report import (
    HEADLINES,
    EncoderFacts,
    Results,
    RunFacts,
    build_results,
    caption,
    finite,
    score_table,
    write_json,
)
from early_fusion_seg.visualize import Pixels, confusion_picture

Split = Literal["val", "test"]


class ResultsWriter(Callback):
    """Write `results.json` and `confusion.png` at the end of `validate` and `test`, and print the score table.

    The confusion matrix and the score table are also logged to TensorBoard and W&B.

    Args:
        folder: Output folder; default: the trainer's log folder.
        checkpoint: Checkpoint file of the weights, or those of an ensemble; default: the trainer's `ckpt_path`.
        config: Resolved configuration, of plain types.

    Attributes:
        results: The results that were written last.

    Raises:
        UserError: The number of images scored is not the size of the split, although the trainer limited no batches.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        checkpoint: str | list[str] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.config = config or {}
        self.results: Results | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the scores of the validation split, unless the validation is part of `fit`."""
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the scores of the test split."""
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: Trainer, module: Any, split: Split) -> None:
        metrics = module.metrics[split]
        scores = metrics.compute()
        if hasattr(module, "calibration"):  # other modules have none
            scores |= module.calibration.compute()
        images = int(trainer.strategy.reduce(metrics.images.clone(), reduce_op="sum"))
        confusion = trainer.strategy.reduce(metrics.confusion[:, :-1].clone(), reduce_op="sum")  # (K, K)
        partial = check_images(trainer, split, images)
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        self.results = build_results(scores, module.class_names, self._facts(trainer, module, split, images, partial))
        if trainer.is_global_zero:
            write_json(self.results, folder / "results.json")
            image = confusion_picture(confusion.cpu().numpy(), module.class_names)
            replace_file(folder / "confusion.png", Image.fromarray(image).save)
            self._log(trainer, image, self.results)
            show_results(self.results, folder / "results.json")

    def _log(self, trainer: Trainer, confusion: Pixels, results: Results) -> None:
        for logger in trainer.loggers:
            log_images(logger, {results["split"]: confusion}, "confusion", trainer.global_step)
            log_results(logger, results, trainer.global_step)

    def _facts(self, trainer: Trainer, module: Any, split: Split, images: int, partial: bool) -> RunFacts:
        data = cast(Any, trainer).datamodule
        encoder = module.network.encoder
        inference, one_pass = None, None
        if hasattr(module, "predictor"):  # other modules have none
            members = {"temperature": module.temperature, "ensemble": 1 + len(module.ensemble)}
            inference = asdict(module.predictor().settings) | members
            one_pass = module.metrics["plain"].compute() if module.averages else None
        checkpoint = self.checkpoint or trainer.ckpt_path
        seed = os.environ.get("PL_GLOBAL_SEED")  # set by Lightning's seed_everything
        return RunFacts(
            data=type(data).__name__,
            split=split,
            images=images,
            partial=partial,
            absent=module.metrics[split].absent,
            pred_void=module.metrics[split].pred_void,
            inference=inference,
            plain={key: finite(one_pass[key]) for key in HEADLINES} if one_pass else None,
            checkpoint=checkpoint if checkpoint is None or isinstance(checkpoint, list) else str(checkpoint),
            predictions=None,
            encoder=EncoderFacts(
                name=encoder.name,
                weights=encoder.source,
                package=encoder.package,
                fingerprint=encoder.fingerprint(),
                license=encoder.license,
            ),
            seed=None if seed is None else int(seed),
            precision=str(trainer.precision),
            config=self.config,
        )


@rank_zero_only
def show_results(results: Results, path: Path | str | None) -> None:
    """Print the score table, the encoder with the license of its weights, and the path of the results."""
    console = rich.get_console()  # shared with Lightning's progress bar, so that they do not overwrite each other
    console.print(plain(caption(results)), style="italic", soft_wrap=True)  # the table's title would break at its width
    console.print(score_table(results))
    if encoder := results["encoder"]:
        license = encoder["license"] or "not stated"
        weights = encoder["weights"] + (f" ({encoder['package']})" if encoder["package"] else "")
        text = f"encoder {encoder['name']}, weights: {weights}, license of the weights: {license}"
        console.print(plain(text), soft_wrap=True)
    if path is not None:
        console.print(plain(f"written: {path}"), soft_wrap=True)


def check_images(trainer: Trainer, split: Split, images: int) -> bool:
    """Compare the number of images scored with the size of the split.

    Returns:
        Whether only a part of the split was scored, because the trainer limited the batches.

    Raises:
        UserError: The numbers differ and the trainer limited no batches.
    """
    loader: Any = trainer.test_dataloaders if split == "test" else trainer.val_dataloaders
    limit = trainer.limit_test_batches if split == "test" else trainer.limit_val_batches
    expected = len(loader.dataset)
    limited = isinstance(limit, int) or limit < 1.0
    if images != expected and not (limited and images < expected):
        raise UserError(
            f"{images} images were scored, but the {split} split has {expected}; "
            "each image must be scored once: use the data module's own loaders, which split the images among processes"
        )
    return images != expected
