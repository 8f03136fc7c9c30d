"""Scores as files, on the screen, and for loggers."""

import os
from pathlib import Path
from typing import Any, Literal, cast

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from early_fusion_seg.callbacks.loggers import send_pictures, send_results
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.atomic import replace_file
from early_fusion_seg.report import EncoderFacts, Results, RunFacts, build_results, score_table, write_json
from early_fusion_seg.visualize import Pixels, confusion_picture

Split = Literal["val", "test"]


class ResultsWriter(Callback):
    """Write `results.json` and `confusion.png` at the end of `validate` and `test`, and print the table.

    TensorBoard and W&B get the picture and the IoU of each class as a table too.

    Args:
        folder: Where to write; default: the trainer's log folder.
        checkpoint: The file that the weights came from; default: the trainer's `ckpt_path`.
        config: Resolved configuration, plain types.

    Attributes:
        results: What was written last.

    Raises:
        UserError: The number of images scored is not that of the split, though nothing limited it.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        checkpoint: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.config = config or {}
        self.results: Results | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the scores of the validation split, unless this is a validation within `fit`."""
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the scores of the test split."""
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: Trainer, module: Any, split: Split) -> None:
        metrics = module.metrics[split]
        scores = metrics.compute()
        images = int(trainer.strategy.reduce(metrics.images.clone(), reduce_op="sum"))
        confusion = trainer.strategy.reduce(metrics.confusion[:, :-1].clone(), reduce_op="sum")  # (K, K)
        partial = check_images(trainer, split, images)
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        self.results = build_results(scores, module.class_names, self._facts(trainer, module, split, images, partial))
        if trainer.is_global_zero:
            write_json(self.results, folder / "results.json")
            picture = confusion_picture(confusion.cpu().numpy(), module.class_names)
            replace_file(folder / "confusion.png", Image.fromarray(picture).save)
            self._send(trainer, picture, self.results)
            show_results(self.results, folder / "results.json")

    def _send(self, trainer: Trainer, picture: Pixels, results: Results) -> None:
        for logger in trainer.loggers:
            send_pictures(logger, {results["split"]: picture}, "confusion", trainer.global_step)
            send_results(logger, results, trainer.global_step)

    def _facts(self, trainer: Trainer, module: Any, split: Split, images: int, partial: bool) -> RunFacts:
        data = cast(Any, trainer).datamodule
        encoder = module.network.encoder
        checkpoint = self.checkpoint or trainer.ckpt_path
        seed = os.environ.get("PL_GLOBAL_SEED")  # where Lightning's seed_everything leaves it
        return RunFacts(
            data=type(data).__name__,
            split=split,
            images=images,
            partial=partial,
            absent=module.metrics[split].absent,
            pred_void=module.metrics[split].pred_void,
            scale=getattr(data, "scale", None),  # data modules of other projects need not have one
            checkpoint=None if checkpoint is None else str(checkpoint),
            predictions=None,
            encoder=EncoderFacts(
                name=encoder.name,
                weights=encoder.source,
                fingerprint=encoder.fingerprint(),
                license=encoder.license,
            ),
            seed=None if seed is None else int(seed),
            precision=str(trainer.precision),
            config=self.config,
        )


@rank_zero_only
def show_results(results: Results, path: Path | str | None) -> None:
    """Print the table, where the results are, and the license under which the encoder's weights stand."""
    console = rich.get_console()  # the one of Lightning's progress bar, so that they do not overwrite each other
    console.print(score_table(results))
    if encoder := results["encoder"]:
        of_weights = f"weights: {encoder['weights']}, their license: {encoder['license'] or 'none stated'}"
        console.print(f"encoder {encoder['name']}, {of_weights}", soft_wrap=True)
    if path is not None:
        console.print(f"written: {path}", soft_wrap=True)


def check_images(trainer: Trainer, split: Split, images: int) -> bool:
    """Compare the number of images scored with the size of the split.

    Returns:
        Whether the trainer limited the batches, so that only a part was scored.

    Raises:
        UserError: They differ and nothing limited it.
    """
    loader: Any = trainer.test_dataloaders if split == "test" else trainer.val_dataloaders
    limit = trainer.limit_test_batches if split == "test" else trainer.limit_val_batches
    expected = len(loader.dataset)
    limited = isinstance(limit, int) or limit < 1.0
    if images != expected and not (limited and images < expected):
        raise UserError(
            f"{images} images were scored, but the {split} split has {expected}; "
            "each must be scored once: use the data modules' own loaders, which share them among processes"
        )
    return images != expected
