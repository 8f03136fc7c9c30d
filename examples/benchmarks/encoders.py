"""The table of encoders in docs/encoders.md: what timm says of them, and the time of their maps against ResNet-50's.

    OMP_NUM_THREADS=1 python examples/benchmarks/encoders.py      # writes encoders.json, then docs/encoders.md

Name, license, mean and std are those of timm's weights; parameters and strides are those of `FrozenEncoder`, without
the classifier. Times are those of the maps of one image of 512x512; weights are random, because times do not depend on
them. Nothing is downloaded. An encoder that `FrozenEncoder` refuses is listed with its reason.
"""

from collections.abc import Sequence
from functools import partial

import timm
import torch
from measure import Row, in_turns, options, publish
from rich.progress import Progress

from early_fusion_seg import FrozenEncoder
from early_fusion_seg.encoder.bundled_weights import bundled_weights
from early_fusion_seg.errors import UserError

REFERENCE = "resnet50.a1_in1k"
ENCODERS = (
    "resnet50.fb_ssl_yfcc100m_ft_in1k",
    REFERENCE,
    "tf_efficientnet_lite0",
    "tf_efficientnet_lite1",
    "tf_efficientnet_lite2",
    "mobilenetv3_large_100.ra_in1k",
    "mobilenetv4_conv_small.e2400_r224_in1k",
    "mobilenetv4_conv_medium.e500_r224_in1k",
    "regnety_016.tv2_in1k",
    "convnext_tiny.in12k_ft_in1k",
    "convnext_tiny.dinov3_lvd1689m",
    "convnext_tiny.eupe_lvd1689m",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_small_patch16_dinov3_qkvb.eupe_lvd1689m",
    "swin_tiny_patch4_window7_224.ms_in1k",
)
TEXT = """\
Parameters are without the classifier; strides are those of the feature maps. The network normalizes pixels in 0..1 with
the mean and std that timm names. Time is the processor time of the maps of one image of {side}x{side} over that of
{reference} ({milliseconds})."""


def facts(name: str) -> Row:
    """Return all that is known of an encoder without measuring; with the key `reason`, if it is refused."""
    config = timm.get_pretrained_cfg(name)
    row: Row = {"encoder": name, "weights": "bundled, hub" if name in bundled_weights() else "hub"}
    row["license"] = config.license or "not stated"
    try:
        encoder = FrozenEncoder(name, "checkpoint")
    except UserError as error:
        return row | {"reason": str(error).removeprefix(f"{name} cannot be the encoder: ").split(";")[0]}
    row["parameters (M)"] = sum(p.numel() for p in encoder.parameters()) / 1e6
    row["strides"] = ", ".join(map(str, encoder.strides))
    return row | {"mean": numbers(encoder.mean), "std": numbers(encoder.std)}


def numbers(values: Sequence[float]) -> str:
    """Write equal numbers once."""
    return ", ".join(f"{value:.3g}" for value in (values[:1] if len(set(values)) == 1 else values))


@torch.no_grad()
def maps(encoder: FrozenEncoder, images: torch.Tensor, bf16: bool) -> None:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        encoder(images)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, arguments=arguments)
    side, rows = 64 if chosen.quick else 512, [facts(name) for name in ENCODERS]
    accepted = [row for row in rows if "reason" not in row]
    images = torch.rand(1, 3, side, side).to(chosen.device, memory_format=torch.channels_last)
    encoders = {row["encoder"]: FrozenEncoder(row["encoder"], "random").to(chosen.device) for row in accepted}
    milliseconds = []
    with Progress(transient=True) as progress:
        for bf16 in chosen.bf16:
            kind = "bf16" if bf16 else "float32"
            works = {name: partial(maps, encoder, images, bf16) for name, encoder in encoders.items()}
            times = in_turns(works, chosen.repeats, chosen.device, progress, kind)
            milliseconds.append(f"{1000 * times[REFERENCE][1]:.0f} ms in {kind}")
            for row in accepted:
                row[f"time, {kind}"] = times[row["encoder"]][1] / times[REFERENCE][1]
    text = TEXT.format(side=side, reference=REFERENCE, milliseconds=", ".join(milliseconds))
    refused = [row for row in rows if "reason" in row]
    tables = {"Encoders": accepted, "Refused": refused}
    publish("encoders", "Encoders to choose from", text, tables, [], "", chosen)


if __name__ == "__main__":
    main()
