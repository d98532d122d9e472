"""Gated retention: linear attention with one data-dependent decay per head and token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .basic import DECODE_TOKENS, Layer, RotaryEmbedding, head_dim


class GatedRetention(Layer):
    """S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t; then per-head RMSNorm, output gate, projection.

    Between the projections there is one op: the log decay, rotary, the norm and the output gate are fused into it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        gate_logit_normalizer: float = 16.0,
        rope: str = "official",
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-5,
        ops: str = "fused",
    ) -> None:
        super().__init__(ops)
        self.num_heads = num_heads
        self.gate_logit_normalizer = gate_logit_normalizer
        self.norm_eps = norm_eps
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.g_proj = nn.Linear(hidden_size, hidden_size, bias=False)  # output gate
        self.gt_proj = nn.Linear(hidden_size, num_heads, bias=False)  # decay
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.rotary = RotaryEmbedding(head_dim(hidden_size, num_heads), style=rope, theta=rope_theta, ops=ops)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.gt_proj):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def forward(
        self,
        x: Tensor,
        *,
        state: Tensor | None = None,
        offsets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, hidden]; packed sequences: B = 1 and cu_seqlens int32 [N + 1].

        state [N, heads, Dk, Dv] (float32) is what came before, and is updated in place (inference only); offsets
        int32 [N] is how many tokens that was.
        """
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (proj(x).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        gt = self.gt_proj(x)  # the kernels make the log decay of it, in float32
        options: dict[str, Any] = {
            "gate_logit_normalizer": self.gate_logit_normalizer,
            "output_gate": self.g_proj(x).view(heads),
            "norm_eps": self.norm_eps,
        }
        if self.rotary.inv_freq is not None:  # q and k turn as the kernels load them
            options |= {"inv_freq": self.rotary.inv_freq, "interleaved": self.rotary.interleaved, "offsets": offsets}
        if state is None:
            y = self.ops.gated_retention(q, k, v, gt, cu_seqlens=cu_seqlens, **options)
        elif cu_seqlens is None and x.shape[1] <= DECODE_TOKENS:
            y = self.ops.gated_retention_step(q, k, v, gt, state, **options)
        else:
            y, final_state = self.ops.gated_retention(
                q, k, v, gt, initial_state=state, return_final_state=True, cu_seqlens=cu_seqlens, **options
            )
            state.copy_(final_state)
        return self.out_proj(y.flatten(2))
