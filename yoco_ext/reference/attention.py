"""Attention in plain PyTorch: one interval of visible keys per query row, a mask made from it, one softmax.

Matrix products run in the dtype of the inputs, logits and softmax in float32 (float64 for float64). Memory is
O(time_q * time_k): this is what the fused kernels are checked against, not what to train with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yoco_ext import _checks


@dataclass
class SharedKV:
    """The same for plain PyTorch: autograd itself adds up the gradients of the layers."""

    k: Tensor
    v: Tensor
    cu_seqlens: Tensor | None = None
    seqused_k: Tensor | None = None

    def options(self) -> dict[str, Tensor]:
        """What every attention over this K/V is told about it."""
        found = {"cu_seqlens_q": self.cu_seqlens, "cu_seqlens_k": self.cu_seqlens, "seqused_k": self.seqused_k}
        return {name: value for name, value in found.items() if value is not None}

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything this object is made of."""
        return self.k, self.v, self.cu_seqlens, self.seqused_k

    @classmethod
    def from_tensors(cls, *tensors: Any) -> SharedKV:
        """The object that `tensors` took apart."""
        return cls(*tensors)


def key_intervals(
    q: Tensor,
    k: Tensor,
    *,
    window: tuple[int, int],
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    prefix_len: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """begin, end: row i of q sees keys begin_i .. end_i - 1 of its batch row; the diagonal (the key that stands where
    the row stands, bottom-right aligned) and the number of the sequence of each row. All int64 [batch, time_q].
    Rows of no sequence (number -1) see nothing, no latents or sinks either."""
    (batch, time_q), time_k = q.shape[:2], k.shape[1]
    begin, end, diagonal = (torch.zeros(batch, time_q, dtype=torch.int64) for _ in range(3))
    sequence = torch.full((batch, time_q), -1)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        bounds_q = _checks.boundaries("cu_seqlens_q", cu_seqlens_q, time_q)
        bounds_k = _checks.boundaries("cu_seqlens_k", cu_seqlens_k, time_k)
        places = [
            (0, slice(*bounds_q[n : n + 2]), bounds_k[n], bounds_k[n + 1] - bounds_k[n])
            for n in range(len(bounds_q) - 1)
        ]
    else:
        places = [(b, slice(0, time_q), 0, time_k) for b in range(batch)]
    used = None if seqused_k is None else seqused_k.tolist()
    for n, (b, rows, first_key, len_k) in enumerate(places):
        len_q = rows.stop - rows.start
        if used is not None:
            len_k = min(max(used[n], 0), len_k)
        here = torch.arange(len_q) + len_k - len_q
        low = (here - window[0]).clamp(0, len_k) if window[0] >= 0 else torch.zeros_like(here)
        high = (here + window[1] + 1).clamp(0, len_k) if window[1] >= 0 else torch.full_like(here, len_k)
        if prefix_len is not None:
            low, high = torch.zeros_like(here), prefix_len[b, rows].cpu().long().clamp(0, len_k)
        begin[b, rows], end[b, rows] = first_key + low, first_key + high
        diagonal[b, rows], sequence[b, rows] = first_key + here, n
    return begin.to(q.device), end.to(q.device), diagonal.to(q.device), sequence.to(q.device)


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
    """Same as yoco_ext.attention. q [B, Tq, Hq, Dqk], k [B, Tk, Hkv, Dqk], v [B, Tk, Hkv, Dv] -> [B, Tq, Hq, Dv]."""
    limits = _checks.attention(
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
    _checks.index_range("seqused_k", seqused_k, 0, k.shape[1])
    _checks.index_range("prefix_len", prefix_len, 0, k.shape[1])
    for name, bound in (("latent_begin", latent_begin), ("latent_end", latent_end)):
        _checks.index_range(name, bound, 0, latents[0].shape[1] if latents is not None else 0)
    batch, time_q, heads_q, dim_qk = q.shape
    heads_kv = k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = dim_qk**-0.5 if scale is None else scale
    begin, end, diagonal, sequence = key_intervals(
        q,
        k,
        window=limits,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        prefix_len=prefix_len,
    )
    key = torch.arange(k.shape[1], device=q.device)
    visible = (key >= begin[..., None]) & (key < end[..., None])  # [B, Tq, Tk]
    bias = torch.zeros(1, 1, 1, 1, dtype=wide, device=q.device)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(wide).expand(-1, heads_q) if alibi_slopes.dim() == 2 else alibi_slopes.to(wide)[None]
        slopes = slopes[sequence] if alibi_slopes.dim() == 2 else slopes[:, None]  # [B or 1, Tq or 1, Hq]
        bias = -slopes.transpose(1, 2)[..., None] * (diagonal[..., None] - key).abs()[:, None]  # [B, Hq, Tq, Tk]

    def segment(keys: Tensor, values: Tensor, seen: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, Hq, Tq, K] of one K/V segment, -inf where not seen, and its values."""
        # 0 * NaN is NaN: what nobody sees must not be read.
        nobody = ~seen.any(1)[..., None, None]
        keys, values = keys.masked_fill(nobody, 0), values.masked_fill(nobody, 0)
        grouped = q.unflatten(2, (heads_kv, heads_q // heads_kv))
        logits = torch.einsum("bikgd,bjkd->bkgij", grouped, keys).flatten(1, 2).to(wide) * scale
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        return (logits + bias).masked_fill(~seen[:, None], -torch.inf), values

    logits, values = segment(k, v, visible, bias)
    if latents is not None:
        latent = torch.arange(latents[0].shape[1], device=q.device)
        seen = torch.ones(batch, time_q, len(latent), dtype=torch.bool, device=q.device)
        if latent_begin is not None:
            seen = seen & (latent >= latent_begin[..., None])
        if latent_end is not None:
            seen = seen & (latent < latent_end[..., None])
        seen = seen & (sequence >= 0)[..., None]
        latent_k, latent_v = (x.expand(batch, -1, -1, -1) for x in latents)
        more_logits, more_values = segment(latent_k, latent_v, seen, torch.zeros_like(bias[:1, :1, :1, :1]))
        logits, values = torch.cat([logits, more_logits], -1), torch.cat([values, more_values], 1)
    if sinks is not None:
        sink = sinks.to(wide)[None, :, None, None].expand(batch, -1, time_q, 1)
        logits = torch.cat([logits, sink.masked_fill((sequence < 0)[:, None, :, None], -torch.inf)], -1)

    # A row that sees nothing: its logits are replaced by zeros so that no NaN is formed, and its results by 0 and -inf.
    nothing = logits.isneginf().all(-1, keepdim=True)
    logits = logits.masked_fill(nothing, 0)
    lse = torch.logsumexp(logits, -1, keepdim=True)
    p = (logits - lse).exp().masked_fill(nothing, 0)[..., : values.shape[1]]
    lse = lse.masked_fill(nothing, -torch.inf).squeeze(-1)
    p = p.to(q.dtype).unflatten(1, (heads_kv, heads_q // heads_kv))
    out = torch.einsum("bkgij,bjkd->bikgd", p, values).flatten(2, 3)
    return (out, lse) if return_lse else out


def sliding_window_attention(q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], **options: Any) -> Any:
    """attention with a window (left, right): keys before and after the diagonal that are visible, -1 = all."""
    return attention(q, k, v, window=window, **options)


def cross_attention(q: Tensor, shared_kv: SharedKV, **options: Any) -> Any:
    """attention over the one K/V that all layers of the cross-decoder share."""
    _checks.shared_kv(shared_kv)
    return attention(q, shared_kv.k, shared_kv.v, **{**shared_kv.options(), **options})
