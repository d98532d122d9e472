"""Differential attention and the gated memory unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from yoco_ext._checks.common import (
    MAX_HEAD_DIM,
    _describe,
    _device,
    _eps,
    _float,
    _head_dim,
    _last_contiguous,
    _number,
    _rank,
    _same,
    _shape,
    _weight,
    fail,
)


def paired(argument: str, x: Any) -> None:
    """Heads 2h and 2h + 1 belong together."""
    _rank(argument, x, 4, "[batch, time, 2 * heads, dim]")
    if x.shape[2] % 2 != 0:
        fail(argument, f"{x.shape[2]} heads", "an even number (heads 2h and 2h + 1 are a pair)")


def differential_combine(a: Tensor, lam: Any, weight: Tensor | None, eps: float, scale: float) -> None:
    paired("a", a)
    _float("a", a)
    _head_dim("a", a.shape[3])
    _last_contiguous("a", a)
    if isinstance(lam, Tensor):
        shape = (a.shape[0], a.shape[1], a.shape[2] // 2)
        padded = (1,) * (3 - lam.dim()) + tuple(lam.shape)
        if not lam.is_floating_point() or len(padded) != 3 or any(n not in (1, m) for n, m in zip(padded, shape)):
            fail("lam", _describe(lam), f"a number, or a floating-point tensor that broadcasts to {list(shape)}")
        _device("lam", lam, a)
    elif lam is None:
        fail("lam", lam, "a number or a tensor")
    else:
        _number("lam", lam)
    _weight(weight, a.shape[3], "a", a)
    _eps(eps)
    _number("scale", scale, "a number")


def _differential_options(options: Mapping[str, Any]) -> None:
    if options.get("return_lse"):
        fail("return_lse", True, "False: differential attention has two softmaxes and no one log-sum-exp")


def differential_attention(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> None:
    for name, x in (("q", q), ("k", k)):
        paired(name, x)
    _rank("v", v, 4, "[batch, time, heads, 2 * dim]")
    _differential_options(options)
    dim, heads = q.shape[3], k.shape[2] // 2
    if k.shape[3] != dim:
        fail("k", f"head dimension {k.shape[3]}", f"{dim}, that of q")
    if dim % 8 != 0 or not 8 <= dim <= MAX_HEAD_DIM // 2:
        fail("q", f"head dimension {dim}", f"a multiple of 8 from 8 to {MAX_HEAD_DIM // 2}")
    if (v.shape[2], v.shape[3]) not in ((heads, 2 * dim), (2 * heads, dim)):
        fail("v", f"shape {list(v.shape)}", f"[batch, time, {heads}, {2 * dim}] or [batch, time, {2 * heads}, {dim}]")


def differential_queries(q: Tensor, keys: Any, name: str, options: Mapping[str, Any]) -> None:
    """Queries against keys whose heads are paired already."""
    paired("q", q)
    _differential_options(options)
    _rank(name, keys, 4, "[batch, time, heads, 2 * dim]")
    if keys.shape[3] != 2 * q.shape[3]:
        fail(name, f"head dimension {keys.shape[3]}", f"{2 * q.shape[3]}, twice that of q (see pair_heads)")


def differential_v2(q: Tensor, k: Tensor, options: Mapping[str, Any]) -> None:
    paired("q", q)
    _rank("k", k, 4, "[batch, time, heads, dim]")
    _differential_options(options)
    if k.shape[2] == 0 or (q.shape[2] // 2) % k.shape[2] != 0:
        fail(
            "q",
            f"{q.shape[2]} heads",
            f"a multiple of {2 * k.shape[2]}: pairs that share one of the {k.shape[2]} K/V heads",
        )


def gated_memory(gate: Tensor, memory: Tensor, weight: Tensor | None, normalize: bool, groups: int, eps: float) -> None:
    for name, x in (("gate", gate), ("memory", memory)):
        if not isinstance(x, Tensor) or x.dim() < 1:
            fail(name, _describe(x), "a tensor [..., dim]")
    _float("memory", memory)
    _same("gate", gate, memory, "memory")
    _shape("gate", gate, memory.shape, "the shape of memory")
    _eps(eps)
    if not normalize:
        if weight is not None or groups != 1:
            fail("normalize", normalize, "True where weight or groups are given")
        return
    dim = memory.shape[-1]
    if not isinstance(groups, int) or groups < 1 or dim < 1 or dim % groups != 0:
        fail("groups", groups, f"a divisor of the last dimension, {dim}")
    _weight(weight, dim, "memory", memory)
