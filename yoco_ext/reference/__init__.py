"""Plain PyTorch versions of every op under the same names and signatures: short, readable, float64-capable.

They are the oracle of the tests and the engine of the reference model; nothing falls back to them silently.
"""

from yoco_ext.reference.attention import SharedKV, attention, cross_attention, sliding_window_attention
from yoco_ext.reference.decode import append_kv, attention_decode
from yoco_ext.reference.differential import (
    differential_attention,
    differential_attention_decode,
    differential_attention_v2,
    differential_combine,
    differential_cross_attention,
    gated_memory,
    pair_heads,
    pair_queries,
)
from yoco_ext.reference.pointwise import retention_output, rms_norm, rotary, swiglu
from yoco_ext.reference.retention import gated_retention, gated_retention_step

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
