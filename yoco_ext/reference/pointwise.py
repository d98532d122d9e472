"""Row-wise and elementwise ops in plain PyTorch.

Low-precision inputs are computed in float32 and rounded once at the end; float64 stays float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yoco_ext import _checks


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision in which an op on `x` works inside."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    With `residual`, x + residual is formed first, rounded to the dtype of x, normalised in that rounded form, and
    returned as a second output: (y, x + residual).
    """
    _checks.rms_norm(x, weight, eps, residual)
    total = x if residual is None else x + residual
    wide = total.to(compute_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide.dtype)
    y = y.to(x.dtype)
    return y if residual is None else (y, total)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    _checks.swiglu(gate, up)
    wide = gate.to(compute_dtype(gate))
    return (wide * torch.sigmoid(wide) * up.to(wide.dtype)).to(gate.dtype)


def retention_output(o: Tensor, gate: Tensor, *, eps: float = 1e-5) -> Tensor:
    """RMSNorm of every head of o without a weight, times silu(gate); o and gate are [B, T, H, D]."""
    _checks.retention_output(o, gate, eps)
    wide, gate_wide = o.to(compute_dtype(o)), gate.to(compute_dtype(o))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * gate_wide * torch.sigmoid(gate_wide)).to(o.dtype)


def rotary_angles(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """[..., rotary_dim / 2] angles in float64: at position 1M a float32 angle is wrong by up to 0.03 rad."""
    return positions.to(torch.float64).unsqueeze(-1) * inv_freq.to(torch.float64)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates pairs of the first 2 * cos.shape[-1] components of x; cos and sin broadcast against [..., pairs].

    Pairs are (2i, 2i + 1) when interleaved, else (i, i + rotary_dim / 2). The result has the dtype of cos.
    """
    pairs = cos.shape[-1]
    wide = x.to(cos.dtype)
    turning, passing = wide[..., : 2 * pairs], wide[..., 2 * pairs :]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = turning[..., :pairs], turning[..., pairs:]
    turned = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((turned, passing), dim=-1)


def token_positions(
    batch: int, time: int, offsets: Tensor | int | None, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Position of every token in its own sequence, [batch, time], and whether it belongs to a sequence at all."""
    index = torch.arange(time, device=device)
    if cu_seqlens is None:
        starts = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        sequence = torch.arange(batch, device=device).unsqueeze(1).expand(batch, time)
        valid = torch.ones(batch, time, dtype=torch.bool, device=device)
    else:
        _checks.boundaries("cu_seqlens", cu_seqlens, time)
        bounds = cu_seqlens.to(torch.int64)
        sequence = (torch.searchsorted(bounds, index, right=True) - 1).unsqueeze(0)
        valid = (index < bounds[-1]).unsqueeze(0)
        sequence = sequence.clamp(max=bounds.numel() - 2)
        starts = bounds[sequence]
    positions = index.unsqueeze(0) - starts
    if isinstance(offsets, Tensor):
        positions = positions + offsets.to(torch.int64)[sequence]
    elif offsets is not None:
        positions = positions + offsets
    return positions, valid


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
    """Rotates pairs of components of x [B, T, H, D] by position * inv_freq, or by tables cos, sin [length, pairs].

    The position of a token is its index in its sequence plus the sequence's offset. Components beyond rotary_dim =
    2 * pairs pass unchanged. Rows after cu_seqlens[-1] become zero.
    """
    _checks.rotary(x, inv_freq, cos, sin, offsets, cu_seqlens)
    batch, time = x.shape[:2]
    positions, valid = token_positions(batch, time, offsets, cu_seqlens, x.device)
    if inv_freq is not None:
        angles = rotary_angles(positions, inv_freq)
        cos_rows, sin_rows = torch.cos(angles), torch.sin(angles)
    else:
        assert cos is not None and sin is not None
        used = positions[valid]
        if used.numel() and int(used.max()) >= len(cos):
            _checks.fail("cos, sin", f"tables of {len(cos)} positions", f"at least {int(used.max()) + 1}")
        rows = positions.masked_fill(~valid, 0)
        cos_rows, sin_rows = (
            t.new_zeros(*rows.shape, t.shape[1]) if used.numel() == 0 else t[rows] for t in (cos, sin)
        )
    wide = compute_dtype(x)
    y = rotate(x, cos_rows.to(wide).unsqueeze(2), sin_rows.to(wide).unsqueeze(2), interleaved)
    return torch.where(valid[:, :, None, None], y, torch.zeros((), dtype=wide, device=x.device)).to(x.dtype)
