"""Gated retention in plain PyTorch (arXiv 2405.05254, section 3.1), in the two forms that the paper proves equal.

Per head, with the log decay g_t = log gamma_t <= 0 (Eq. 5 of the paper; one scalar per head and token):

    recurrent (Eq. 7)   S_t = exp(g_t) S_{t-1} + k_t^T v_t,      o_t = scale * q_t S_t
    chunkwise (Eq. 8)   b_i = g_1 + ... + g_i inside the chunk,  D_ij = exp(b_i - b_j) for i >= j, else 0
                        O = scale * ((Q K^T * D) V + exp(b) * (Q S))
                        S' = exp(b_C) S + (K * exp(b_C - b))^T V

Eq. 6 (parallel) is the chunkwise form with one chunk; the D printed there is transposed, the right one is lower
triangular. `scale` is where the official code multiplies K by Dk^-0.5.

Matrix products take operands in q's dtype; gates, decays, sums and the state are float32 (float64 for float64 inputs).
Every exponent is <= 0, so nothing overflows however strong the decay is.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from yoco_ext import _checks
from yoco_ext.reference.pointwise import retention_output, rotary

CHUNK = 64

# exp(-1000) is 0 in every dtype, so the clamp changes no result; it keeps b_i - b_j free of inf - inf.
_STRONGEST = -1000.0


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 7 token by token: q, k [B, T, H, Dk], v [B, T, H, Dv], g [B, T, H], state [B, H, Dk, Dv] -> o, last state."""
    wide = _wide(q)
    outputs = []
    for t in range(q.shape[1]):
        k_t, v_t, q_t = (x[:, t].to(wide) for x in (k, v, q))  # [B, H, D]
        state = g[:, t].to(wide).exp()[..., None, None] * state + k_t[..., :, None] * v_t[..., None, :]
        outputs.append(scale * (q_t[..., None, :] @ state).squeeze(-2))
    o = torch.stack(outputs, 1) if outputs else v.new_zeros(v.shape, dtype=wide)
    return o.to(q.dtype), state


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Eq. 8: the same arguments and results as `recurrent`, as matrix products over chunks."""
    wide, narrow, time = _wide(q), q.dtype, q.shape[1]
    # A padded token has k = v = 0 and g = 0: it adds nothing to the state and does not decay it.
    padding = max(1, -(-time // chunk)) * chunk - time
    q, k, v = (pad(x, (0, 0, 0, 0, 0, padding)).transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    # Sums in float64: after one strong decay the differences of float32 sums have lost the weak ones behind it.
    g = pad(g.double().clamp(min=_STRONGEST), (0, 0, 0, padding)).transpose(1, 2)  # [B, H, T]
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    outputs = []
    for q_c, k_c, v_c, g_c in zip(*(x.split(chunk, 2) for x in (q, k, v, g)), strict=True):
        b = g_c.cumsum(-1)  # [B, H, C]
        decay = (b[..., :, None] - b[..., None, :]).to(wide).masked_fill(future, -torch.inf).exp()  # D
        scores = (q_c @ k_c.mT).to(wide) * decay
        inner = (scores.to(narrow) @ v_c).to(wide)
        cross = (q_c @ state.to(narrow)).to(wide) * b.to(wide).exp()[..., None]
        outputs.append(scale * (inner + cross))
        to_end = (b[..., -1:] - b).to(wide).exp()
        update = ((k_c * to_end[..., None]).to(narrow).mT @ v_c).to(wide)
        state = b[..., -1].to(wide).exp()[..., None, None] * state + update
    o = torch.cat(outputs, 2)[:, :, :time]
    return o.transpose(1, 2).to(narrow), state


def log_decay(g: Tensor, normalizer: float | None) -> Tensor:
    """Eq. 5 on logits g; without a normalizer g is the log decay. float32 at least: rounded to bfloat16 a decay drifts
    within a few thousand tokens."""
    if normalizer is None:
        return g
    return torch.nn.functional.logsigmoid(g.to(torch.promote_types(g.dtype, torch.float32))) / normalizer


def _turned(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor | None,
    interleaved: bool,
    offsets: Tensor | int | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q and k rotated by their positions, where there are frequencies."""
    if inv_freq is None:
        return q, k
    if isinstance(offsets, Tensor):
        _checks.index_range("offsets", offsets, 0, 2**31 - 1)
    options = {"interleaved": interleaved, "offsets": offsets, "cu_seqlens": cu_seqlens}
    return rotary(q, inv_freq, **options), rotary(k, inv_freq, **options)


def _normed_and_gated(o: Tensor, output_gate: Tensor | None, eps: float) -> Tensor:
    return o if output_gate is None else retention_output(o, output_gate, eps=eps)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated retention over whole sequences; see `yoco_ext.gated_retention`. Differentiable by autograd."""
    sequences = _checks.gated_retention(
        q, k, v, g, scale, initial_state, cu_seqlens, gate_logit_normalizer, inv_freq, offsets, output_gate, norm_eps
    )
    q, k = _turned(q, k, inv_freq, interleaved, offsets, cu_seqlens)
    g = log_decay(g, gate_logit_normalizer)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if initial_state is None:
        shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
        initial_state = torch.zeros(shape, dtype=_wide(q), device=q.device)
    if cu_seqlens is None:
        o, state = chunkwise(q, k, v, g, scale, initial_state)
        o = _normed_and_gated(o, output_gate, norm_eps)
    else:
        outputs, states, ends = [], [], _checks.boundaries("cu_seqlens", cu_seqlens, q.shape[1])
        for n, (begin, end) in enumerate(pairwise(ends)):
            piece = (x[:, begin:end] for x in (q, k, v, g))
            o_n, state_n = chunkwise(*piece, scale, initial_state[n : n + 1])
            outputs.append(_normed_and_gated(o_n, None if output_gate is None else output_gate[:, begin:end], norm_eps))
            states.append(state_n)
        outputs.append(torch.zeros_like(v[:, ends[-1] :]))  # rows that belong to no sequence
        o, state = torch.cat(outputs, 1), torch.cat(states) if states else initial_state
    return (o, state) if return_final_state else o


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
    """1 to 16 further tokens per sequence; `state` [B, H, Dk, Dv] is updated in place."""
    _checks.gated_retention_step(
        q, k, v, g, state, scale, gate_logit_normalizer, inv_freq, offsets, output_gate, norm_eps
    )
    q, k = _turned(q, k, inv_freq, interleaved, offsets, None)
    g = log_decay(g, gate_logit_normalizer)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o, new_state = recurrent(q, k, v, g, scale, state)
    state.copy_(new_state)
    return _normed_and_gated(o, output_gate, norm_eps)
