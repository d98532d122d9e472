"""compat.flash_attn: flash_attn's functions against plain PyTorch, and `import flash_attn`."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
import torch.nn.functional as F

import yoco_ext.compat.flash_attn as fa


def plain(q, k, v, causal=False, window=(-1, -1), scale=None):
    """float64 attention of [B, T, H, D] tensors, bottom-right aligned."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    row = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    key = torch.arange(k.shape[2])[None]
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        mask &= key <= row
    if window[0] >= 0:
        mask &= key >= row - window[0]
    if window[1] >= 0:
        mask &= key <= row + window[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def inputs(batch, time_q, time_k, heads, heads_kv, dim, grad=False):
    q = torch.randn(batch, time_q, heads, dim, requires_grad=grad)
    k, v = (torch.randn(batch, time_k, heads_kv, dim, requires_grad=grad) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("causal,window", [(False, (-1, -1)), (True, (-1, -1)), (True, (7, 0)), (False, (5, 3))])
def test_func_and_gradients(causal, window):
    q, k, v = inputs(2, 37, 50, 4, 2, 32, grad=True)
    d_out = torch.randn(2, 37, 4, 32)
    ours = torch.autograd.grad(fa.flash_attn_func(q, k, v, causal=causal, window_size=window), (q, k, v), d_out)
    theirs = torch.autograd.grad(plain(q, k, v, causal, window), (q, k, v), d_out.double())
    out = fa.flash_attn_func(q, k, v, causal=causal, window_size=window)
    torch.testing.assert_close(out.double(), plain(q, k, v, causal, window), atol=2e-6, rtol=1e-5)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-4)


def test_varlen_is_each_sequence_alone():
    lengths_q, lengths_k = [3, 0, 17], [5, 4, 17]
    q, k, v = torch.randn(20, 4, 16), torch.randn(26, 2, 16), torch.randn(26, 2, 16)
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths_q, lengths_k))
    out = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 17, 17, causal=True)
    for i in range(3):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        alone = plain(q[None, rows], k[None, keys], v[None, keys], causal=True)[0]
        torch.testing.assert_close(out[rows].double(), alone, atol=2e-6, rtol=1e-5)


def test_kvcache_rotates_alike_for_every_spelling_of_no_window_and_takes_parameters():
    """Without a mask all query tokens stand at one position. flash_attn gives no gradients here and does not mind
    tensors that want some."""
    q, k, v = inputs(2, 3, 3, 4, 2, 32, grad=True)
    k_cache, v_cache = (torch.randn(2, 20, 2, 32) for _ in range(2))
    angles = torch.arange(30)[:, None] * 10_000.0 ** -torch.linspace(0, 1, 16)
    options = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    options["cache_seqlens"] = torch.tensor([9, 4], dtype=torch.int32)
    found = [
        fa.flash_attn_with_kvcache(q, k_cache.clone(), v_cache.clone(), k, v, window_size=window, **options)
        for window in ((-1, -1), [-1, -1], (None, None))
    ]
    assert not found[0].requires_grad
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("paged", [False, True])
def test_kvcache_appends_rotates_and_attends(paged):
    batch, time, used = 2, 3, [5, 9]
    q, k, v = inputs(batch, time, time, 4, 2, 16)
    cos, sin = torch.rand(64, 8), torch.rand(64, 8)
    k_all, v_all = torch.randn(batch, 32, 2, 16), torch.randn(batch, 32, 2, 16)
    table = None
    k_cache, v_cache = k_all.clone(), v_all.clone()
    if paged:
        order = torch.tensor([[3, 0, 6, 1], [5, 2, 7, 4]], dtype=torch.int32)
        table = order
        pages_k, pages_v = torch.zeros(8, 8, 2, 16), torch.zeros(8, 8, 2, 16)
        for b in range(batch):
            for page in range(4):
                pages_k[order[b, page]] = k_all[b, 8 * page : 8 * page + 8]
                pages_v[order[b, page]] = v_all[b, 8 * page : 8 * page + 8]
        k_cache, v_cache = pages_k, pages_v
    lengths = torch.tensor(used, dtype=torch.int32)
    k_before = k.clone()
    out = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, cache_seqlens=lengths, block_table=table, causal=True
    )
    assert torch.equal(k, k_before)

    def rotate(x, begin):  # interleaved pairs
        c, s = cos[begin : begin + time, None].double(), sin[begin : begin + time, None].double()
        even, odd = x[..., ::2].double(), x[..., 1::2].double()
        return torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2)

    for b in range(batch):
        keys = torch.cat([k_all[b, : used[b]].double(), rotate(k[b], used[b])])
        values = torch.cat([v_all[b, : used[b]], v[b]])
        expected = plain(rotate(q[b], used[b])[None], keys[None], values[None], causal=True)[0]
        torch.testing.assert_close(out[b].double(), expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("time", [2, 20])
def test_kvcache_rows_by_index(time):
    """cache_batch_idx: append to and read the named rows of a larger cache; the other rows stay as they are."""
    q, k, v = inputs(2, time, time, 4, 2, 16)
    k_cache, v_cache = torch.randn(5, 32, 2, 16), torch.randn(5, 32, 2, 16)
    rows, used = torch.tensor([3, 1]), torch.tensor([4, 0], dtype=torch.int32)
    keys, values = k_cache.clone(), v_cache.clone()
    for i, row in enumerate(rows):
        keys[row, used[i] : used[i] + time], values[row, used[i] : used[i] + time] = k[i], v[i]
    out = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=used, cache_batch_idx=rows, causal=True, num_splits=2, pack_gqa=True
    )
    assert torch.equal(k_cache, keys) and torch.equal(v_cache, values)
    for i, row in enumerate(rows):
        end = used[i] + time
        expected = plain(q[i : i + 1], keys[row : row + 1, :end], values[row : row + 1, :end], causal=True)[0]
        torch.testing.assert_close(out[i].double(), expected, atol=5e-6, rtol=1e-5)


def test_alibi_softcap_scale_and_lse():
    q, k, v = inputs(1, 9, 14, 4, 2, 16)
    slopes = torch.rand(4)
    out, lse, probs = fa.flash_attn_func(
        q, k, v, softmax_scale=0.3, softcap=3.0, alibi_slopes=slopes, return_attn_probs=True
    )
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(2, 2)) * 0.3
    distance = (torch.arange(9)[:, None] + 5 - torch.arange(14)).abs()
    logits = 3 * torch.tanh(logits / 3) - slopes.double()[:, None, None] * distance
    expected = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v.double().repeat_interleave(2, 2))
    torch.testing.assert_close(out.double(), expected, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=5e-6, rtol=1e-5)
    assert probs is None


def test_packed_arguments():
    q, k, v = inputs(2, 11, 11, 4, 4, 16)
    expected = fa.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(fa.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), causal=True), expected)
    assert torch.equal(fa.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=True), expected)
    bounds = torch.tensor([0, 11, 22], dtype=torch.int32)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    packed = fa.flash_attn_varlen_qkvpacked_func(torch.stack([q, k, v], 1), bounds, 11, causal=True)
    torch.testing.assert_close(packed, expected.flatten(0, 1), atol=2e-6, rtol=1e-5)
    packed = fa.flash_attn_varlen_kvpacked_func(q, torch.stack([k, v], 1), bounds, bounds, 11, 11, causal=True)
    torch.testing.assert_close(packed, expected.flatten(0, 1), atol=2e-6, rtol=1e-5)


def test_signatures_are_those_of_flash_attn_2():
    """Positional order, as callers that pass no keywords rely on it."""
    expected = {
        fa.flash_attn_func: "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
        "return_attn_probs",
        fa.flash_attn_varlen_func: "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale "
        "causal window_size softcap alibi_slopes deterministic return_attn_probs block_table",
        fa.flash_attn_with_kvcache: "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx "
        "cache_leftpad block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits "
        "return_softmax_lse",
        fa.apply_rotary_emb: "x cos sin interleaved inplace seqlen_offsets cu_seqlens max_seqlen",
    }
    for function, names in expected.items():
        parameters = inspect.signature(function).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == names.split(), function.__name__


def test_padding_helpers_round_trip():
    x = torch.randn(3, 7, 5)
    mask = torch.arange(7)[None] < torch.tensor([4, 0, 7])[:, None]
    packed, indices, cu_seqlens, longest, used = fa.unpad_input(x, mask)
    assert cu_seqlens.tolist() == [0, 4, 4, 11] and longest == 7 and used.tolist() == [4, 0, 7]
    assert torch.equal(packed, x[mask])
    assert torch.equal(fa.pad_input(packed, indices, 3, 7), x * mask[..., None])


def test_rotary_in_place_and_packed():
    x, cos, sin = torch.randn(1, 6, 2, 8), torch.rand(16, 4), torch.rand(16, 4)
    expected = fa.apply_rotary_emb(x, cos, sin, interleaved=True, seqlen_offsets=2)
    y = x.clone()
    assert fa.apply_rotary_emb(y, cos, sin, interleaved=True, inplace=True, seqlen_offsets=2) is y
    assert torch.equal(y, expected)
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32)
    packed = fa.apply_rotary_emb(x[0], cos, sin, interleaved=True, seqlen_offsets=2, cu_seqlens=cu_seqlens)
    assert torch.equal(packed, expected[0])


def test_unsupported_arguments_raise():
    q, k, v = inputs(1, 4, 4, 2, 2, 16)
    with pytest.raises(NotImplementedError, match="dropout_p"):
        fa.flash_attn_func(q, k, v, dropout_p=0.1)
    for extra in ("qv", "q_descale", "k_descale", "v_descale", "attention_chunk"):
        with pytest.raises(NotImplementedError, match=extra):
            fa.flash_attn_func(q, k, v, **{extra: 4 if extra == "attention_chunk" else torch.ones(1)})
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    for extra in ("block_table", "seqused_q"):
        with pytest.raises(NotImplementedError, match=extra):
            fa.flash_attn_varlen_func(q[0], k[0], v[0], bounds, bounds, 4, 4, **{extra: bounds})
    with pytest.raises(NotImplementedError, match="16 query tokens"):
        pages = torch.zeros(4, 16, 2, 16)
        fa.flash_attn_with_kvcache(
            torch.zeros(1, 17, 2, 16), pages, pages, block_table=bounds[None, :1], cache_seqlens=16
        )
    with pytest.raises(ValueError, match="cos"):
        fa.apply_rotary_emb(q, torch.ones(6, 8), torch.ones(6, 8), seqlen_offsets=3)
    with pytest.raises(NotImplementedError, match="cache_leftpad"):
        fa.flash_attn_with_kvcache(q, k, v, cache_leftpad=torch.zeros(1, dtype=torch.int32))


def test_install_serves_the_import_and_uninstall_removes_it():
    before = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "flash_attn"}
    with fa.installed():
        from flash_attn import flash_attn_func
        from flash_attn.bert_padding import unpad_input
        from flash_attn.layers.rotary import apply_rotary_emb

        assert flash_attn_func is fa.flash_attn_func
        assert unpad_input is fa.unpad_input and apply_rotary_emb is fa.apply_rotary_emb
    assert {n: m for n, m in sys.modules.items() if n.split(".")[0] == "flash_attn"} == before
