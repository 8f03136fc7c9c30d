"""Train in Python on synthetic street scenes, load the checkpoint, and draw one prediction.

python examples/train_in_python.py [--max_steps N] [--output DIR]
"""

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from PIL import Image

from early_fusion_seg import ReverseHRNetSeg, SyntheticDataModule
from early_fusion_seg.visualize import panel


def main() -> None:
    """Train, save, load, predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/train_in_python"))
    args = parser.parse_args()
    seed_everything(0)

    data = SyntheticDataModule(batch_size=8)
    model = ReverseHRNetSeg.for_data(
        data,
        encoder="resnet18",
        encoder_weights="random",  # pretrained: "hub", or "bundled" for tf_efficientnet_lite0
        lr=3e-3,
    )
    trainer = Trainer(max_steps=args.max_steps, default_root_dir=args.output, logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    trainer.validate(model, data)
    trainer.save_checkpoint(args.output / "model.ckpt")

    model = ReverseHRNetSeg.load_from_checkpoint(args.output / "model.ckpt")
    sample = data.dataset("val")[0]
    image, truth = sample["image"].permute(1, 2, 0).numpy(), sample["mask"].numpy()
    picture = panel(image, truth, model.predict(image), model.palette, model.class_names)
    Image.fromarray(picture).save(args.output / "panel.png")
    print(f"written: {args.output / 'panel.png'}")


if __name__ == "__main__":
    main()
