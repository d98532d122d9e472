"""Decoding over a cache in plain PyTorch: read a contiguous, paged or ring cache, write new tokens behind it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from yoco_ext import _checks
from yoco_ext.reference.attention import attention
from yoco_ext.reference.pointwise import compute_dtype, rotary_angles, rotate

INT8_MAX = 127.0
FLOAT8_MAX = 448.0


def cache_capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """Tokens that one sequence's part of the cache can hold."""
    return cache.shape[1] if block_table is None else block_table.shape[1] * cache.shape[1]


def cache_slots(
    cache: Tensor, block_table: Tensor | None, sequence: int, positions: Tensor, ring: bool
) -> tuple[Tensor | int, Tensor]:
    """Indices (first dimension, second dimension) in a cache tensor of `positions` of one sequence.

    Contiguous [B, capacity, H, D]: (sequence, slot). Paged [pages, page_size, H, D]: (page, slot in the page).
    """
    slots = positions % cache_capacity(cache, block_table) if ring else positions
    if block_table is None:
        return sequence, slots
    page_size = cache.shape[1]
    pages = block_table[sequence].to(torch.int64)[slots // page_size]
    if pages.numel() and (int(pages.min()) < 0 or int(pages.max()) >= cache.shape[0]):
        used = f"pages {int(pages.min())} to {int(pages.max())}"
        _checks.fail(f"block_table[{sequence}]", used, f"0 to {cache.shape[0] - 1}")
    return pages, slots % page_size


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of 1 to 16 new tokens per sequence, q [B, Tq, Hq, Dq], over what the cache holds.

    seqused_k [B] counts the tokens so far, the Tq query tokens included: query i sits at position
    seqused_k - Tq + i. A ring cache still holds the last `capacity` of them. k_scale and v_scale [Hkv] turn stored
    numbers back into values. Of the latents, the first latent_len are seen by every query of the sequence.
    """
    left, _ = _checks.attention_decode(
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
    batch, time = q.shape[:2]
    capacity = cache_capacity(k_cache, block_table)
    if ring and not 0 <= left <= capacity - time:
        _checks.fail("window", window, f"a left side of 0 to {capacity - time}: the ring holds {capacity} tokens")

    def values(cache: Tensor, scales: Tensor | None, sequence: int, positions: Tensor) -> Tensor:
        stored = cache[cache_slots(cache, block_table, sequence, positions, ring)]
        if scales is not None:
            stored = stored.to(compute_dtype(q)) * scales[:, None]
        return stored.to(q.dtype)

    outs, lses = [], []
    for b in range(batch):
        used = int(seqused_k[b])
        if used < 0 or (used > capacity and not ring):
            _checks.fail(f"seqused_k[{b}]", used, f"0 to {capacity}, the capacity of the cache")
        positions = torch.arange(max(0, used - capacity), used, device=q.device)
        latent_rows = latent_end = None
        if latents is not None:
            latent_rows = tuple(x[b if x.shape[0] > 1 else 0].unsqueeze(0) for x in latents)
            if latent_len is not None:
                held = int(latent_len[b])
                if not 0 <= held <= latents[0].shape[1]:
                    _checks.fail(f"latent_len[{b}]", held, f"0 to {latents[0].shape[1]}")
                latent_end = latent_len[b].expand(1, time).contiguous()
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b if slopes.shape[0] > 1 else 0]
        out, lse = attention(
            q[b : b + 1],
            values(k_cache, k_scale, b, positions).unsqueeze(0),
            values(v_cache, v_scale, b, positions).unsqueeze(0),
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
            sinks=sinks,
            alibi_slopes=slopes,
            latents=latent_rows,
            latent_end=latent_end,
            return_lse=True,
        )
        outs.append(out)
        lses.append(lse)
    if not outs:
        out = q.new_zeros(0, time, q.shape[2], v_cache.shape[3])
        lse = q.new_zeros(0, q.shape[2], time, dtype=compute_dtype(q))
    else:
        out, lse = torch.cat(outs), torch.cat(lses)
    return (out, lse) if return_lse else out


def quantise(x: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rounds x [..., heads, dim] / scale to the numbers that a cache of `dtype` stores, saturating."""
    if scales is not None:
        x = x / scales.to(x.dtype)[:, None]
    if dtype == torch.int8:
        return torch.round(torch.nan_to_num(x, nan=0.0)).clamp(-INT8_MAX, INT8_MAX).to(dtype)
    if dtype == torch.float8_e4m3fn:
        # By way of float32: a direct float64 cast is the same number, and not every device has it.
        return x.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float32).to(dtype)
    return x.to(dtype)


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
    """Writes k, v [B, T, Hkv, D] behind the seqused_k [B] tokens that each sequence already has in the cache.

    With inv_freq, k is rotated by its position before it is rounded to the cache dtype. In a ring cache a later token
    overwrites an earlier one.
    """
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
    wide = compute_dtype(k)
    capacity = cache_capacity(k_cache, block_table)
    if cu_seqlens is None:
        rows = [(k[b], v[b]) for b in range(k.shape[0])]
    else:
        bounds = _checks.boundaries("cu_seqlens", cu_seqlens, k.shape[1])
        rows = [(k[0, a:z], v[0, a:z]) for a, z in itertools.pairwise(bounds)]

    writes = []  # everything is checked before anything is written
    for n, (k_rows, v_rows) in enumerate(rows):
        used, new = int(seqused_k[n]), k_rows.shape[0]
        if used < 0 or (used + new > capacity and not ring):
            _checks.fail(f"seqused_k[{n}]", f"{used} (and {new} new tokens)", f"0 to {capacity - new}")
        first = max(0, new - capacity)
        positions = torch.arange(used + first, used + new, device=k.device)
        slots = cache_slots(k_cache, block_table, n, positions, ring)
        writes.append((k_rows[first:].to(wide), v_rows[first:].to(wide), positions, slots))

    for k_rows, v_rows, positions, slots in writes:
        if inv_freq is not None:
            angles = rotary_angles(positions, inv_freq).unsqueeze(1)
            k_rows = rotate(k_rows, torch.cos(angles).to(wide), torch.sin(angles).to(wide), interleaved)
        k_cache[slots] = quantise(k_rows, k_scale, k_cache.dtype)
        v_cache[slots] = quantise(v_rows, v_scale, v_cache.dtype)
