"""Attention over keys and values: causal, windowed, packed, with prefix rows and latents; forward and backward."""

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
from yoco_ext.ops.shared_kv import SharedKV

# Places among the arguments of the op (csrc/torch/schemas.h) and the bits of `grads` there.
_Q, _K, _V, _SINKS, _LATENT_K, _LATENT_V = 0, 1, 2, 3, 9, 10
_TENSORS = 13  # q ... latent_end
_INPUTS = 19  # up to softcap, shared by forward and backward
_TOKEN_K, _TOKEN_V = 20, 21
_GRAD_Q, _GRAD_KV, _GRAD_LATENTS, _GRAD_SINKS = 1, 2, 4, 8


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    prefix_len: Tensor | None = None,
    latents: tuple[Tensor, Tensor] | None = None,
    latent_begin: Tensor | None = None,
    latent_end: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Any, ...]:
    """Checks, and the arguments in the order of the op's schema."""
    if latents is None:
        q, k, v = autocast(q, k, v)
    else:
        q, k, v, *latents = autocast(q, k, v, *latents)  # type: ignore[assignment]
    left, right = _checks.attention(
        q,
        k,
        v,
        scale=scale,
        causal=causal,
        window_size=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k,
        prefix_len=prefix_len,
        latents=latents,
        latent_begin=latent_begin,
        latent_end=latent_end,
    )
    if sinks is not None:
        sinks = sinks.float().contiguous()
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.float().contiguous()
    latent_k, latent_v = (None, None) if latents is None else latents
    return (
        q,
        k,
        v,
        sinks,
        alibi_slopes,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        prefix_len,
        latent_k,
        latent_v,
        latent_begin,
        latent_end,
        -1 if max_seqlen_q is None else max_seqlen_q,
        -1 if max_seqlen_k is None else max_seqlen_k,
        q.shape[3] ** -0.5 if scale is None else scale,
        left,
        right,
        softcap,
        deterministic,
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    prefix_len: Tensor | None = None,
    latents: tuple[Tensor, Tensor] | None = None,
    latent_begin: Tensor | None = None,
    latent_end: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Any:
    """softmax(scale * q k^T + masks) v, with float32 softmax, O(time) memory, and gradients for q, k, v, sinks and
    latents, also through lse.

    Shapes: q [B, Tq, Hq, Dqk], k [B, Tk, Hkv, Dqk], v [B, Tk, Hkv, Dv] -> [B, Tq, Hq, Dv]. Query head h uses K/V head
    h // (Hq // Hkv). Head dimensions: multiples of 8 up to 256. Any lengths, 0 included. Any strides with a contiguous
    last dimension. dtypes: bfloat16, float16, float32, on the CPU float64. Under autocast q, k, v and latents are cast
    to the autocast dtype. The same options in yoco_ext.reference.attention, whose source is the definition.

    Options:
        scale: factor on the logits; default Dqk ** -0.5.
        causal: row i sees keys up to the diagonal, aligned bottom-right: j <= i + Tk - Tq. Default True.
        window: (left, right) keys before and after the diagonal that are visible; -1 = all. causal makes right 0.
        softcap: s -> softcap * tanh(s / softcap); 0 = none.
        sinks: [Hq], one extra logit per head in the denominator of the softmax, counted in lse. Differentiable.
        alibi_slopes: [Hq] or [sequences, Hq]: adds -slope * |i + Tk - Tq - j|, after softcap. Constant.
        cu_seqlens_q, cu_seqlens_k: int32 [N + 1], boundaries of N packed sequences (then B = 1). Rows of no sequence
            give 0 (lse -inf). max_seqlen_q, max_seqlen_k: upper bounds of the lengths, save work when given.
        seqused_k: int32 [sequences], keys really there; the rest is never read.
        prefix_len: int32 [B, Tq]: row i sees keys 0 .. prefix_len_i - 1. Replaces causal, no window then.
        latents: (k, v), a second segment [B or 1, N, Hkv, D] under the same softmax, never causal; row i sees
            latent_begin_i .. latent_end_i - 1 (int32 [B, Tq]; default all). Differentiable.
        return_lse: also return the log-sum-exp, natural logarithm, float32 (float64 for float64) [B, Hq, Tq]. A row
            that sees nothing gives 0 and -inf. Differentiable.
        deterministic: bitwise repeatable backward on CUDA too (on the CPU it always is).

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: contents of an index tensor out of range (CPU tensors), or not supported by this back end.
    """
    arguments = _arguments(
        q,
        k,
        v,
        scale,
        causal,
        window,
        softcap,
        sinks,
        alibi_slopes,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_k,
        prefix_len,
        latents,
        latent_begin,
        latent_end,
        deterministic,
    )
    latent_k, latent_v = (None, None) if latents is None else latents
    recorded = needs_gradient(q, k, v, sinks, latent_k, latent_v)
    out, lse = call(ops.attention.default, recorded, *arguments)
    return (out, lse) if return_lse else out


def sliding_window_attention(q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], **options: Any) -> Any:
    """attention with a window (left, right): keys before and after the diagonal that are visible, -1 = all.

    The paper's window of C keys is (C - 1, 0); other code means (C, 0). All options of `attention`.
    """
    return attention(q, k, v, window=window, **options)


def cross_attention(q: Tensor, shared_kv: SharedKV, *, return_lse: bool = False, **options: Any) -> Any:
    """attention over the K/V that all layers of the cross-decoder share.

    q [B, Tq, Hq, Dqk] -> [B, Tq, Hq, Dv]; options of `attention`, with cu_seqlens and seqused_k taken from shared_kv
    unless given. The gradients of all layers for K and V add into one float32 accumulator (see SharedKV).
    """
    _checks.shared_kv(shared_kv, "incoming")
    arguments = _arguments(q, shared_kv.k, shared_kv.v, **{**shared_kv.options(), **options})
    tokens = shared_kv.incoming()
    if tokens is None:
        out, lse = call(ops.attention.default, torch.is_grad_enabled(), *arguments)
    else:
        # K and V go in without their graph: their gradient comes back through the tokens alone.
        q, k, v, *rest = arguments
        arguments = (q, k.detach(), v.detach(), *rest, *tokens)
        out, lse, *following = call(ops.shared_attention.default, True, *arguments)
        shared_kv.advance(following)
    return (out, lse) if return_lse else out


# ---- autograd ------------------------------------------------------------------------------------------------------
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[0], output[1], *inputs[:_TENSORS])
    ctx.numbers = inputs[_TENSORS:_INPUTS]
    ctx.deterministic = inputs[_INPUTS]
    # Undefined gradients stay None: no zeros are made for an lse nobody used.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    _, q, k, v, sinks, latent_k, latent_v = ctx.needs_input_grad
    if d_out is None and d_lse is None:
        return (None,) * 6
    # Only what somebody asked for.
    grads = _GRAD_Q * q | _GRAD_KV * (k or v) | _GRAD_LATENTS * (latent_k or latent_v) | _GRAD_SINKS * sinks
    out, lse, *tensors = ctx.saved_tensors
    dq, dk, dv, d_latent_k, d_latent_v, d_sinks = ops.attention_backward(
        torch.zeros_like(out) if d_out is None else d_out,
        d_lse,
        out,
        lse,
        *tensors,
        *ctx.numbers,
        grads,
        ctx.deterministic,
    )
    found = (dq, dk, dv, d_sinks, d_latent_k, d_latent_v)
    return tuple(d if need else None for d, need in zip(found, (q, k, v, sinks, latent_k, latent_v)))


def _shared_backward(
    ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> tuple[Tensor | None, ...]:
    """dk, dv: what the layers behind this one have accumulated; returned with this layer's share added in place."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "cross_attention over a SharedKV does not support create_graph=True: its backward accumulates in place "
            "(yoco_ext has first derivatives only; yoco_ext.reference differentiates twice)"
        )
    _, q, sinks, latent_k, latent_v, _, _ = ctx.needs_input_grad
    ctx.spent = True  # SharedKV.incoming
    if d_out is None and d_lse is None:
        return None, None, None, None, dk, dv
    grads = _GRAD_Q * q | _GRAD_KV | _GRAD_LATENTS * (latent_k or latent_v) | _GRAD_SINKS * sinks
    out, lse, *tensors = ctx.saved_tensors
    accumulators = []
    for gradient, like in ((dk, tensors[_K]), (dv, tensors[_V])):
        if gradient is None:
            gradient = torch.zeros(like.shape, dtype=accumulator_dtype(like), device=like.device)
        accumulators.append(gradient.contiguous())
    dq, d_latent_k, d_latent_v, d_sinks = ops.attention_backward_accumulate(
        torch.zeros_like(out) if d_out is None else d_out,
        d_lse,
        out,
        lse,
        *tensors,
        *ctx.numbers,
        grads,
        ctx.deterministic,
        *accumulators,
    )
    found = (dq, d_sinks, d_latent_k, d_latent_v)
    return (*(d if need else None for d, need in zip(found, (q, sinks, latent_k, latent_v))), *accumulators)


register_gradient("attention", (_Q, _K, _V, _SINKS, _LATENT_K, _LATENT_V), _setup_context, _backward)
register_gradient(
    "shared_attention", (_Q, _SINKS, _LATENT_K, _LATENT_V, _TOKEN_K, _TOKEN_V), _setup_context, _shared_backward
)
no_second_derivative(attention_backward=4 + _TENSORS)


# ---- fake (Meta) implementations -----------------------------------------------------------------------------------
def _nothing(q: Tensor) -> Tensor:
    return q.new_empty((0,))


@torch.library.register_fake(f"{NAMESPACE}::attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _checks.qkv(q, k, v)
    batch, time_q, heads_q, _ = q.shape
    lse = q.new_empty((batch, heads_q, time_q), dtype=accumulator_dtype(q))
    return q.new_empty((batch, time_q, heads_q, v.shape[3])), lse


@torch.library.register_fake(f"{NAMESPACE}::shared_attention")
def _fake_shared(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse = _fake(q, k, v)
    dtype = accumulator_dtype(q)
    return out, lse, k.new_zeros(1, dtype=dtype).expand(k.shape), v.new_zeros(1, dtype=dtype).expand(v.shape)


def _fake_gradients(inputs: tuple[Any, ...], grads: int) -> tuple[Tensor, ...]:
    q, sinks = inputs[_Q], inputs[_SINKS]

    def wanted(bit: int, like: Tensor | None, dtype: torch.dtype) -> Tensor:
        return q.new_empty(like.shape, dtype=dtype) if grads & bit and like is not None else _nothing(q)

    return (
        wanted(_GRAD_Q, q, q.dtype),
        wanted(_GRAD_KV, inputs[_K], q.dtype),
        wanted(_GRAD_KV, inputs[_V], q.dtype),
        wanted(_GRAD_LATENTS, inputs[_LATENT_K], q.dtype),
        wanted(_GRAD_LATENTS, inputs[_LATENT_V], q.dtype),
        wanted(_GRAD_SINKS, sinks, torch.float32),
    )


@torch.library.register_fake(f"{NAMESPACE}::attention_backward")
def _fake_backward(d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(rest[:_INPUTS], rest[_INPUTS])


@torch.library.register_fake(f"{NAMESPACE}::attention_backward_accumulate")
def _fake_accumulate(d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dq, _, _, d_latent_k, d_latent_v, d_sinks = _fake_gradients(rest[:_INPUTS], rest[_INPUTS])
    return dq, d_latent_k, d_latent_v, d_sinks
