"""Norm, rotary embedding, feed-forward, and how a layer finds its ops."""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

OPS = ("fused", "reference")
DECODE_TOKENS = 16  # gated_retention_step and attention_decode take up to this many tokens a call

_modules: dict[str, ModuleType] = {}


def get_ops(name: str) -> ModuleType:
    """`yoco_ext.ops` or `yoco_ext.reference`: the same functions twice."""
    if name not in _modules:
        if name not in OPS:
            raise ValueError(f"ops must be one of {', '.join(OPS)}, got {name!r}")
        _modules[name] = importlib.import_module("yoco_ext.ops" if name == "fused" else "yoco_ext.reference")
    return _modules[name]


def head_dim(hidden_size: int, num_heads: int, num_kv_heads: int | None = None) -> int:
    """Checked where a layer is made, not where its first call fails in a view."""
    if hidden_size % num_heads or hidden_size // num_heads % 8 or hidden_size // num_heads > 256:
        raise ValueError(f"hidden_size / num_heads must be a multiple of 8 up to 256, got {hidden_size} / {num_heads}")
    if num_kv_heads is not None and num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
    return hidden_size // num_heads


class Layer(nn.Module):
    """A module that computes with one of the two sets of ops.

    Only the name is kept in the module: modules are copied and pickled, Python modules are not.
    """

    def __init__(self, ops: str) -> None:
        super().__init__()
        get_ops(ops)
        self.ops_name = ops

    @property
    def ops(self) -> ModuleType:
        return get_ops(self.ops_name)


class RMSNorm(Layer):
    """x / rms(x) * weight, optionally of x + residual, which is then returned too."""

    def __init__(self, dim: int, *, eps: float = 1e-5, ops: str = "fused") -> None:
        super().__init__(ops)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return self._autocast(self.ops.rms_norm(x, self.weight, eps=self.eps))
        y, x = self.ops.rms_norm(x.to(residual.dtype), self.weight, eps=self.eps, residual=residual)
        return self._autocast(y), x

    @staticmethod
    def _autocast(y: Tensor) -> Tensor:
        # Cast once here, not once in each of the linear layers that read y.
        device = y.device.type
        return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y


class RotaryEmbedding(Layer):
    """Rotary position embedding of a head dimension, in one of config.ROPE_STYLES."""

    def __init__(self, dim: int, *, style: str = "official", theta: float = 10_000.0, ops: str = "fused") -> None:
        super().__init__(ops)
        self.dim, self.style, self.theta = dim, style, theta
        self.interleaved = style in ("official", "standard_interleaved")
        self.register_buffer("inv_freq", self._inv_freq(None), persistent=False)

    def _inv_freq(self, device: torch.device | None) -> Tensor | None:
        if self.style == "none":
            return None
        # float32 throughout, as the code bases do whose checkpoints are to be read: at a million positions the
        # rounding of a frequency is visible in the angle.
        if self.style == "official":
            exponent = torch.linspace(0, 1, self.dim // 2, dtype=torch.float32, device=device)
        else:
            exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim
        return 1.0 / self.theta**exponent

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        # .to(bfloat16) must not round the frequencies; .to_empty() must not leave them undefined.
        super()._apply(fn, recurse)
        if self.inv_freq is not None:
            self.inv_freq = self._inv_freq(self.inv_freq.device)
        return self

    def forward(self, x: Tensor, *, offsets: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        if self.inv_freq is None:
            return x
        return self.ops.rotary(x, self.inv_freq, interleaved=self.interleaved, offsets=offsets, cu_seqlens=cu_seqlens)

    def extra_repr(self) -> str:
        return f"{self.dim}, style={self.style!r}, theta={self.theta:g}"


class FeedForward(Layer):
    """SwiGLU: fc2(silu(fc1 x) * gate x). The names are the official code's: fc1 is the side that gets the silu."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, ops: str = "fused") -> None:
        super().__init__(ops)
        self.fc1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.fc2 = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.fc1, self.gate, self.fc2):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ops.swiglu(self.fc1(x), self.gate(x)))
