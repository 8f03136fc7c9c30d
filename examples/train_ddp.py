"""Train with DDP in Python, on synthetic street scenes: what `fit --trainer.devices N` does.

python examples/train_ddp.py [--devices N] [--accelerator cpu|gpu] [--max_steps N] [--output DIR] [--scenes N]

Lightning starts this script again for each further process, so all code is in `main`.
"""

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy

from early_fusion_seg import ReverseHRNetSeg, SyntheticDataModule
from early_fusion_seg.callbacks import ResultsWriter
from early_fusion_seg.callbacks.last_checkpoint import LastCheckpoint
from early_fusion_seg.io.atomic import AtomicCheckpointIO

BATCH = 8  # of all processes together: the number of processes does not change the training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/train_ddp"))
    parser.add_argument("--scenes", type=int, default=100, help="scenes to validate on")
    args = parser.parse_args()
    seed_everything(0)

    data = SyntheticDataModule(batch_size=BATCH // args.devices, val_scenes=args.scenes)
    model = ReverseHRNetSeg.for_data(data, encoder="resnet18", encoder_weights="random", lr=3e-3)
    several = args.devices > 1
    writer = ResultsWriter(args.output)
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=DDPStrategy(gradient_as_bucket_view=True, static_graph=True) if several else "auto",
        sync_batchnorm=several and args.accelerator == "gpu",  # CUDA only
        callbacks=[LastCheckpoint(args.output), writer],
        plugins=[AtomicCheckpointIO()],
        max_steps=args.max_steps,
        default_root_dir=args.output,
        logger=False,
    )
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    if trainer.is_global_zero and writer.results is not None:
        miou, images = writer.results["miou"] or 0.0, writer.results["images"]
        print(
            f"{trainer.world_size} process(es), {trainer.global_step} steps: {100 * miou:.1f} % mIoU on {images} images"
        )


if __name__ == "__main__":
    main()
