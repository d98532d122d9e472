"""rms_norm, rotary, swiglu, retention_output."""

from __future__ import annotations

import torch
from torch import Tensor

from yoco_ext._checks.common import (
    _describe,
    _device,
    _eps,
    _float,
    _head_dim,
    _inv_freq,
    _last_contiguous,
    _offsets,
    _rank,
    _same,
    _shape,
    _weight,
    cu_seqlens,
    fail,
)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None) -> None:
    if not isinstance(x, Tensor) or x.dim() < 1:
        fail("x", _describe(x), "a tensor [..., dim]")
    _float("x", x)
    if x.shape[-1] < 1:
        fail("x", f"shape {list(x.shape)}", "a last dimension of at least 1")
    _weight(weight, x.shape[-1], "x", x)
    if residual is not None:
        if not isinstance(residual, Tensor):
            fail("residual", _describe(residual), "a tensor like x")
        _same("residual", residual, x, "x")
        _shape("residual", residual, x.shape, "the shape of x")
    _eps(eps)


def rotary(
    x: Tensor,
    inv_freq: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    offsets: Tensor | int | None,
    cu: Tensor | None,
) -> int:
    """Returns the number of sequences."""
    _rank("x", x, 4, "[batch, time, heads, dim]")
    _float("x", x)
    _last_contiguous("x", x)
    _head_dim("x", x.shape[3])
    if (inv_freq is None) == (cos is None) or (cos is None) != (sin is None):
        given = [n for n, t in (("inv_freq", inv_freq), ("cos", cos), ("sin", sin)) if t is not None]
        fail("inv_freq", f"{given or None}", "either inv_freq, or both cos and sin")
    if inv_freq is not None:
        _inv_freq(inv_freq, x.shape[3], x)
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and cos is not None:
            _rank(name, table, 2, "[positions, rotary_dim / 2]")
            _shape(name, table, cos.shape, "[positions, rotary_dim / 2], the same for cos and sin")
            if table.dtype != cos.dtype or (table.dtype != x.dtype and table.dtype != torch.float32):
                fail(f"{name}.dtype", table.dtype, f"{x.dtype} (the dtype of x) or torch.float32, the same for both")
            if not 1 <= table.shape[1] <= x.shape[3] // 2:
                fail(name, f"{table.shape[1]} frequencies", f"1 to {x.shape[3] // 2} (half the head dimension)")
            _device(name, table, x)
    sequences = x.shape[0] if cu is None else cu_seqlens("cu_seqlens", cu, x.shape[0], x)
    _offsets(offsets, sequences, x)
    return sequences


def swiglu(gate: Tensor, up: Tensor) -> None:
    if not isinstance(gate, Tensor) or not isinstance(up, Tensor):
        fail("gate, up", f"{_describe(gate)}, {_describe(up)}", "two tensors")
    _float("gate", gate)
    _same("up", up, gate, "gate")
    _shape("up", up, gate.shape, "the shape of gate")


def retention_output(o: Tensor, gate: Tensor, eps: float) -> None:
    _rank("o", o, 4, "[batch, time, heads, dim]")
    _rank("gate", gate, 4, "[batch, time, heads, dim]")
    _float("o", o)
    _same("gate", gate, o, "o")
    _shape("gate", gate, o.shape, "the shape of o")
    _head_dim("o", o.shape[3])
    _last_contiguous("o", o)
    _last_contiguous("gate", gate)
    _eps(eps)
