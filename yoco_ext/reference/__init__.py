"""Plain PyTorch versions of every op under the same names and signatures: short, readable, float64-capable.

They are the oracle of the tests and the engine of the reference model; nothing falls back to them silently.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "gated_retention": "retention",
    "gated_retention_step": "retention",
    "attention": "attention",
    "sliding_window_attention": "attention",
    "cross_attention": "attention",
    "attention_decode": "decode",
    "append_kv": "decode",
    "rms_norm": "pointwise",
    "rotary": "pointwise",
    "swiglu": "pointwise",
    "retention_output": "pointwise",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
