"""Sliding-window attention of the self-decoder, attention over the shared K and V of the cross-decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .basic import DECODE_TOKENS, Layer, RotaryEmbedding, head_dim


@dataclass
class KVRing:
    """K and V of the last tokens of each sequence: position p lies in slot p % capacity.

    The capacity exceeds the window by DECODE_TOKENS - 1, so that the first query of a decode call still finds its
    whole window after the call's last token was written.
    """

    k: Tensor  # [B, capacity, heads, dim]
    v: Tensor


@dataclass
class KVCache:
    """K and V of all tokens so far, shared by the cross-decoder's layers."""

    k: Tensor  # [B, capacity, heads, dim]
    v: Tensor
    cu_seqlens: Tensor  # int32 [B + 1]: 0, capacity, 2 capacity, ...: the sequences where the batch is flattened

    @property
    def capacity(self) -> int:
        return self.k.shape[1]


@dataclass
class WindowKeys:
    """Where the keys of a chunk of packed queries lie, when earlier tokens are in a KVRing.

    `index` picks, sequence by sequence, the window before the chunk and then the chunk, out of the ring's slots
    followed by the chunk's tokens. Made once per chunk by YOCOCache and used by every layer.
    """

    index: Tensor  # int64 [total keys]
    cu_seqlens: Tensor  # int32 [N + 1]: boundaries in index
    max_seqlen: int

    def gather(self, ring: Tensor, new: Tensor) -> Tensor:
        return torch.cat((ring.flatten(0, 1), new.flatten(0, 1)))[self.index][None]


class SlidingWindowAttention(Layer):
    """Causal attention over the last `window_size` tokens, the query's own included."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window_size: int,
        *,
        num_kv_heads: int | None = None,
        rope: str = "official",
        rope_theta: float = 10_000.0,
        ops: str = "fused",
    ) -> None:
        super().__init__(ops)
        self.head_dim = head_dim(hidden_size, num_heads, num_kv_heads)
        kv_dim = (num_kv_heads or num_heads) * self.head_dim
        self.window = (window_size - 1, 0)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.rotary = RotaryEmbedding(self.head_dim, style=rope, theta=rope_theta, ops=ops)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))

    def forward(
        self,
        x: Tensor,
        *,
        ring: KVRing | None = None,
        offsets: Tensor | None = None,
        window_keys: WindowKeys | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """x [B, T, hidden]; packed sequences: B = 1 and cu_seqlens int32 [N + 1].

        ring holds the tokens before x and gets those of x (inference only); offsets int32 [N] is how many tokens
        there were; window_keys is needed where there were any, unless T is at most DECODE_TOKENS and not packed.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.rotary(self.q_proj(x).view(heads), offsets=offsets, cu_seqlens=cu_seqlens)
        k = self.rotary(self.k_proj(x).view(heads), offsets=offsets, cu_seqlens=cu_seqlens)
        v = self.v_proj(x).view(heads)
        if ring is not None and cu_seqlens is None and x.shape[1] <= DECODE_TOKENS:
            self.ops.append_kv(k, v, ring.k, ring.v, seqused_k=offsets, ring=True)
            o = self.ops.attention_decode(
                q, ring.k, ring.v, seqused_k=offsets + x.shape[1], window=self.window, ring=True
            )
            return self.out_proj(o.flatten(2))
        if window_keys is None:
            keys, values, cu_seqlens_k, max_seqlen_k = k, v, cu_seqlens, max_seqlen
        else:
            keys, values = window_keys.gather(ring.k, k), window_keys.gather(ring.v, v)
            cu_seqlens_k, max_seqlen_k = window_keys.cu_seqlens, window_keys.max_seqlen
        o = self.ops.sliding_window_attention(
            q,
            keys,
            values,
            self.window,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen_k,
        )
        if ring is not None:
            self.ops.append_kv(k, v, ring.k, ring.v, seqused_k=offsets, cu_seqlens=cu_seqlens, ring=True)
        return self.out_proj(o.flatten(2))


class CrossAttention(Layer):
    """Queries of a cross-decoder layer against the K and V that all of these layers share."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        rope: str = "official",
        rope_theta: float = 10_000.0,
        ops: str = "fused",
    ) -> None:
        super().__init__(ops)
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.rotary = RotaryEmbedding(head_dim(hidden_size, num_heads), style=rope, theta=rope_theta, ops=ops)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.out_proj):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))

    def forward(
        self,
        x: Tensor,
        shared_kv: Any,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        offsets: Tensor | None = None,
        seqused_k: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, hidden]; packed sequences: B = 1 and cu_seqlens int32 [N + 1].

        shared_kv: a SharedKV of the same tokens (training), or a KVCache. x is then the newest of seqused_k int32 [N]
        tokens of each sequence and starts at position offsets int32 [N].
        """
        q = self.q_proj(x).view(*x.shape[:2], self.num_heads, -1)
        q = self.rotary(q, offsets=offsets, cu_seqlens=cu_seqlens)
        packed = {
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": max_seqlen,
            "max_seqlen_k": max_seqlen,
        }
        if not isinstance(shared_kv, KVCache):
            o = self.ops.cross_attention(q, shared_kv, **packed)
        elif cu_seqlens is not None:
            k, v = shared_kv.k.flatten(0, 1)[None], shared_kv.v.flatten(0, 1)[None]
            packed |= {"cu_seqlens_k": shared_kv.cu_seqlens, "max_seqlen_k": shared_kv.capacity}
            o = self.ops.attention(q, k, v, seqused_k=seqused_k, **packed)
        elif x.shape[1] <= DECODE_TOKENS:
            o = self.ops.attention_decode(q, shared_kv.k, shared_kv.v, seqused_k=seqused_k)
        else:
            o = self.ops.attention(q, shared_kv.k, shared_kv.v, seqused_k=seqused_k)
        return self.out_proj(o.flatten(2))
