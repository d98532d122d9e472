"""attention, and what decode has in common with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from yoco_ext._checks.common import (
    _describe,
    _device,
    _float,
    _head_dim,
    _int32,
    _last_contiguous,
    _number,
    _per_head,
    _rank,
    _same,
    _shape,
    cu_seqlens,
    fail,
)


def window(value: Any, argument: str = "window") -> tuple[int, int]:
    """(left, right): keys before and after the diagonal that are visible, -1 = all."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        fail(argument, repr(value), "(left, right), each -1 (unlimited) or a number of keys >= 0")
    left, right = value
    if isinstance(left, (bool, float)) or isinstance(right, (bool, float)) or left < -1 or right < -1:
        fail(argument, repr(value), "(left, right), each -1 (unlimited) or a number of keys >= 0")
    return left, right


def _latents(latents: Any, batch: int, heads_kv: int, dim_qk: int, dim_v: int, q: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(latents, (tuple, list)) or len(latents) != 2:
        fail("latents", type(latents).__name__, "a pair (k, v) of tensors")
    k, v = latents
    _rank("latents[0]", k, 4, "[batch or 1, latents, heads_kv, dim_qk]")
    _rank("latents[1]", v, 4, "[batch or 1, latents, heads_kv, dim_v]")
    _same("latents[0]", k, q)
    _same("latents[1]", v, q)
    if k.shape[0] != 1 and k.shape[0] != batch:
        fail("latents[0]", f"batch {k.shape[0]}", f"{batch} or 1")
    _shape("latents[0]", k, (k.shape[0], k.shape[1], heads_kv, dim_qk), "[batch or 1, latents, heads_kv, dim_qk]")
    _shape("latents[1]", v, (k.shape[0], k.shape[1], heads_kv, dim_v), "[batch or 1, latents, heads_kv, dim_v]")
    _last_contiguous("latents[0]", k)
    _last_contiguous("latents[1]", v)
    return k, v


def qkv(q: Tensor, k: Tensor, v: Tensor, k_name: str = "k", v_name: str = "v") -> tuple[int, int, int, int]:
    """Returns (batch, time_q, heads_q, heads_kv)."""
    _rank("q", q, 4, "[batch, time_q, heads_q, dim_qk]")
    _rank(k_name, k, 4, "[batch, time_k, heads_kv, dim_qk]")
    _rank(v_name, v, 4, "[batch, time_k, heads_kv, dim_v]")
    _float("q", q)
    batch, time_q, heads_q, dim_qk = q.shape
    batch_k, time_k, heads_kv, dim_k = k.shape
    batch_v, time_v, heads_v, dim_v = v.shape
    if dim_k != dim_qk:
        fail(k_name, f"head dimension {dim_k}", f"{dim_qk}, the head dimension of q")
    if batch_v != batch_k or time_v != time_k or heads_v != heads_kv:
        fail(v_name, f"shape {list(v.shape)}", f"{list(k.shape[:3])} + [dim_v], like {k_name}")
    if heads_kv < 1 or heads_q < 1 or heads_q % heads_kv != 0:
        fail("q", f"{heads_q} heads over {heads_kv} heads of {k_name}", f"a multiple of the heads of {k_name}")
    _head_dim("q", dim_qk)
    _head_dim(v_name, dim_v)
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        _last_contiguous("q", q)
        _last_contiguous(k_name, k)
        _last_contiguous(v_name, v)
    return batch, time_q, heads_q, heads_kv


def shared_kv(x: Any, method: str = "options") -> None:
    """The K and V of a cross-decoder. method: what the set of ops calls on it."""
    if not hasattr(x, method):
        fail("shared_kv", type(x).__name__, "a SharedKV(k, v) of the same set of ops")


def _logit_options(
    q: Tensor, heads: int, sequences: int, scale: Any, softcap: Any, sinks: Tensor | None, alibi_slopes: Tensor | None
) -> None:
    _number("scale", scale)
    _number("softcap", softcap, "a number >= 0 (0: none)")
    if softcap is None or not softcap >= 0:
        fail("softcap", softcap, "a number >= 0 (0: none)")
    if sinks is not None:
        _per_head("sinks", sinks, heads, q)
    if alibi_slopes is not None:
        if not isinstance(alibi_slopes, Tensor) or not alibi_slopes.is_floating_point():
            fail("alibi_slopes", _describe(alibi_slopes), "a floating-point tensor [heads_q] or [sequences, heads_q]")
        if tuple(alibi_slopes.shape) not in ((heads,), (sequences, heads)):
            fail("alibi_slopes", f"shape {list(alibi_slopes.shape)}", f"[{heads}] or [{sequences}, {heads}]")
        if alibi_slopes.requires_grad:
            fail("alibi_slopes", "a tensor that requires a gradient", "a constant (pass alibi_slopes.detach())")
        _device("alibi_slopes", alibi_slopes, q)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_k: Tensor | None,
    prefix_len: Tensor | None,
    latents: Any,
    latent_begin: Tensor | None,
    latent_end: Tensor | None,
) -> tuple[int, int]:
    """Returns (window_left, window_right) with causal folded in; -1 = unlimited."""
    batch, time_q, heads_q, heads_kv = qkv(q, k, v)
    _same("k", k, q)
    _same("v", v, q)
    if k.shape[0] != batch:
        fail("k", f"batch {k.shape[0]}", f"{batch}, the batch of q")
    sequences = batch
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
            fail(missing, None, "both cu_seqlens_q and cu_seqlens_k, or neither")
        sequences = cu_seqlens("cu_seqlens_q", cu_seqlens_q, batch, q)
        if cu_seqlens("cu_seqlens_k", cu_seqlens_k, batch, q) != sequences:
            fail("cu_seqlens_k", f"{cu_seqlens_k.shape[0]} entries", f"{sequences + 1}, as in cu_seqlens_q")
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if bound is not None and (isinstance(bound, (Tensor, float, str)) or bound < 0):
            fail(name, _describe(bound), "an integer >= 0 or None")
    if seqused_k is not None:
        _int32("seqused_k", seqused_k, (sequences,), "[sequences]", q)
    left, right = window(window_size)
    if causal:
        right = 0
    if prefix_len is not None:
        _int32("prefix_len", prefix_len, (batch, time_q), "[batch, time_q]", q)
        if tuple(window_size) != (-1, -1):
            fail("window", tuple(window_size), "(-1, -1) together with prefix_len, which replaces causal and window")
        left, right = -1, -1
    _logit_options(q, heads_q, sequences, scale, softcap, sinks, alibi_slopes)
    if latents is not None:
        _latents(latents, batch, heads_kv, q.shape[3], v.shape[3], q)
    for name, bound in (("latent_begin", latent_begin), ("latent_end", latent_end)):
        if bound is not None:
            if latents is None:
                fail(name, "a tensor without latents", "None, or latents=(k, v) as well")
            _int32(name, bound, (batch, time_q), "[batch, time_q]", q)
    return left, right
