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
    output_gate: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Any:
    """Linear attention with one decay per head and token: S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t.

    The recurrence of YOCO's gated retention (arXiv 2405.05254, section 3.1), evaluated chunk by chunk. The state is
    float32 (float64 for float64) whatever the inputs, so a sequence may be cut anywhere and the state carried on.
    Differentiable in q, k, v, g, initial_state and output_gate, also through the final state.

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
        output_gate: [B, T, H, Dv] like v. What the layer does next (same section of the paper: norm per head, swish
            gate) then happens here too: the result is y = o / sqrt(mean(o^2) + norm_eps) * silu(output_gate), the mean
            over the Dv components of a head. It equals retention_output(o, output_gate, eps=norm_eps) behind the call,
            but o does not go through memory for it. A call that autograd records stores o beside y, for the backward.
        norm_eps: with output_gate.

    Returns:
        o (or y) [B, T, H, Dv], or (o, final_state).

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: cu_seqlens do not rise from 0 to at most T (CPU), or not supported by this back end.
    """
    if output_gate is None:
        q, k, v = autocast(q, k, v)
    else:
        q, k, v, output_gate = autocast(q, k, v, output_gate)
    sequences = _checks.gated_retention(
        q, k, v, g, scale, initial_state, cu_seqlens, gate_logit_normalizer, inv_freq, offsets, output_gate, norm_eps
    )
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    recorded = needs_gradient(q, k, v, g, initial_state, output_gate)
    out, final_state, _ = call(
        ops.gated_retention.default,
        recorded,
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
        output_gate,
        norm_eps,
        recorded and output_gate is not None,
    )
    return (out, final_state) if return_final_state else out


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
    output_gate: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """gated_retention of 1 to 16 tokens with the state updated in place: the decoding step. No gradients.

    q, k [B, T, H, Dk], v [B, T, H, Dv], g [B, T, H], state [B, H, Dk, Dv] float32 (float64 for float64), contiguous.
    inv_freq, interleaved, offsets: q and k are turned on load, offsets (int or int32 [B]) being the tokens so far.
    output_gate [B, T, H, Dv], norm_eps: the norm per head and the gate behind the retention, in the same call.
    Returns o (with output_gate: y) [B, T, H, Dv]. Same arguments, units and errors as gated_retention.
    """
    if output_gate is None:
        q, k, v = autocast(q, k, v)
    else:
        q, k, v, output_gate = autocast(q, k, v, output_gate)
    _checks.gated_retention_step(
        q, k, v, g, state, scale, gate_logit_normalizer, inv_freq, offsets, output_gate, norm_eps
    )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    rotation = inv_freq, _positions(offsets, q.shape[0], q), interleaved
    normalizer = gate_logit_normalizer or 0.0
    return call(
        ops.gated_retention_step.default, False, q, k, v, g, state, scale, normalizer, *rotation, output_gate, norm_eps
    )


def _positions(offsets: Tensor | int | None, sequences: int, q: Tensor) -> Tensor | None:
    if offsets is None or isinstance(offsets, Tensor):
        return offsets
    return torch.full((sequences,), offsets, dtype=torch.int32, device=q.device) if offsets else None


# ---- autograd ------------------------------------------------------------------------------------------------------
# gate_normalizer, inv_freq, offsets, interleaved, output_gate, norm_eps, keep_o
_DEFAULTS = (0.0, None, None, False, None, 0.0, False)
_OUTPUT_GATE = 12  # its place among the arguments
_TINY = 1e-37  # normal in float32


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, return_final_state, normalizer, inv_freq, offsets, interleaved, output_gate, norm_eps, keep_o = (
        *inputs,
        *_DEFAULTS[len(inputs) - 8 :],  # arguments left at their defaults do not come here
    )
    _, final_state, o = output
    kept = o if keep_o and output_gate is not None else None
    ctx.save_for_backward(*tensors, inv_freq, offsets, output_gate, kept)
    ctx.scale, ctx.gate_normalizer, ctx.interleaved, ctx.norm_eps = scale, normalizer, interleaved, norm_eps
    if return_final_state:
        ctx.mark_non_differentiable(o)
    else:
        ctx.mark_non_differentiable(final_state, o)  # final_state is empty
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_final_state: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if d_out is None and d_final_state is None:
        return (None,) * 6
    *tensors, inv_freq, offsets, output_gate, o = ctx.saved_tensors
    options = ctx.gate_normalizer, inv_freq, offsets, ctx.interleaved
    *needs, needs_output_gate = ctx.needs_input_grad[1:]
    d_output_gate = None
    if output_gate is not None and d_out is not None:
        if o is None:  # recorded by something that hides from the forward that there will be a backward
            o = ops.gated_retention(*tensors, ctx.scale, False, *options)[0]
        # o is zero in rows of no sequence, and must not meet 1 / sqrt(0) there.
        eps = ctx.norm_eps if tensors[5] is None else max(ctx.norm_eps, _TINY)
        d_out, d_output_gate = ops.retention_output_backward(d_out, o, output_gate, eps)
    if not any(needs):
        return (None,) * 5 + (d_output_gate,)
    if d_out is None:
        d_out = torch.zeros_like(tensors[2], memory_format=torch.contiguous_format)
    gradients = ops.gated_retention_backward(d_out, d_final_state, *tensors, ctx.scale, *options)
    wanted = (d if need else None for d, need in zip(gradients, needs))
    return (*wanted, d_output_gate if needs_output_gate else None)


register_gradient("gated_retention", (0, 1, 2, 3, 4, _OUTPUT_GATE), _setup_context, _backward)
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
    output_gate: Tensor | None = None,
    norm_eps: float = 0.0,
    keep_o: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    sequences = _checks.gated_retention(
        q, k, v, g, scale, initial_state, cu_seqlens, None, inv_freq, offsets, output_gate, norm_eps
    )
    batch, time, heads, dim_k = q.shape
    out = q.new_empty((batch, time, heads, v.shape[3]))
    o = q.new_empty(out.shape if keep_o and output_gate is not None else (0,))
    if not return_final_state:
        return out, q.new_empty((0,)), o
    return out, q.new_empty((sequences, heads, dim_k, v.shape[3]), dtype=accumulator_dtype(q)), o


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
    output_gate: Tensor | None = None,
    norm_eps: float = 0.0,
) -> Tensor:
    _checks.gated_retention_step(q, k, v, g, state, scale, None, inv_freq, offsets, output_gate, norm_eps)
    return q.new_empty(v.shape)
