"""Argument checks shared by the fused ops, the reference and the fake (Meta) implementations.

Every failure is a ValueError that names the argument, what was got and what is allowed. Checks look at shapes, dtypes
and devices only (no host synchronisation); the contents of index tensors are the back end's to check or clamp.
They run on every call, so the common path is comparisons of tuples and nothing else.
"""

from yoco_ext._checks.attention import attention, qkv, shared_kv, window
from yoco_ext._checks.cache import append_kv, attention_decode
from yoco_ext._checks.common import boundaries, cu_seqlens, fail, index_range
from yoco_ext._checks.differential import (
    differential_attention,
    differential_combine,
    differential_queries,
    differential_v2,
    gated_memory,
    paired,
)
from yoco_ext._checks.pointwise import retention_output, rms_norm, rotary, swiglu
from yoco_ext._checks.retention import gated_retention, gated_retention_step

__all__ = [
    "boundaries",
    "cu_seqlens",
    "fail",
    "index_range",
    "gated_retention",
    "gated_retention_step",
    "attention",
    "qkv",
    "shared_kv",
    "window",
    "append_kv",
    "attention_decode",
    "retention_output",
    "rms_norm",
    "rotary",
    "swiglu",
    "differential_attention",
    "differential_combine",
    "differential_queries",
    "differential_v2",
    "gated_memory",
    "paired",
]
