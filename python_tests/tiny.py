"""Models small enough that a test takes milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yoco_ext import YOCOConfig, YOCOForCausalLM

VOCAB = 61
SELF_DECODERS = ("gated_retention", "sliding_window")


def tiny_config(self_decoder: str = "gated_retention", **overrides: Any) -> YOCOConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_self_heads": 2,
        "self_decoder": self_decoder,
        "window_size": 7,
    }
    return YOCOConfig(**(fields | overrides))


def tiny_model(
    self_decoder: str = "gated_retention",
    ops: str = "fused",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **overrides: Any,
) -> YOCOForCausalLM:
    """Weights are large enough for decays, softmax and norms to matter."""
    model = YOCOForCausalLM(tiny_config(self_decoder, **overrides), ops)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.uniform_(0.5, 1.5)
            elif "gt_proj" in name:
                parameter.mul_(8)
            elif "_proj" in name and "output" not in name:
                parameter.mul_(2)
    return model.to(device, dtype)


def tokens(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randint(VOCAB, shape, device=device)
