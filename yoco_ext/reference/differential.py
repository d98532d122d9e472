"""Differential attention and gated memory units in plain PyTorch, written as their definitions: two attentions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yoco_ext import _checks
from yoco_ext.reference.attention import SharedKV, attention
from yoco_ext.reference.decode import attention_decode
from yoco_ext.reference.pointwise import compute_dtype, swiglu


def pair_heads(x: Tensor) -> Tensor:
    """Heads 2h and 2h + 1 as one: [B, T, 2 H, D] -> [B, T, H, 2 D]."""
    _checks.paired("x", x)
    return x.reshape(x.shape[0], x.shape[1], x.shape[2] // 2, 2 * x.shape[3])


def pair_queries(q: Tensor) -> Tensor:
    """[B, T, 2 H, D] -> [B, T, 2 H, 2 D], head 2h = [q1, 0] and head 2h + 1 = [0, q2]."""
    _checks.paired("q", q)
    q1, q2 = q[:, :, 0::2], q[:, :, 1::2]
    zero = torch.zeros_like(q1)
    return torch.stack([torch.cat([q1, zero], -1), torch.cat([zero, q2], -1)], 3).flatten(2, 3)


def differential_combine(
    a: Tensor,
    lam: Tensor | float,
    weight: Tensor | None = None,
    *,
    normalize: bool = True,
    sigmoid: bool = False,
    eps: float = 1e-5,
    scale: float = 1.0,
) -> Tensor:
    """a[:, :, 2h] - lam a[:, :, 2h + 1], its RMSNorm per head, times weight and scale; a [B, T, 2 H, D]."""
    _checks.differential_combine(a, lam, weight, eps, scale)
    wide = a.to(compute_dtype(a))
    lam = torch.as_tensor(lam, device=a.device).to(wide.dtype)
    lam = torch.sigmoid(lam) if sigmoid else lam
    lam = lam.expand(a.shape[0], a.shape[1], a.shape[2] // 2)[..., None]
    x = wide[:, :, 0::2] - lam * wide[:, :, 1::2]
    if normalize:
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        x = x * weight.to(wide.dtype)
    return (x * scale).to(a.dtype)


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | float,
    weight: Tensor | None = None,
    *,
    lambda_init: float,
    eps: float = 1e-5,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """RMSNorm(attention(q1, k1, v) - lam attention(q2, k2, v)) * weight * (1 - lambda_init)."""
    _checks.differential_attention(q, k, v, options)
    if v.shape[2] == k.shape[2]:
        v = pair_heads(v)
    sides = []
    for side in (0, 1):
        mine = {**options}
        for name in ("sinks", "alibi_slopes"):
            if mine.get(name) is not None:
                mine[name] = mine[name][..., side::2]
        if mine.get("latents") is not None:
            latent_k, latent_v = mine["latents"]  # of paired heads
            mine["latents"] = (latent_k.chunk(2, -1)[side], latent_v)
        sides.append(attention(q[:, :, side::2], k[:, :, side::2], v, scale=scale, **mine))
    a = torch.stack(sides, 3).flatten(2, 3)
    return differential_combine(a, lam, weight, eps=eps, scale=1 - lambda_init)


def differential_cross_attention(
    q: Tensor, shared_kv: SharedKV, lam: Tensor | float, weight: Tensor | None = None, **options: Any
) -> Tensor:
    """differential_attention over SharedKV(pair_heads(k), v)."""
    _checks.shared_kv(shared_kv)
    _checks.differential_queries(q, shared_kv.k, "shared_kv.k", options)
    k = shared_kv.k.unflatten(3, (2, -1)).flatten(2, 3)
    return differential_attention(q, k, shared_kv.v, lam, weight, **{**shared_kv.options(), **options})


def differential_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lam: Tensor | float,
    weight: Tensor | None = None,
    *,
    lambda_init: float,
    eps: float = 1e-5,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """differential_attention of a few query tokens against caches of paired heads [B, capacity, Hkv, 2 D]."""
    _checks.differential_queries(q, k_cache, "k_cache", options)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    a = attention_decode(pair_queries(q), k_cache, v_cache, scale=scale, **options)
    return differential_combine(a, lam, weight, eps=eps, scale=1 - lambda_init)


def differential_attention_v2(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, **options: Any) -> Tensor:
    """attention(q)[2h] - sigmoid(lam) attention(q)[2h + 1]; a pair of query heads shares its K/V head."""
    _checks.differential_v2(q, k, options)
    return differential_combine(attention(q, k, v, **options), lam, normalize=False, sigmoid=True)


def gated_memory(
    gate: Tensor,
    memory: Tensor,
    weight: Tensor | None = None,
    *,
    normalize: bool = False,
    groups: int = 1,
    eps: float = 1e-5,
) -> Tensor:
    """silu(gate) * memory; with `normalize` the RMSNorm of each of `groups` parts, times weight."""
    _checks.gated_memory(gate, memory, weight, normalize, groups, eps)
    if not normalize:
        return swiglu(gate, memory)
    wide = gate.to(compute_dtype(gate))
    x = (memory.to(wide.dtype) * wide * torch.sigmoid(wide)).unflatten(-1, (groups, -1))
    x = (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        x = x * weight.to(wide.dtype)
    return x.to(memory.dtype)
