"""Hand-written kernels for YOCO (You Only Cache Once, arXiv 2405.05254) as PyTorch ops.

The ops are functions of this package; `yoco_ext.reference` has the same functions in plain PyTorch. Names are
resolved on first use, so that `yoco_ext.reference` works where the op library was not built.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(
        (
            "gated_retention",
            "gated_retention_step",
            "attention",
            "sliding_window_attention",
            "cross_attention",
            "attention_decode",
            "append_kv",
            "rms_norm",
            "rotary",
            "swiglu",
            "retention_output",
            "differential_attention",
            "differential_attention_decode",
            "differential_attention_v2",
            "differential_combine",
            "differential_cross_attention",
            "gated_memory",
            "pair_heads",
            "pair_queries",
            "SharedKV",
        ),
        "ops",
    ),
    "YOCOConfig": "config",
    "YOCOForCausalLM": "model",
    "YOCOCache": "cache",
    "generate": "generation",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("compat", "nn", "ops", "reference"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
