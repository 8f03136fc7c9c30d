"""The frozen encoder: a timm classifier used for its feature maps, its weights, and its entry in checkpoints."""

from early_fusion_seg.encoder.frozen_encoder import DEFAULT_ENCODER, FrozenEncoder

__all__ = ["DEFAULT_ENCODER", "FrozenEncoder"]
