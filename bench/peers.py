"""What yoco_ext is compared with: PyTorch's own attention, FlexAttention, and the chunkwise retention in plain PyTorch.
On a GPU also flash_attn, fla and cuDNN, where they can be imported."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """torch's scaled_dot_product_attention on [B, T, H, D] tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa).transpose(1, 2)


def sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """SDPA picks FlashAttention-2 by default; on Hopper cuDNN is faster, so a fair comparison forces it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, mask, causal)


def differential(
    attend: Callable, q: Tensor, k: Tensor, v: Tensor, lam: float, weight: Tensor, lambda_init: float
) -> Tensor:
    """Differential attention as it is commonly written, with attention kernels that want one head dimension: q1 k1 and
    q2 k2 against each half of v. q, k [B, T, 2 H, D], v [B, T, H, 2 D]."""
    halves = v.chunk(2, -1)
    first, second = (torch.cat([attend(q[:, :, i::2], k[:, :, i::2], half) for half in halves], -1) for i in (0, 1))
    return F.rms_norm(first - lam * second, weight.shape, weight, 1e-5) * (1 - lambda_init)


def window_mask(time_q: int, time_k: int, left: int, device: torch.device) -> Tensor:
    """Boolean [time_q, time_k]: causal, `left` keys before the diagonal; aligned bottom-right."""
    row = torch.arange(time_q, device=device)[:, None] + time_k - time_q
    key = torch.arange(time_k, device=device)[None, :]
    return (key <= row) & (key >= row - left)


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_window(
    time_q: int, time_k: int, left: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled FlexAttention, causal (bottom-right) with `left` keys before the diagonal, -1 for all of them; the block
    mask is made once, outside the timing."""
    from torch.nn.attention.flex_attention import create_block_mask

    shift = time_k - time_q

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q + shift

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q + shift) & (q + shift - k <= left)

    flex = _compiled_flex()
    mask = None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal mask
        if mask is None:
            mask = create_block_mask(causal if left < 0 else visible, None, None, time_q, time_k, device=str(device))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return run


def chunkwise_retention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk: int = 64) -> Tensor:
    """Gated retention as a user would write it in PyTorch: all chunks at once, a loop only for the state."""
    batch, time, heads, dim_k = q.shape
    n = time // chunk

    def split(x: Tensor) -> Tensor:
        return x.reshape(batch, n, chunk, heads, -1).permute(0, 3, 1, 2, 4)

    q, k, v = split(q), split(k), split(v)
    b = split(g[..., None]).squeeze(-1).float().cumsum(-1)  # [B, H, N, C]
    rows = torch.arange(chunk, device=q.device)
    causal = rows[:, None] >= rows[None, :]
    decay = torch.where(causal, (b[..., :, None] - b[..., None, :]).clamp(max=0).exp(), 0.0)
    scores = (q @ k.transpose(-1, -2)).float() * decay
    local = scores.to(v.dtype) @ v
    updates = ((k * (b[..., -1:] - b).exp()[..., None].to(k.dtype)).transpose(-1, -2) @ v).float()
    total = b[..., -1].exp()
    state = updates.new_zeros(batch, heads, dim_k, v.shape[-1])
    before = []
    for i in range(n):
        before.append(state)
        state = total[:, :, i, None, None] * state + updates[:, :, i]
    states = torch.stack(before, 2).to(v.dtype)
    out = (local + (q * b.exp()[..., None].to(q.dtype)) @ states) * dim_k**-0.5
    return out.permute(0, 2, 3, 1, 4).reshape(batch, time, heads, -1)


@functools.cache
def compiled_retention() -> Callable:
    return torch.compile(chunkwise_retention, dynamic=False)


def gpu_attention_peers(window: tuple[int, int], square: bool = True) -> dict[str, Callable]:
    """flash_attn 2 and 3 and fla's attention as far as they are installed, called with [B, T, H, D] tensors. square:
    as many queries as keys, which fla needs."""
    found: dict[str, Callable] = {}
    try:
        from flash_attn import flash_attn_func

        found["flash_attn 2"] = lambda q, k, v: flash_attn_func(q, k, v, causal=True, window_size=window)
    except ImportError:
        pass
    try:
        from flash_attn_interface import flash_attn_func as flash_attn_3

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash_attn_3(q, k, v, causal=True, window_size=window)
            return out[0] if isinstance(out, tuple) else out

        found["flash_attn 3"] = run
    except ImportError:
        pass
    if square:
        try:
            from fla.ops.attn import parallel_attn

            size = None if window[0] < 0 else window[0] + 1
            found["fla parallel_attn"] = lambda q, k, v: parallel_attn(q, k, v, window_size=size)
        except ImportError:
            pass
    return found


def gpu_decode_peers(batch: int, time_k: int, device: torch.device) -> dict[str, Callable]:
    """One query token per sequence: q [B, 1, H, D], caches [B, T, Hkv, D]."""
    found: dict[str, Callable] = {}
    try:
        from flash_attn import flash_attn_with_kvcache

        used = torch.full((batch,), time_k, dtype=torch.int32, device=device)
        found["flash_attn 2"] = lambda q, k, v: flash_attn_with_kvcache(q, k, v, cache_seqlens=used)
    except ImportError:
        pass
    try:
        from flash_attn_interface import flash_attn_with_kvcache as decode_3

        lengths = torch.full((batch,), time_k, dtype=torch.int32, device=device)
        found["flash_attn 3"] = lambda q, k, v: decode_3(q, k, v, cache_seqlens=lengths)
    except ImportError:
        pass
    try:
        from fla.ops.attn.decoding import attn_decoding_one_step

        bounds = torch.arange(0, (batch + 1) * time_k, time_k, dtype=torch.int64, device=device)
        found["fla attn_decoding"] = lambda q, k, v: attn_decoding_one_step(
            q.transpose(0, 1), k.flatten(0, 1)[None], v.flatten(0, 1)[None], cu_seqlens=bounds
        )
    except ImportError:
        pass
    return found


def gpu_retention_peers(slow: bool = True) -> dict[str, Callable]:
    """fla's Triton kernels for the gated retention of unilm's YOCO: the chunkwise form, which fla's YOCO model trains
    with; slow: also the form with the state in one kernel, and the one that forms all scores, quadratic in time."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla, fused_chunk_simple_gla, parallel_simple_gla
    except ImportError:
        return {}
    runs = {"fla chunk_simple_gla": chunk_simple_gla}
    if slow:
        runs |= {"fla fused_chunk_simple_gla": fused_chunk_simple_gla, "fla parallel_simple_gla": parallel_simple_gla}
    return {name: (lambda q, k, v, g, run=run: run(q, k, v, g)[0]) for name, run in runs.items()}


def gpu_step_peers() -> dict[str, Callable]:
    """fla's recurrent kernel: (q, k, v, g, state) -> o, new state."""
    try:
        from fla.ops.simple_gla import fused_recurrent_simple_gla
    except ImportError:
        return {}
    return {
        "fla fused_recurrent": lambda q, k, v, g, state: fused_recurrent_simple_gla(
            q, k, v, g, initial_state=state, output_final_state=True
        )
    }
