"""Row-wise and elementwise ops of a YOCO layer, each one pass over memory, forward and backward."""

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


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5, residual: Tensor | None = None) -> Any:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 inside. With `residual`: of
    x + residual (rounded to x's dtype), which is returned too, as the next residual.

    x, residual [..., dim]; weight [dim] in x's dtype or float32. Returns y, or (y, x + residual), in x's dtype.
    Differentiable in x, weight and residual. Raises ValueError for wrong shapes, dtypes or devices.
    """
    _checks.rms_norm(x, weight, eps, residual)
    weight = None if weight is None else weight.contiguous()
    recorded = needs_gradient(x, weight, residual)
    y, residual_out, _ = call(ops.rms_norm.default, recorded, x, weight, residual, eps)
    return y if residual is None else (y, residual_out)


def rotary(
    x: Tensor,
    inv_freq: Tensor | None = None,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    offsets: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Rotates pairs (a, b) of the first rotary_dim components of each token by its position:
    (a cos - b sin, a sin + b cos), angle = position * inv_freq.

    Args:
        x: [B, T, H, D]; the components behind rotary_dim are copied.
        inv_freq: float32 [rotary_dim / 2]; or cos and sin: [positions, rotary_dim / 2] in x's dtype or float32.
        interleaved: pairs are (2i, 2i + 1), else (i, i + rotary_dim / 2).
        offsets: position of each sequence's first token: None (0), an int, or int32 [sequences].
        cu_seqlens: int32 [N + 1], boundaries of N packed sequences (then B = 1); tokens of no sequence give 0.

    Returns y like x. Differentiable in x. Raises ValueError for wrong shapes, dtypes, devices or values, RuntimeError
    for positions behind the tables (CPU).
    """
    sequences = _checks.rotary(x, inv_freq, cos, sin, offsets, cu_seqlens)
    if offsets is not None and not isinstance(offsets, Tensor):
        offsets = torch.full((sequences,), offsets, dtype=torch.int32, device=x.device) if offsets else None
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    return call(ops.rotary.default, needs_gradient(x), x, inv_freq, cos, sin, offsets, cu_seqlens, interleaved, False)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, float32 inside. gate, up: same shape and dtype (cast alike under autocast).
    Differentiable in both. Raises ValueError for wrong shapes, dtypes or devices."""
    if gate.dtype != up.dtype:
        gate, up = autocast(gate, up)
    _checks.swiglu(gate, up)
    return call(ops.swiglu.default, needs_gradient(gate, up), gate, up)


def retention_output(o: Tensor, gate: Tensor, *, eps: float = 1e-5) -> Tensor:
    """What follows gated retention: o / sqrt(mean(o^2) + eps) * silu(gate), the norm per head and without weight.
    On its own; gated_retention(..., output_gate=gate) does it before o is stored.

    o, gate: [B, T, H, D] of one dtype (cast alike under autocast), last dimension contiguous. Returns y like o.
    Differentiable in both. Raises ValueError for wrong shapes, dtypes or devices.
    """
    if o.dtype != gate.dtype:
        o, gate = autocast(o, gate)
    _checks.retention_output(o, gate, eps)
    return call(ops.retention_output.default, needs_gradient(o, gate), o, gate, eps)


# ---- autograd ------------------------------------------------------------------------------------------------------
def _rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, _ = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight, output[2])
    ctx.mark_non_differentiable(*output[1 if residual is None else 2 :])  # an empty residual_out; rstd
    ctx.set_materialize_grads(False)


def _rms_norm_backward(ctx: Any, dy: Tensor | None, d_residual_out: Tensor | None, _: Any) -> tuple[Any, ...]:
    _, need_x, need_weight, need_residual = ctx.needs_input_grad
    if dy is None:
        return d_residual_out if need_x else None, None, d_residual_out if need_residual else None
    x, weight, rstd = ctx.saved_tensors
    dx, d_weight = ops.rms_norm_backward(dy, d_residual_out, x, weight, rstd)
    return (
        dx if need_x else None,
        d_weight.to(weight.dtype) if need_weight else None,
        dx if need_residual else None,
    )


def _rotary_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, interleaved, inverse = inputs
    ctx.save_for_backward(*tensors)
    ctx.interleaved, ctx.inverse = interleaved, inverse


def _rotary_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    # A rotation's transpose is the rotation back.
    return (ops.rotary(dy, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse),)


def _swiglu_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    d_gate, d_up = ops.swiglu_backward(dy, *ctx.saved_tensors)
    return tuple(d if need else None for d, need in zip((d_gate, d_up), ctx.needs_input_grad[1:]))


def _retention_output_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    o, gate, ctx.eps = inputs
    ctx.save_for_backward(o, gate)


def _retention_output_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    d_o, d_gate = ops.retention_output_backward(dy, *ctx.saved_tensors, ctx.eps)
    return tuple(d if need else None for d, need in zip((d_o, d_gate), ctx.needs_input_grad[1:]))


register_gradient("rms_norm", (0, 1, 2), _rms_norm_context, _rms_norm_backward)
register_gradient("rotary", (0,), _rotary_context, _rotary_backward)
register_gradient("swiglu", (0, 1), _swiglu_context, _swiglu_backward)
register_gradient("retention_output", (0, 1), _retention_output_context, _retention_output_backward)
no_second_derivative(rms_norm_backward=5, swiglu_backward=3, retention_output_backward=3)


# ---- fake (Meta) implementations -----------------------------------------------------------------------------------
@torch.library.register_fake(f"{NAMESPACE}::rms_norm")
def _fake_rms_norm(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    _checks.rms_norm(x, weight, eps, residual)
    residual_out = x.new_empty(x.shape) if residual is not None else x.new_empty((0,))
    return x.new_empty(x.shape), residual_out, x.new_empty(x.shape[:-1], dtype=accumulator_dtype(x))


@torch.library.register_fake(f"{NAMESPACE}::rms_norm_backward")
def _fake_rms_norm_backward(
    dy: Tensor, d_residual_out: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    if weight is None:
        return x.new_empty(x.shape), x.new_empty((0,))
    return x.new_empty(x.shape), x.new_empty((x.shape[-1],), dtype=accumulator_dtype(x))


@torch.library.register_fake(f"{NAMESPACE}::rotary")
def _fake_rotary(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake(f"{NAMESPACE}::swiglu")
def _fake_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    _checks.swiglu(gate, up)
    return gate.new_empty(gate.shape)


@torch.library.register_fake(f"{NAMESPACE}::swiglu_backward")
def _fake_swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@torch.library.register_fake(f"{NAMESPACE}::retention_output")
def _fake_retention_output(o: Tensor, gate: Tensor, eps: float) -> Tensor:
    _checks.retention_output(o, gate, eps)
    return o.new_empty(o.shape)


@torch.library.register_fake(f"{NAMESPACE}::retention_output_backward")
def _fake_retention_output_backward(dy: Tensor, o: Tensor, gate: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape), o.new_empty(o.shape)
