"""The frozen encoder: a timm classifier that gives feature maps, its weights, and how it is stored in checkpoints."""

from early_fusion_seg.encoder.frozen_encoder import DEFAULT_ENCODER, FrozenEncoder

__all__ = ["DEFAULT_ENCODER", "FrozenEncoder"]
