"""attention_decode and append_kv: what is asked of a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yoco_ext._checks.attention import _latents, _logit_options, qkv, window
from yoco_ext._checks.common import (
    MAX_STEP_TOKENS,
    _describe,
    _device,
    _float,
    _head_dim,
    _int32,
    _inv_freq,
    _last_contiguous,
    _no_gradient,
    _per_head,
    _rank,
    _same,
    _shape,
    cu_seqlens,
    fail,
)


def _cache(x: Tensor, k_cache: Tensor, v_cache: Tensor, sequences: int, block_table: Tensor | None, ring: bool) -> None:
    """Contiguous [sequences, capacity, heads, dim] or paged [num_pages, page_size, heads, dim]."""
    if k_cache.dtype not in (x.dtype, torch.float8_e4m3fn, torch.int8):
        fail("k_cache.dtype", k_cache.dtype, f"{x.dtype} (that of the tokens), torch.float8_e4m3fn or torch.int8")
    if v_cache.dtype != k_cache.dtype:
        fail("v_cache.dtype", v_cache.dtype, f"{k_cache.dtype}, the dtype of k_cache")
    _device("k_cache", k_cache, x)
    _device("v_cache", v_cache, x)
    if block_table is None:
        if k_cache.shape[0] != sequences:
            fail("k_cache", f"batch {k_cache.shape[0]}", f"{sequences}, one row per sequence (or pass block_table)")
        return
    if not isinstance(block_table, Tensor) or block_table.dtype != torch.int32 or block_table.dim() != 2:
        fail("block_table", _describe(block_table), "an int32 tensor [sequences, max_pages]")
    _shape("block_table", block_table, (sequences, block_table.shape[1]), "[sequences, max_pages]")
    _device("block_table", block_table, x)
    if not block_table.is_contiguous():
        fail("block_table", f"strides {list(block_table.stride())}", "a contiguous tensor")
    if ring:
        fail("ring", True, "False with block_table: a ring buffer is contiguous")


def _cache_scales(k_scale: Tensor | None, v_scale: Tensor | None, k_cache: Tensor) -> None:
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            _per_head(name, scale, k_cache.shape[2], k_cache)
            if scale.dtype != torch.float32:
                fail(f"{name}.dtype", scale.dtype, "torch.float32")
            if not scale.is_contiguous():
                fail(name, f"strides {list(scale.stride())}", "a contiguous tensor")


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqused_k: Tensor,
    block_table: Tensor | None,
    causal: bool,
    window_size: Any,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    latents: Any,
    latent_len: Tensor | None,
    ring: bool,
    num_splits: int,
) -> tuple[int, int]:
    """Returns (window_left, window_right) with causal folded in; -1 = unlimited."""
    batch, time_q, heads_q, _ = qkv(q, k_cache, v_cache, "k_cache", "v_cache")
    if not 1 <= time_q <= MAX_STEP_TOKENS:
        fail("q", f"{time_q} tokens", f"1 to {MAX_STEP_TOKENS} tokens; attention takes any number")
    _no_gradient("attention_decode", "; attention has one", q, k_cache, v_cache)
    _cache(q, k_cache, v_cache, batch, block_table, ring)
    _int32("seqused_k", seqused_k, (batch,), "[batch]", q)
    left, right = window(window_size)
    if causal:
        right = 0
    _logit_options(q, heads_q, batch, scale, softcap, sinks, alibi_slopes)
    _cache_scales(k_scale, v_scale, k_cache)
    if latents is not None:
        _latents(latents, batch, k_cache.shape[2], q.shape[3], v_cache.shape[3], q)
    if latent_len is not None:
        if latents is None:
            fail("latent_len", "a tensor without latents", "None, or latents=(k, v) as well")
        _int32("latent_len", latent_len, (batch,), "[batch]", q)
    if isinstance(num_splits, (Tensor, float)) or num_splits < 0:
        fail("num_splits", num_splits, "an integer >= 0 (0: chosen by the back end)")
    return left, right


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqused_k: Tensor,
    block_table: Tensor | None,
    cu: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    inv_freq: Tensor | None,
    ring: bool,
) -> None:
    _rank("k", k, 4, "[batch, time, heads, dim_k]")
    _rank("v", v, 4, "[batch, time, heads, dim_v]")
    _rank("k_cache", k_cache, 4, "[batch, capacity, heads, dim_k] or [pages, page_size, heads, dim_k]")
    _rank("v_cache", v_cache, 4, "[batch, capacity, heads, dim_v] or [pages, page_size, heads, dim_v]")
    _float("k", k)
    _same("v", v, k, "k")
    batch, _, heads, dim_k = k.shape
    _shape("v", v, (*k.shape[:3], v.shape[3]), "[batch, time, heads, dim_v] with k's batch, time and heads")
    _shape("k_cache", k_cache, (*k_cache.shape[:2], heads, dim_k), "[..., ..., heads, dim_k]")
    _shape("v_cache", v_cache, (*k_cache.shape[:2], heads, v.shape[3]), "[..., ..., heads, dim_v] like k_cache")
    _head_dim("k", dim_k)
    _head_dim("v", v.shape[3])
    for name, x in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _last_contiguous(name, x)
    sequences = batch if cu is None else cu_seqlens("cu_seqlens", cu, batch, k)
    _no_gradient("append_kv", "", k, v, k_cache, v_cache)
    _cache(k, k_cache, v_cache, sequences, block_table, ring)
    _int32("seqused_k", seqused_k, (sequences,), "[sequences]", k)
    _cache_scales(k_scale, v_scale, k_cache)
    if inv_freq is not None:
        _inv_freq(inv_freq, dim_k, k)
