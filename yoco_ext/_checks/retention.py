"""gated_retention and its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from yoco_ext._checks.common import (
    MAX_STEP_TOKENS,
    _describe,
    _device,
    _eps,
    _float,
    _head_dim,
    _inv_freq,
    _last_contiguous,
    _no_gradient,
    _number,
    _offsets,
    _rank,
    _same,
    _shape,
    cu_seqlens,
    fail,
)


def _retention_tensors(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, normalizer: float | None
) -> tuple[int, int, int, int, int]:
    _rank("q", q, 4, "[batch, time, heads, dim_k]")
    _rank("k", k, 4, "[batch, time, heads, dim_k]")
    _rank("v", v, 4, "[batch, time, heads, dim_v]")
    _rank("g", g, 3, "[batch, time, heads]")
    batch, time, heads, dim_k = q.shape
    dim_v = v.shape[3]
    _float("q", q)
    _same("k", k, q)
    _same("v", v, q)
    _shape("k", k, (batch, time, heads, dim_k), "the shape of q [batch, time, heads, dim_k]")
    _shape("v", v, (batch, time, heads, dim_v), "[batch, time, heads, dim_v] with q's batch, time and heads")
    _shape("g", g, (batch, time, heads), "[batch, time, heads]")
    if g.dtype != q.dtype and g.dtype != torch.float32:
        fail("g.dtype", g.dtype, f"{q.dtype} (the dtype of q) or torch.float32")
    _device("g", g, q)
    _head_dim("q", dim_k)
    _head_dim("v", dim_v)
    _last_contiguous("q", q)
    _last_contiguous("k", k)
    _last_contiguous("v", v)
    if normalizer is not None and (isinstance(normalizer, (Tensor, str, bool)) or not normalizer > 0):
        fail("gate_logit_normalizer", _describe(normalizer), "a positive number, or None (g is the log decay)")
    return batch, time, heads, dim_k, dim_v


def _state(argument: str, state: Any, shape: Sequence[int], q: Tensor) -> None:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if not isinstance(state, Tensor) or state.dtype != dtype:
        fail(argument, _describe(state), f"a {dtype} tensor [sequences, heads, dim_k, dim_v]")
    _shape(argument, state, shape, "[sequences, heads, dim_k, dim_v]")
    _device(argument, state, q)


def _rotary_on_load(inv_freq: Tensor | None, offsets: Tensor | int | None, sequences: int, dim: int, q: Tensor) -> None:
    if inv_freq is not None:
        _inv_freq(inv_freq, dim, q)
        _offsets(offsets, sequences, q)
    elif offsets is not None:
        fail("offsets", _describe(offsets), "None without inv_freq (they are the positions to rotate by)")


def _output_gate(gate: Tensor | None, eps: float, v: Tensor) -> None:
    if gate is None:
        return
    _rank("output_gate", gate, 4, "[batch, time, heads, dim_v]")
    _same("output_gate", gate, v)
    _shape("output_gate", gate, v.shape, "the shape of v [batch, time, heads, dim_v]")
    _last_contiguous("output_gate", gate)
    _eps(eps, "norm_eps")


def gated_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu: Tensor | None,
    normalizer: float | None = None,
    inv_freq: Tensor | None = None,
    offsets: Tensor | int | None = None,
    output_gate: Tensor | None = None,
    norm_eps: float = 0.0,
) -> int:
    """Returns the number of sequences."""
    batch, _, heads, dim_k, dim_v = _retention_tensors(q, k, v, g, normalizer)
    _number("scale", scale)
    sequences = batch if cu is None else cu_seqlens("cu_seqlens", cu, batch, q)
    _rotary_on_load(inv_freq, offsets, sequences, dim_k, q)
    if initial_state is not None:
        _state("initial_state", initial_state, (sequences, heads, dim_k, dim_v), q)
    _output_gate(output_gate, norm_eps, v)
    return sequences


def gated_retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    scale: float | None,
    normalizer: float | None = None,
    inv_freq: Tensor | None = None,
    offsets: Tensor | int | None = None,
    output_gate: Tensor | None = None,
    norm_eps: float = 0.0,
) -> None:
    batch, time, heads, dim_k, dim_v = _retention_tensors(q, k, v, g, normalizer)
    _number("scale", scale)
    _rotary_on_load(inv_freq, offsets, batch, dim_k, q)
    if not 1 <= time <= MAX_STEP_TOKENS:
        fail("q", f"{time} tokens", f"1 to {MAX_STEP_TOKENS} tokens; gated_retention takes any number")
    _state("state", state, (batch, heads, dim_k, dim_v), q)
    _output_gate(output_gate, norm_eps, v)
    gate = () if output_gate is None else (output_gate,)
    _no_gradient("gated_retention_step", "; gated_retention has one", q, k, v, g, state, *gate)
    if not state.is_contiguous():
        fail("state", f"strides {list(state.stride())}", "a contiguous tensor (it is updated in place)")
