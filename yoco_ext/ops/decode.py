"""Decoding: a few query tokens against a long cache (contiguous, paged or ring; possibly quantised), and appending."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yoco_ext import _checks
from yoco_ext.ops._common import NAMESPACE, accumulator_dtype, autocast, call, ops


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqused_k: Tensor,
    block_table: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    latents: tuple[Tensor, Tensor] | None = None,
    latent_len: Tensor | None = None,
    ring: bool = False,
    num_splits: int = 0,
    return_lse: bool = False,
) -> Any:
    """attention of the last 1 to 16 tokens of each sequence against its cache. No gradients, no host synchronisation.

    Args:
        q: [B, Tq, Hq, Dqk], Tq 1 to 16: the newest tokens, aligned bottom-right to seqused_k.
        k_cache, v_cache: [B, capacity, Hkv, D], or with block_table [pages, page_size, Hkv, D]; dtype of q, float8
            e4m3 or int8.
        seqused_k: int32 [B], tokens in the cache, the Tq new ones (already appended) included.
        block_table: int32 [B, max_pages], the pages of each sequence in order.
        causal, window, scale, softcap, sinks, alibi_slopes, return_lse: as in `attention`.
        k_scale, v_scale: float32 [Hkv]: value = stored * scale; default 1.
        latents: (k, v) [B or 1, N, Hkv, D] in q's dtype, a second segment under the same softmax; latent_len int32 [B]:
            how many of them a sequence sees (default all).
        ring: position p lives in slot p % capacity; needs a window with capacity >= left + Tq.
        num_splits: pieces the cache is cut into; 0 = chosen by the back end. Results repeat bit for bit for a number.

    Returns:
        out [B, Tq, Hq, Dv], or (out, lse [B, Hq, Tq]).

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: seqused_k, block_table or latent_len out of range (CPU), or not supported by this back end.
    """
    if latents is None:
        (q,) = autocast(q)
    else:
        q, *latents = autocast(q, *latents)  # type: ignore[assignment]
    left, right = _checks.attention_decode(
        q,
        k_cache,
        v_cache,
        seqused_k=seqused_k,
        block_table=block_table,
        causal=causal,
        window_size=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        k_scale=k_scale,
        v_scale=v_scale,
        latents=latents,
        latent_len=latent_len,
        ring=ring,
        num_splits=num_splits,
    )
    out, lse = call(
        ops.attention_decode.default,
        False,
        q,
        k_cache,
        v_cache,
        seqused_k,
        block_table,
        None if sinks is None else sinks.float().contiguous(),
        None if alibi_slopes is None else alibi_slopes.float().contiguous(),
        k_scale,
        v_scale,
        None if latents is None else latents[0],
        None if latents is None else latents[1],
        latent_len,
        q.shape[3] ** -0.5 if scale is None else scale,
        left,
        right,
        softcap,
        ring,
        num_splits,
    )
    return (out, lse) if return_lse else out


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqused_k: Tensor,
    block_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    inv_freq: Tensor | None = None,
    interleaved: bool = False,
    ring: bool = False,
) -> None:
    """Writes new keys and values behind the tokens a cache already holds, in place. No gradients.

    Token i of sequence b goes to position seqused_k[b] + i, quantised to the dtype of the cache.

    Args:
        k, v: [B, T, H, D], or packed [1, total, H, D] with cu_seqlens int32 [N + 1].
        k_cache, v_cache, block_table, ring: as in `attention_decode`. In a ring a later token overwrites an earlier.
        seqused_k: int32 [B or N], tokens in the cache BEFORE this call.
        k_scale, v_scale: float32 [H]: stored = value / scale; default 1.
        inv_freq: float32 [rotary_dim / 2]: k is rotated by its position before it is stored; `interleaved` as in
            `rotary`.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: a position or page out of range (CPU), or not supported by this back end.
    """
    k, v = autocast(k, v)
    _checks.append_kv(
        k,
        v,
        k_cache,
        v_cache,
        seqused_k=seqused_k,
        block_table=block_table,
        cu=cu_seqlens,
        k_scale=k_scale,
        v_scale=v_scale,
        inv_freq=inv_freq,
        ring=ring,
    )
    call(
        ops.append_kv.default,
        False,
        k,
        v,
        k_cache,
        v_cache,
        seqused_k,
        block_table,
        cu_seqlens,
        k_scale,
        v_scale,
        inv_freq,
        interleaved,
        ring,
    )


# ---- fake (Meta) implementations -----------------------------------------------------------------------------------
@torch.library.register_fake(f"{NAMESPACE}::attention_decode")
def _fake_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _checks.qkv(q, k_cache, v_cache, "k_cache", "v_cache")
    batch, time, heads, _ = q.shape
    lse = q.new_empty((batch, heads, time), dtype=accumulator_dtype(q))
    return q.new_empty((batch, time, heads, v_cache.shape[3])), lse


@torch.library.register_fake(f"{NAMESPACE}::append_kv")
def _fake_append(*arguments: Any) -> None:
    return None
