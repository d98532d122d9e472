"""Differential attention and gated memory units.

Differential attention (arXiv 2410.05258) is the difference of two softmax attentions over the same values. The two key
heads of a pair lie side by side, so together they are one head of twice the dimension; with the queries laid out as
[q1, 0] and [0, q2], ordinary grouped-query attention computes both softmaxes, reads K and V once for the two of them
and sums their dK and dV itself. One more kernel forms the difference, its norm and the factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yoco_ext import _checks
from yoco_ext.ops._common import (
    NAMESPACE,
    accumulator_dtype,
    autocast,
    call,
    needs_gradient,
    no_second_derivative,
    ops,
    register_gradient,
)
from yoco_ext.ops.attention import attention, cross_attention
from yoco_ext.ops.decode import attention_decode
from yoco_ext.ops.pointwise import swiglu
from yoco_ext.ops.shared_kv import SharedKV


def pair_heads(x: Tensor) -> Tensor:
    """Heads 2h and 2h + 1 as one: [B, T, 2 H, D] -> [B, T, H, 2 D], a view where a token's heads are contiguous."""
    _checks.paired("x", x)
    return x.reshape(x.shape[0], x.shape[1], x.shape[2] // 2, 2 * x.shape[3])


def pair_queries(q: Tensor) -> Tensor:
    """Queries of differential attention against paired keys: [B, T, 2 H, D] -> [B, T, 2 H, 2 D], head 2h = [q1, 0] and
    head 2h + 1 = [0, q2]."""
    _checks.paired("q", q)
    pairs = q.unflatten(2, (-1, 2))
    return torch.diag_embed(pairs.transpose(3, 4), dim1=3, dim2=4).flatten(4, 5).flatten(2, 3)


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
    """What follows the two attentions: x = a[:, :, 2h] - lam a[:, :, 2h + 1], y = x / sqrt(mean(x^2) + eps) * weight *
    scale, the norm per head, float32 inside.

    Args:
        a: [B, T, 2 H, D], last dimension contiguous.
        lam: a number, or a tensor that broadcasts to [B, T, H] (one value, one per head, one per token and head).
        weight: [D] in a's dtype or float32, or None.
        normalize: False leaves the norm out.
        sigmoid: the factor is sigmoid(lam).

    Returns y [B, T, H, D] in a's dtype. Differentiable in a, lam and weight. Raises ValueError for wrong shapes,
    dtypes, devices or values.
    """
    _checks.differential_combine(a, lam, weight, eps, scale)
    shape = (a.shape[0], a.shape[1], a.shape[2] // 2)
    if isinstance(lam, Tensor):
        lam = lam.to(accumulator_dtype(a)).expand(shape)
    else:
        lam = a.new_full((), lam, dtype=accumulator_dtype(a)).expand(shape)
    weight = None if weight is None else weight.contiguous()
    recorded = needs_gradient(a, lam, weight)
    return call(ops.differential_combine.default, recorded, a, lam, weight, normalize, sigmoid, eps, scale)


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
    """RMSNorm(softmax(q1 k1^T) v - lam softmax(q2 k2^T) v) * weight * (1 - lambda_init), one pass over k and v.

    Args:
        q: [B, Tq, 2 H, D]: heads 2h and 2h + 1 are q1 and q2 of differential head h. D up to 128.
        k: [B, Tk, 2 Hkv, D], the same; H is a multiple of Hkv (grouped-query heads).
        v: [B, Tk, Hkv, 2 D], or the same memory as [B, Tk, 2 Hkv, D].
        lam: the whole lambda, lambda_init included: a number, or a tensor that broadcasts to [B, Tq, H].
        weight: [2 D] of the norm, or None.
        scale: factor on the logits; default D ** -0.5.
        options: those of `attention` (causal, window, cu_seqlens_q, ...) but return_lse; sinks and alibi_slopes have
            one entry per softmax, [2 H]; latents are (k, v) of paired heads, [.., N, Hkv, 2 D].

    Returns [B, Tq, H, 2 D]. Differentiable in q, k, v, lam, weight (and sinks, latents). Raises ValueError for wrong
    shapes, dtypes, devices or values.
    """
    _checks.differential_attention(q, k, v, options)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if v.shape[2] == k.shape[2]:
        v = pair_heads(v)
    a = attention(pair_queries(q), pair_heads(k), v, scale=scale, **options)
    return differential_combine(a, lam, weight, eps=eps, scale=1 - lambda_init)


def differential_cross_attention(
    q: Tensor,
    shared_kv: SharedKV,
    lam: Tensor | float,
    weight: Tensor | None = None,
    *,
    lambda_init: float,
    eps: float = 1e-5,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """differential_attention over the K/V that all layers of the cross-decoder share: SharedKV(pair_heads(k), v) with
    k [B, Tk, 2 Hkv, D] and v [B, Tk, Hkv, 2 D]. The rest as there."""
    _checks.shared_kv(shared_kv, "incoming")
    _checks.differential_queries(q, shared_kv.k, "shared_kv.k", options)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    a = cross_attention(pair_queries(q), shared_kv, scale=scale, **options)
    return differential_combine(a, lam, weight, eps=eps, scale=1 - lambda_init)


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
    """differential_attention of a few query tokens [B, T, 2 H, D] against caches of paired heads: k_cache and v_cache
    [B, capacity, Hkv, 2 D] (write them with append_kv(pair_heads(k), v, ...)). options: those of `attention_decode`."""
    _checks.differential_queries(q, k_cache, "k_cache", options)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    a = attention_decode(pair_queries(q), k_cache, v_cache, scale=scale, **options)
    return differential_combine(a, lam, weight, eps=eps, scale=1 - lambda_init)


def differential_attention_v2(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, **options: Any) -> Tensor:
    """Differential attention with twice the query heads, a pair of which shares its keys and values, and without a
    norm: a[2h] - sigmoid(lam) a[2h + 1].

    q [B, Tq, 2 H, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, Dv], H a multiple of Hkv; lam: logits that broadcast to
    [B, Tq, H]. options: those of `attention` but return_lse. Returns [B, Tq, H, Dv]. Over a SharedKV or a cache:
    differential_combine(cross_attention(q, shared_kv), lam, normalize=False, sigmoid=True).
    """
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
    """The gated memory unit of SambaY (arXiv 2507.06607) between its two projections: silu(gate) * memory; with
    `normalize` its RMSNorm in `groups` equal parts of the last dimension, times weight. float32 inside.

    gate, memory [..., dim] of one dtype (cast alike under autocast); weight [dim] in that dtype or float32, only with
    normalize. Returns y like memory. Differentiable in all three. Raises ValueError for wrong shapes, dtypes, devices
    or values.
    """
    if gate.dtype != memory.dtype:
        gate, memory = autocast(gate, memory)
    _checks.gated_memory(gate, memory, weight, normalize, groups, eps)
    if not normalize:
        return swiglu(gate, memory)
    weight = None if weight is None else weight.contiguous()
    recorded = needs_gradient(gate, memory, weight)
    return call(ops.gated_memory.default, recorded, gate, memory, weight, groups, eps)


# ---- autograd ------------------------------------------------------------------------------------------------------
def _combine_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _combine_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    _, need_a, need_lam, need_weight = ctx.needs_input_grad
    a, lam, weight = ctx.saved_tensors
    grads = 1 * need_lam | 2 * need_weight
    d_a, d_lam, d_weight = ops.differential_combine_backward(dy, a, lam, weight, *ctx.options, grads)
    return (
        d_a if need_a else None,
        d_lam if need_lam else None,
        d_weight.to(weight.dtype) if need_weight else None,
    )


def _gated_memory_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _gated_memory_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    _, need_gate, need_memory, need_weight = ctx.needs_input_grad
    gate, memory, weight = ctx.saved_tensors
    d_gate, d_memory, d_weight = ops.gated_memory_backward(dy, gate, memory, weight, *ctx.options)
    return (
        d_gate if need_gate else None,
        d_memory if need_memory else None,
        d_weight.to(weight.dtype) if need_weight else None,
    )


register_gradient("differential_combine", (0, 1, 2), _combine_context, _combine_backward)
register_gradient("gated_memory", (0, 1, 2), _gated_memory_context, _gated_memory_backward)
no_second_derivative(differential_combine_backward=4, gated_memory_backward=4)


# ---- fake (Meta) implementations -----------------------------------------------------------------------------------
@torch.library.register_fake(f"{NAMESPACE}::differential_combine")
def _fake_combine(a: Tensor, lam: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    return a.new_empty((a.shape[0], a.shape[1], a.shape[2] // 2, a.shape[3]))


@torch.library.register_fake(f"{NAMESPACE}::differential_combine_backward")
def _fake_combine_backward(
    dy: Tensor, a: Tensor, lam: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grads = options[-1]
    d_lam = lam.new_empty(lam.shape if grads & 1 else (0,))
    return a.new_empty(a.shape), d_lam, lam.new_empty((a.shape[3],) if grads & 2 and weight is not None else (0,))


@torch.library.register_fake(f"{NAMESPACE}::gated_memory")
def _fake_gated_memory(gate: Tensor, memory: Tensor, weight: Tensor | None, groups: int, eps: float) -> Tensor:
    return memory.new_empty(memory.shape)


@torch.library.register_fake(f"{NAMESPACE}::gated_memory_backward")
def _fake_gated_memory_backward(
    dy: Tensor, gate: Tensor, memory: Tensor, weight: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_weight = memory.new_empty((0,))
    if weight is not None:
        d_weight = memory.new_empty((memory.shape[-1],), dtype=accumulator_dtype(memory))
    return memory.new_empty(memory.shape), memory.new_empty(memory.shape), d_weight
