"""The fused ops: thin functions over torch.ops.yoco_ext (checks, gradients, fake implementations)."""

from yoco_ext.ops.attention import attention, cross_attention, sliding_window_attention
from yoco_ext.ops.decode import append_kv, attention_decode
from yoco_ext.ops.differential import (
    differential_attention,
    differential_attention_decode,
    differential_attention_v2,
    differential_combine,
    differential_cross_attention,
    gated_memory,
    pair_heads,
    pair_queries,
)
from yoco_ext.ops.pointwise import retention_output, rms_norm, rotary, swiglu
from yoco_ext.ops.retention import gated_retention, gated_retention_step
from yoco_ext.ops.shared_kv import SharedKV

__all__ = [
    "SharedKV",
    "append_kv",
    "attention",
    "attention_decode",
    "cross_attention",
    "differential_attention",
    "differential_attention_decode",
    "differential_attention_v2",
    "differential_combine",
    "differential_cross_attention",
    "gated_memory",
    "gated_retention",
    "gated_retention_step",
    "pair_heads",
    "pair_queries",
    "retention_output",
    "rms_norm",
    "rotary",
    "sliding_window_attention",
    "swiglu",
]
