"""Gated retention: S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t. Whole sequences, and single steps."""

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


def gated_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    gate_logit_normalizer: float | None = None,
    inv_freq: Tensor | None = None,
    interleaved: bool = False,
    offsets: Tensor | int | None = None,
) -> Any:
    """Linear attention with one decay per head and token: S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t.

    The recurrence of YOCO's gated retention (arXiv 2405.05254, section 3.1), evaluated chunk by chunk. The state is
    float32 (float64 for float64) whatever the inputs, so a sequence may be cut anywhere and the state carried on.
    Differentiable in q, k, v, g and initial_state, also through the final state.

    Args:
        q, k: [B, T, H, Dk]; v: [B, T, H, Dv]. Any T; Dk and Dv multiples of 8 up to 256. Strides are free as long as
            the last dimension is contiguous. bfloat16, float16, float32, on the CPU float64. Cast under autocast.
        g: [B, T, H], natural logarithm of the decay, <= 0; dtype of q or float32. With a gate_logit_normalizer: logits.
        scale: default Dk ** -0.5.
        initial_state: [N, H, Dk, Dv]; default zero. N is B, or the number of packed sequences.
        return_final_state: also return the state after the last token of each sequence.
        cu_seqlens: int32 [N + 1], boundaries of N packed sequences (then B = 1); tokens of no sequence give 0.
        gate_logit_normalizer: g holds logits x and the log decay is logsigmoid(x) / gate_logit_normalizer (Eq. 5 of the
            paper, tau there), computed in float32 inside the kernels, forward and backward.
        inv_freq: float32 [rotary_dim / 2]: q and k are given unrotated and turned by their positions on load; their
            gradients are those of the unrotated q and k. Equal to rotary(q), rotary(k) before the call, without a pass
            over memory for each. States belong to the turned k, so they carry on with offsets.
        interleaved, offsets: as in `rotary`; offsets count the tokens before the first one of each sequence.

    Returns:
        o [B, T, H, Dv], or (o, final_state).

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: cu_seqlens do not rise from 0 to at most T (CPU), or not supported by this back end.
    """
    q, k, v = autocast(q, k, v)
    sequences = _checks.gated_retention(
        q, k, v, g, scale, initial_state, cu_seqlens, gate_logit_normalizer, inv_freq, offsets
    )
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    o, final_state = call(
        ops.gated_retention.default,
        needs_gradient(q, k, v, g, initial_state),
        q,
        k,
        v,
        g,
        initial_state,
        cu_seqlens,
        q.shape[3] ** -0.5 if scale is None else scale,
        return_final_state,
        gate_logit_normalizer or 0.0,
        inv_freq,
        _positions(offsets, sequences, q),
        interleaved,
    )
    return (o, final_state) if return_final_state else o


def gated_retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    gate_logit_normalizer: float | None = None,
    inv_freq: Tensor | None = None,
    interleaved: bool = False,
    offsets: Tensor | int | None = None,
) -> Tensor:
    """gated_retention of 1 to 16 tokens with the state updated in place: the decoding step. No gradients.

    q, k [B, T, H, Dk], v [B, T, H, Dv], g [B, T, H], state [B, H, Dk, Dv] float32 (float64 for float64), contiguous.
    inv_freq, interleaved, offsets: q and k are turned on load, offsets (int or int32 [B]) being the tokens so far.
    Returns o [B, T, H, Dv]. Same arguments, units and errors as gated_retention.
    """
    q, k, v = autocast(q, k, v)
    _checks.gated_retention_step(q, k, v, g, state, scale, gate_logit_normalizer, inv_freq, offsets)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    rotation = inv_freq, _positions(offsets, q.shape[0], q), interleaved
    gate = gate_logit_normalizer or 0.0
    return call(ops.gated_retention_step.default, False, q, k, v, g, state, scale, gate, *rotation)


def _positions(offsets: Tensor | int | None, sequences: int, q: Tensor) -> Tensor | None:
    if offsets is None or isinstance(offsets, Tensor):
        return offsets
    return torch.full((sequences,), offsets, dtype=torch.int32, device=q.device) if offsets else None


# ---- autograd ------------------------------------------------------------------------------------------------------
_DEFAULTS = (0.0, None, None, False)  # gate_normalizer, inv_freq, offsets, interleaved


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, return_final_state, gate_normalizer, inv_freq, offsets, interleaved = (
        *inputs,
        *_DEFAULTS[len(inputs) - 8 :],  # arguments left at their defaults do not come here
    )
    ctx.save_for_backward(*tensors, inv_freq, offsets)
    ctx.scale, ctx.gate_normalizer, ctx.interleaved = scale, gate_normalizer, interleaved
    if not return_final_state:
        ctx.mark_non_differentiable(output[1])  # empty
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_o: Tensor | None, d_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_o is None and d_final_state is None:
        return (None,) * 5
    *tensors, inv_freq, offsets = ctx.saved_tensors
    if d_o is None:
        d_o = torch.zeros_like(tensors[2], memory_format=torch.contiguous_format)
    options = ctx.scale, ctx.gate_normalizer, inv_freq, offsets, ctx.interleaved
    gradients = ops.gated_retention_backward(d_o, d_final_state, *tensors, *options)
    return tuple(d if need else None for d, need in zip(gradients, ctx.needs_input_grad[1:]))


register_gradient("gated_retention", (0, 1, 2, 3, 4), _setup_context, _backward)
no_second_derivative(gated_retention_backward=7)


# ---- fake (Meta) implementations -----------------------------------------------------------------------------------
@torch.library.register_fake(f"{NAMESPACE}::gated_retention")
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    return_final_state: bool,
    gate_normalizer: float = 0.0,
    inv_freq: Tensor | None = None,
    offsets: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    sequences = _checks.gated_retention(q, k, v, g, scale, initial_state, cu_seqlens, None, inv_freq, offsets)
    batch, time, heads, dim_k = q.shape
    o = q.new_empty((batch, time, heads, v.shape[3]))
    if not return_final_state:
        return o, q.new_empty((0,))
    return o, q.new_empty((sequences, heads, dim_k, v.shape[3]), dtype=accumulator_dtype(q))


@torch.library.register_fake(f"{NAMESPACE}::gated_retention_backward")
def _fake_backward(
    d_o: Tensor,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    gate_normalizer: float = 0.0,
    inv_freq: Tensor | None = None,
    offsets: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, ...]:
    d_state = q.new_empty((0,)) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return (*(x.new_empty(x.shape) for x in (q, k, v, g)), d_state)


@torch.library.register_fake(f"{NAMESPACE}::gated_retention_step")
def _fake_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    scale: float,
    gate_normalizer: float = 0.0,
    inv_freq: Tensor | None = None,
    offsets: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    _checks.gated_retention_step(q, k, v, g, state, scale, None, inv_freq, offsets)
    return q.new_empty(v.shape)
