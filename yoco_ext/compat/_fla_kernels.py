"""What compat.fla puts behind the dispatch points of flash-linear-attention 0.6."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

import yoco_ext
from yoco_ext import _library
from yoco_ext.compat._fla_losses import PlainOnCPU
from yoco_ext.ops._common import accumulator_dtype, needs_gradient, ops

logger = logging.getLogger("yoco_ext.compat.fla")

_STEP_TOKENS = 16  # gated_retention_step takes up to this many
_LOG2_E = math.log2(math.e)  # fla keeps log-sum-exps and sinks as logarithms to base 2

Verdict = tuple[bool, "str | None"]

_logged: set[tuple[str, str]] = set()


def verdict(function: str, *reasons: str | None) -> Verdict:
    """What fla's registry wants from a verifier; the first reason against a call is logged, once."""
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None and (function, reason) not in _logged:
        _logged.add((function, reason))
        logger.warning("%s: left to flash-linear-attention, because %s", function, reason)
    return reason is None, reason


def given(**arguments: Any) -> str | None:
    """A reason if one of these arguments asks for something (is neither None nor False)."""
    names = [name for name, value in arguments.items() if value is not None and value is not False]
    return f"{', '.join(names)} is not supported by yoco_ext" if names else None


def foreign(x: Tensor, *dims: int) -> str | None:
    """A reason if the kernels do not serve x's device or dtype, or a head dimension."""
    kind = x.device.type
    if kind == "cuda":
        if _library.backend_variant("cuda") is None:
            return "this yoco_ext was built without CUDA kernels"
    elif kind != "cpu":
        return f"yoco_ext has no kernels for {kind} tensors"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) and (kind, x.dtype) != ("cpu", torch.float64):
        return f"yoco_ext has no kernels for {x.dtype} on {kind}"
    for dim in dims:
        if dim % 8 or not 8 <= dim <= 256:
            return f"head dimension {dim} is not a multiple of 8 up to 256"
    return None


def mixed(x: Tensor, *others: Tensor | None) -> str | None:
    """A reason if the tensors differ in dtype."""
    dtypes = {str(t.dtype) for t in (x, *others) if t is not None}
    return f"dtypes differ ({', '.join(sorted(dtypes))})" if len(dtypes) > 1 else None


def rows(x: Tensor) -> Tensor:
    """The kernels want a contiguous last dimension; the other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


# ---- simple GLA: S_t = exp(g_t) S_{t-1} + k_t^T v_t ------------------------------------------------------------------
def gla_problem(q: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None) -> str | None:
    both = "g together with g_gamma is not supported by yoco_ext" if g is not None and g_gamma is not None else None
    return both or foreign(q, q.shape[-1], v.shape[-1])


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    state_v_first: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """q, k [B, T, H, Dk], v [B, T, H, Dv], g [B, T, H] or g_gamma [H], initial_state [N, H, Dk, Dv] or, with
    state_v_first, [N, H, Dv, Dk] -> o like v, final state (float32) in the layout of initial_state, or None."""
    wide = accumulator_dtype(q)
    if g is not None:
        g = g.to(wide)
    elif g_gamma is not None:  # a constant decay per head
        g = g_gamma.detach().to(wide).expand(q.shape[:3]).contiguous()
    else:
        g = torch.zeros(q.shape[:3], dtype=wide, device=q.device)
    q, k, v = rows(q), rows(k), rows(v)
    # The kernels keep the state [Dk, Dv] and give it away as a transposed view, so that a state which comes back is
    # contiguous for them.
    state = initial_state.to(wide) if initial_state is not None else None
    if state is not None and state_v_first:
        state = state.transpose(-1, -2)
    final: Tensor | None
    if cu_seqlens is None and 1 <= q.shape[1] <= _STEP_TOKENS and not needs_gradient(q, k, v, g, state):
        if state is None:
            final = torch.zeros(q.shape[0], *q.shape[2:], v.shape[-1], dtype=wide, device=q.device)
        else:  # the step works in place, the caller's state is not ours to change
            final = state.clone(memory_format=torch.contiguous_format)
        o = yoco_ext.gated_retention_step(q, k, v, g, final, scale=scale)
    else:
        options = {"scale": scale, "initial_state": state, "cu_seqlens": int32(cu_seqlens)}
        if not output_final_state:
            return yoco_ext.gated_retention(q, k, v, g, **options), None
        o, final = yoco_ext.gated_retention(q, k, v, g, return_final_state=True, **options)
    if not output_final_state:
        return o, None
    return o, final.transpose(-1, -2) if state_v_first else final


# ---- what fla's registry chooses -------------------------------------------------------------------------------------
class Kernels(PlainOnCPU):
    """fla's dispatch points by name, each with its verifier; made a fla.backends.BaseBackend in `install`."""

    backend_type = "yoco_ext"
    priority = -1  # lower comes first
    installed = False

    @classmethod
    def is_available(cls) -> bool:
        return True

    def is_enabled(self) -> bool:
        return Kernels.installed

    def verify(self, function_name: str, *args: Any, **kwargs: Any) -> Verdict:
        """As fla's own, but an error in a verifier is an error, not a silent no."""
        verifier = getattr(self, f"{function_name}_verifier", None)
        return (True, None) if verifier is None else verifier(*args, **kwargs)

    # ---- simple GLA ----
    def fused_recurrent_simple_gla_verifier(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Any = None,
        g_gamma: Any = None,
        scale: float | None = None,
        initial_state: Any = None,
        output_final_state: bool = False,
        reverse: bool = False,
        state_v_first: bool = False,
        cu_seqlens: Any = None,
        **deprecated: Any,
    ) -> Verdict:
        reason = given(reverse=reverse, **deprecated)
        return verdict("fused_recurrent_simple_gla", reason, gla_problem(q, v, g, g_gamma), mixed(q, k, v))

    def fused_recurrent_simple_gla(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        g_gamma: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        reverse: bool = False,
        state_v_first: bool = False,
        cu_seqlens: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        return simple_gla(q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens)

    def fused_chunk_simple_gla_verifier(
        self, q: Tensor, k: Tensor, v: Tensor, g: Any = None, g_gamma: Any = None, *_: Any, **__: Any
    ) -> Verdict:
        return verdict("fused_chunk_simple_gla", gla_problem(q, v, g, g_gamma), mixed(q, k, v))

    def fused_chunk_simple_gla(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        g_gamma: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return simple_gla(q, k, v, g, g_gamma, scale, initial_state, output_final_state, False, cu_seqlens)

    def parallel_simple_gla_verifier(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Any = None,
        scale: float | None = None,
        output_attentions: bool = False,
        *_: Any,
        **__: Any,
    ) -> Verdict:
        reason = given(output_attentions=output_attentions) or gla_problem(q, v)
        return verdict("parallel_simple_gla", reason, mixed(q, k, v))

    def parallel_simple_gla(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        scale: float | None = None,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        return simple_gla(q, k, v, g, None, scale, None, False, False, cu_seqlens)

    # ---- attention: o [B, T, Hq, Dv], lse [B, T, Hq] to base 2 ----
    def parallel_attn_fwd_verifier(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g_cumsum: Tensor | None,
        sink_bias: Tensor | None,
        scale: float,
        window_size: int | None = None,
        *_: Any,
        **__: Any,
    ) -> Verdict:
        empty = "window_size is below 1" if window_size is not None and window_size < 1 else None
        reason = given(g=g_cumsum) or empty or foreign(q, q.shape[-1], v.shape[-1])
        return verdict("parallel_attn", reason, mixed(q, k, v))

    def parallel_attn_bwd_verifier(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        g_cumsum: Tensor | None,
        lse: Tensor,
        do: Tensor,
        sink_bias: Tensor | None = None,
        scale: float | None = None,
        window_size: int | None = None,
        *_: Any,
        **__: Any,
    ) -> Verdict:
        return self.parallel_attn_fwd_verifier(q, k, v, g_cumsum, sink_bias, 0.0, window_size)

    @staticmethod
    def _attention_arguments(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink_bias: Tensor | None,
        scale: float | None,
        window_size: int | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Any, ...]:
        """In the order of the op's schema, up to softcap."""
        sinks = None if sink_bias is None else (sink_bias.to(accumulator_dtype(q)) / _LOG2_E).float().contiguous()
        boundaries = int32(cu_seqlens)
        left = -1 if window_size is None else window_size - 1
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return (
            *(rows(x) for x in (q, k, v)),
            sinks,
            None,
            boundaries,
            boundaries,
            *(None,) * 6,
            -1,
            -1,
            scale,
            left,
            0,
            0.0,
        )

    def parallel_attn_fwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g_cumsum: None,
        sink_bias: Tensor | None,
        scale: float,
        window_size: int | None = None,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        arguments = self._attention_arguments(q, k, v, sink_bias, scale, window_size, cu_seqlens)
        o, lse = ops.attention(*arguments, False)
        return o, lse.transpose(1, 2) * _LOG2_E

    def parallel_attn_bwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        g_cumsum: None,
        lse: Tensor,
        do: Tensor,
        sink_bias: Tensor | None = None,
        scale: float | None = None,
        window_size: int | None = None,
        chunk_size: int = 128,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None, Tensor | None]:
        arguments = self._attention_arguments(q, k, v, sink_bias, scale, window_size, cu_seqlens)
        natural = (lse / _LOG2_E).transpose(1, 2).contiguous()
        grads = 3 if sink_bias is None else 11  # bits: dq, dk and dv, d_sinks
        dq, dk, dv, _, _, d_sinks = ops.attention_backward(do, None, o, natural, *arguments, grads, False)
        return dq, dk, dv, None, None if sink_bias is None else d_sinks

    # ---- rotary ----
    def rotary_embedding_fwdbwd_verifier(self, x: Tensor, cos: Tensor, *_: Any, **__: Any) -> Verdict:
        return verdict("rotary_embedding", foreign(x, x.shape[-1]), mixed(x, cos))

    def rotary_embedding_fwdbwd(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        seqlen_offsets: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        interleaved: bool = False,
        inplace: bool = False,
        conjugate: bool = False,
        chunk_indices: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, H, D], cos and sin [positions, rotary_dim / 2]. With a tensor of offsets a position may be negative
        (left padding): such rows give 0."""
        x, boundaries = rows(x), int32(cu_seqlens)
        offsets = None
        if isinstance(seqlen_offsets, Tensor):
            # A table row for each token, gathered here, so that no offset has to be read on the host.
            cos, sin = _rows_of_tables(cos, sin, _positions(x, seqlen_offsets, boundaries))
            x_shape, boundaries = x.shape, None
            y = ops.rotary(x.reshape(1, -1, *x_shape[2:]), None, cos, sin, None, None, interleaved, conjugate).view(
                x_shape
            )
        else:
            if seqlen_offsets:
                sequences = x.shape[0] if boundaries is None else boundaries.shape[0] - 1
                offsets = torch.full((sequences,), seqlen_offsets, dtype=torch.int32, device=x.device)
            y = ops.rotary(x, None, cos.contiguous(), sin.contiguous(), offsets, boundaries, interleaved, conjugate)
        return x.copy_(y) if inplace else y

    # ---- RMSNorm: x [T, D] ----
    def layer_norm_fwd_verifier(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float = 1e-5,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
        is_rms_norm: bool = False,
        num_groups: int = 1,
    ) -> Verdict:
        kind = None if is_rms_norm and num_groups == 1 else "LayerNorm and grouped norms are not served by yoco_ext"
        return verdict("layer_norm_fwd", kind or given(bias=bias, out_dtype=out_dtype) or foreign(x))

    def layer_norm_bwd_verifier(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None = None,
        rstd: Tensor | None = None,
        dres: Tensor | None = None,
        has_residual: bool = False,
        is_rms_norm: bool = False,
        x_dtype: torch.dtype | None = None,
        recompute_output: bool = False,
        num_groups: int = 1,
    ) -> Verdict:
        kind = None if is_rms_norm and num_groups == 1 else "LayerNorm and grouped norms are not served by yoco_ext"
        return verdict("layer_norm_bwd", kind or given(bias=bias, recompute_output=recompute_output) or foreign(x))

    def layer_norm_fwd(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: None,
        eps: float = 1e-5,
        residual: Tensor | None = None,
        out_dtype: None = None,
        residual_dtype: torch.dtype | None = None,
        is_rms_norm: bool = True,
        num_groups: int = 1,
    ) -> tuple[Tensor, None, Tensor, Tensor]:
        """-> y, mean (None), rstd [T], and what was normalised (x + residual), which the backward wants."""
        if residual is not None:
            residual_dtype = residual.dtype
        if residual_dtype is not None and residual_dtype != x.dtype:
            # A float32 residual stream under low-precision layers: the sum and the norm in the wider type.
            total = x.to(residual_dtype) if residual is None else residual + x
            y, _, rstd = ops.rms_norm(total, _weight_for(weight, total), None, eps)
            return y.to(x.dtype), None, rstd, total
        y, total, rstd = ops.rms_norm(x, _weight_for(weight, x), residual, eps)
        return y, None, rstd, x if residual is None else total

    def layer_norm_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: None,
        mean: None = None,
        rstd: Tensor | None = None,
        dres: Tensor | None = None,
        has_residual: bool = False,
        is_rms_norm: bool = True,
        x_dtype: torch.dtype | None = None,
        recompute_output: bool = False,
        num_groups: int = 1,
    ) -> tuple[Tensor, Tensor | None, None, Tensor | None]:
        """x is what the forward normalised. -> dx in x_dtype, d_weight, d_bias (None), d_residual in x's dtype."""
        dres = None if dres is None else dres.to(x.dtype).contiguous()
        dx, d_weight = ops.rms_norm_backward(dy.to(x.dtype).contiguous(), dres, x, _weight_for(weight, x), rstd)
        return (
            dx if x_dtype is None else dx.to(x_dtype),
            None if weight is None else d_weight.to(weight.dtype),
            None,
            dx if has_residual else None,
        )

    # ---- RMSNorm * silu(gate): x, g [T, D] ----
    @staticmethod
    def _gated_norm_problem(x: Tensor, g: Tensor, activation: str, is_rms_norm: bool, **options: Any) -> str | None:
        if activation not in ("swish", "silu") or not is_rms_norm:
            return "only RMSNorm with a swish gate is served by yoco_ext"
        return given(**options) or foreign(x, x.shape[-1]) or mixed(x, g)

    def layer_norm_gated_fwd_verifier(
        self,
        x: Tensor,
        g: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        activation: str = "swish",
        eps: float = 1e-5,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
        is_rms_norm: bool = False,
    ) -> Verdict:
        wanted = {"weight": weight, "bias": bias, "residual": residual, "out_dtype": out_dtype}
        wanted["residual_dtype"] = residual_dtype
        return verdict("layer_norm_gated_fwd", self._gated_norm_problem(x, g, activation, is_rms_norm, **wanted))

    def layer_norm_gated_bwd_verifier(
        self,
        dy: Tensor,
        x: Tensor,
        g: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        activation: str = "swish",
        eps: float = 1e-5,
        mean: Tensor | None = None,
        rstd: Tensor | None = None,
        dresidual: Tensor | None = None,
        has_residual: bool = False,
        is_rms_norm: bool = False,
        x_dtype: torch.dtype | None = None,
        recompute_output: bool = False,
    ) -> Verdict:
        wanted = {"weight": weight, "bias": bias, "residual": dresidual if has_residual else None}
        wanted["recompute_output"] = recompute_output
        return verdict("layer_norm_gated_bwd", self._gated_norm_problem(x, g, activation, is_rms_norm, **wanted))

    def layer_norm_gated_fwd(
        self, x: Tensor, g: Tensor, weight: None, bias: None, activation: str = "swish", eps: float = 1e-5, **_: Any
    ) -> tuple[Tensor, None, None, Tensor]:
        return ops.retention_output(x[None, :, None], g[None, :, None], eps)[0, :, 0], None, None, x

    def layer_norm_gated_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        g: Tensor,
        weight: None,
        bias: None,
        activation: str = "swish",
        eps: float = 1e-5,
        x_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor, None, None, None]:
        pieces = (t.contiguous()[None, :, None] for t in (dy, x, g))
        dx, dg = (d[0, :, 0] for d in ops.retention_output_backward(*pieces, eps))
        return dx, dg, None, None, None

    # ---- SwiGLU ----
    def swiglu_fwd_verifier(self, x: Tensor, y: Tensor, output_contiguous: bool = False) -> Verdict:
        return verdict("swiglu", foreign(x), mixed(x, y))

    def swiglu_fwd(self, x: Tensor, y: Tensor, output_contiguous: bool = False) -> Tensor:
        return ops.swiglu(x, y)

    def swiglu_fwdbwd_verifier(self, x: Tensor, y: Tensor, g: Tensor, *_: Any, **__: Any) -> Verdict:
        return verdict("swiglu", foreign(x), mixed(x, y, g))

    def swiglu_fwdbwd(
        self, x: Tensor, y: Tensor, g: Tensor, use_weight: bool = False, output_contiguous: bool = False
    ) -> tuple[Tensor, ...]:
        dx, dy = ops.swiglu_backward(g, x, y)
        return (dx, dy, ops.swiglu(x, y)) if use_weight else (dx, dy)


# ---- small helpers ---------------------------------------------------------------------------------------------------
def _weight_for(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """The norm takes weights in x's dtype or float32."""
    return weight if weight is None or weight.dtype in (x.dtype, torch.float32) else weight.float()


def _positions(x: Tensor, offsets: Tensor, boundaries: Tensor | None) -> Tensor:
    """Position of each token of x [B, T, ...] in its sequence, [B * T]; -1 for tokens of no packed sequence."""
    time = torch.arange(x.shape[1], device=x.device)
    if boundaries is None:
        return (offsets[:, None] + time).flatten()
    sequence = (torch.searchsorted(boundaries, time, right=True) - 1).clamp(max=offsets.shape[0] - 1)
    return (offsets[sequence] + time - boundaries[sequence]).where(time < boundaries[-1], -1)


def _rows_of_tables(cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the tables at positions; zeros for negative ones."""
    index, visible = positions.clamp(min=0), (positions >= 0)[:, None]
    return cos[index] * visible, sin[index] * visible
