"""The layers of YOCO. Each takes `ops="fused"` (compiled kernels) or `"reference"` (plain PyTorch)."""

from __future__ import annotations

from .attention import CrossAttention, KVCache, KVRing, SlidingWindowAttention
from .basic import FeedForward, RMSNorm, RotaryEmbedding
from .retention import GatedRetention

__all__ = [
    "CrossAttention",
    "FeedForward",
    "GatedRetention",
    "KVCache",
    "KVRing",
    "RMSNorm",
    "RotaryEmbedding",
    "SlidingWindowAttention",
]
