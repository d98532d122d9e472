"""The reference against a loop over rows and keys that follows the words of the documentation, and against SDPA."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import guarded, lengths_to_cu_seqlens
from torch.nn.functional import scaled_dot_product_attention

from yoco_ext import reference


def loop(q, k, v, *, sequences, causal=True, window=(-1, -1), scale=None, softcap=0.0, sinks=None, alibi=None,
         prefix_len=None, latents=None, latent_begin=None, latent_end=None):  # fmt: skip
    """One softmax per head and row. sequences: (batch row, first query, queries, first key, keys) of each sequence."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=q.dtype)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    group = q.shape[2] // k.shape[2]
    for n, (b, q0, len_q, k0, len_k) in enumerate(sequences):
        for head in range(q.shape[2]):
            for i in range(len_q):
                row = q[b, q0 + i, head]
                logits, values = [], []

                def see(key, value, bias, row=row, logits=logits, values=values):
                    s = (row * key).sum() * scale
                    if softcap:
                        s = softcap * torch.tanh(s / softcap)
                    logits.append(s + bias)
                    values.append(value)

                for j in range(len_k):
                    offset = j - (i + len_k - len_q)  # 0 on the diagonal, negative before it
                    if prefix_len is not None:
                        if j >= prefix_len[b, q0 + i]:
                            continue
                    elif (
                        (causal and offset > 0)
                        or (window[0] >= 0 and offset < -window[0])
                        or (window[1] >= 0 and offset > window[1])
                    ):
                        continue
                    bias = 0.0
                    if alibi is not None:
                        bias = -(alibi[n, head] if alibi.dim() == 2 else alibi[head]) * abs(offset)
                    see(k[b, k0 + j, head // group], v[b, k0 + j, head // group], bias)
                if latents is not None:
                    begin = 0 if latent_begin is None else int(latent_begin[b, q0 + i])
                    end = latents[0].shape[1] if latent_end is None else int(latent_end[b, q0 + i])
                    for j in range(begin, end):
                        lb = min(b, latents[0].shape[0] - 1)
                        see(latents[0][lb, j, head // group], latents[1][lb, j, head // group], 0.0)
                if sinks is not None:
                    logits.append(sinks[head])
                    values.append(torch.zeros(v.shape[3], dtype=v.dtype))
                if logits:
                    stacked = torch.stack(logits)
                    out[b, q0 + i, head] = torch.softmax(stacked, 0) @ torch.stack(values)
                    lse[b, head, q0 + i] = torch.logsumexp(stacked, 0)
    return out, lse


def make(batch=2, time_q=5, time_k=7, heads=(4, 2), dims=(16, 8)):
    shapes = (
        (batch, time_q, heads[0], dims[0]),
        (batch, time_k, heads[1], dims[0]),
        (batch, time_k, heads[1], dims[1]),
    )
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)


def padded(batch, time_q, time_k):
    return [(b, 0, time_q, 0, time_k) for b in range(batch)]


@pytest.mark.parametrize("times", [(5, 7), (7, 5), (1, 6), (6, 1), (0, 4), (4, 0)])
@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"causal": False},
        {"window": (2, 0)},
        {"window": (2, 3)},
        {"window": (0, 0)},
        {"causal": False, "window": (1, 2)},
        {"causal": False, "window": (-1, 0)},
    ],
)
def test_masks(times, mask):
    q, k, v = make(time_q=times[0], time_k=times[1])
    expected = loop(q, k, v, sequences=padded(2, *times), **mask)
    same(reference.attention(q, k, v, return_lse=True, **mask), expected)


def test_logit_options():
    q, k, v = make()
    sinks = torch.randn(4, dtype=torch.float64)
    for alibi in (torch.rand(4, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)):
        options = {"softcap": 0.7, "sinks": sinks, "scale": 0.3, "causal": False}
        expected = loop(q, k, v, sequences=padded(2, 5, 7), alibi=alibi, **options)
        same(reference.attention(q, k, v, alibi_slopes=alibi, return_lse=True, **options), expected)


def test_packed_sequences():
    lengths_q, lengths_k, used = [3, 0, 4, 2], [5, 2, 0, 6], [4, 0, 0, 6]
    q, k, v = make(batch=1, time_q=11, time_k=14)
    cu_q, cu_k = lengths_to_cu_seqlens(lengths_q), lengths_to_cu_seqlens(lengths_k)
    alibi = torch.rand(4, 4, dtype=torch.float64)
    sequences = [(0, int(cu_q[n]), lengths_q[n], int(cu_k[n]), used[n]) for n in range(4)]
    sinks = torch.randn(4, dtype=torch.float64)
    latents = tuple(torch.randn(1, 3, 2, d, dtype=torch.float64) for d in (16, 8))
    for mask in ({}, {"window": (1, 0)}, {"causal": False}, {"sinks": sinks}, {"latents": latents}):
        expected = loop(q, k, v, sequences=sequences, alibi=alibi, **mask)
        packing = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "seqused_k": torch.tensor(used, dtype=torch.int32)}
        same(reference.attention(q, k, v, alibi_slopes=alibi, return_lse=True, **packing, **mask), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_prefix_rows_and_latents(shared):
    q, k, v = make()
    prefix = torch.randint(0, 8, (2, 5), dtype=torch.int32)
    begin = torch.randint(0, 4, (2, 5), dtype=torch.int32)
    end = torch.randint(0, 4, (2, 5), dtype=torch.int32)
    latents = tuple(torch.randn(1 if shared else 2, 3, 2, d, dtype=torch.float64) for d in (16, 8))
    rows = {"prefix_len": prefix, "latent_begin": begin, "latent_end": end, "latents": latents}
    same(reference.attention(q, k, v, return_lse=True, **rows), loop(q, k, v, sequences=padded(2, 5, 7), **rows))
    same(
        reference.attention(q, k, v, return_lse=True, latents=latents),
        loop(q, k, v, sequences=padded(2, 5, 7), latents=latents),
    )


def test_gradients():
    """Through everything at once, rows that see nothing included."""
    q, k, v = (x.requires_grad_() for x in make(batch=1, time_q=4, time_k=3, dims=(8, 8)))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    latents = tuple(torch.randn(1, 2, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def f(q, k, v, *latents):
        out, lse = reference.attention(q, k, v, softcap=2.0, latents=latents or None, latent_end=end, return_lse=True)
        return out, lse.masked_fill(lse.isinf(), 0)

    def with_sinks(q, k, v, sinks):
        return reference.attention(q, k, v, sinks=sinks, return_lse=True)

    end = torch.tensor([[0, 0, 2, 1]], dtype=torch.int32)
    assert torch.autograd.gradcheck(f, (q, k, v, *latents))
    assert torch.autograd.gradcheck(with_sinks, (q, k, v, sinks))
    assert reference.attention(q, k, v, latents=latents, latent_end=end, return_lse=True)[1][0, 0, 0] == -math.inf


@pytest.mark.parametrize("causal", [True, False])
def test_equals_scaled_dot_product_attention(causal):
    q, k, v = make(time_q=6, time_k=6)
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(reference.attention(q, k, v, causal=causal), expected.transpose(1, 2))


def test_nan_outside_the_mask_stays_there():
    q, k, v = make()
    used = torch.tensor([4, 0], dtype=torch.int32)
    clean = reference.attention(q, k, v, seqused_k=used, return_lse=True)
    for b, n in enumerate(used):
        k[b, n:], v[b, n:] = math.nan, math.inf
    leaves = [guarded(x).detach().requires_grad_() for x in (q, k, v)]
    found = reference.attention(*leaves, seqused_k=used, return_lse=True)
    same(found, clean)
    for gradient in torch.autograd.grad(found[0].sum(), leaves):
        assert not gradient.isnan().any()
    dk = torch.autograd.grad(reference.attention(*leaves, seqused_k=used).sum(), leaves[1])[0]
    assert not dk[0, 4:].any() and not dk[1].any()


def test_double_backward():
    q, k, v = (x.requires_grad_() for x in make(batch=1, time_q=2, time_k=3, heads=(1, 1), dims=(8, 8)))
    assert torch.autograd.gradgradcheck(reference.attention, (q, k, v))
