"""Which keys a row sees: windows, causal alignment, prefix rows, latents, packed sequences, padding."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import attend, check, int32, random_int32, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import bitwise_equal, guarded, lengths_to_cu_seqlens, run_with_gradients

# The reference is what these compare with; it has its own file, test_reference_attention.py.
pytestmark = pytest.mark.backends("cpu", "cuda", "emulated")

TWO = (torch.bfloat16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", TWO, ids=["bfloat16", "float32"])


@dtypes
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("window", [(0, 0), (1, 0), (16, 0), (63, 64), (64, 63), (-1, 5), (7, -1), (500, 500)], ids=str)
def test_windows(backend, dtype, window, causal):
    check(backend, tensors(backend, dtype, (150, 150), heads=(2, 1), dims=(32, 32)), window=window, causal=causal)


@dtypes
@pytest.mark.parametrize("time", [(1, 100), (17, 100), (64, 150), (150, 64), (3, 2)], ids=str)
@pytest.mark.parametrize("window", [(-1, -1), (20, 0), (5, 9)], ids=str)
def test_bottom_right_alignment(backend, dtype, time, window):
    """Query blocks shorter and longer than the cache; in longer ones the first rows see nothing."""
    out, lse = check(backend, tensors(backend, dtype, time, dims=(32, 32)), window=window)
    empty = max(time[0] - time[1], 0)
    assert not out[:, :empty].any() and (lse[:, :, :empty] == -math.inf).all()
    assert lse[:, :, empty:].isfinite().all()


def test_a_window_that_covers_everything_changes_nothing(backend):
    inputs = tensors(backend, torch.bfloat16, (70, 130))
    plain = attend(backend.ops)(**inputs)
    for window in ((129, 0), (10**6, 10**6), (129, -1)):
        assert all(bitwise_equal(a, b) for a, b in zip(plain, attend(backend.ops)(**inputs, window=window)))


def test_sliding_window_attention_is_attention_with_a_window(backend):
    q, k, v = tensors(backend, torch.bfloat16, (70, 70)).values()
    mine = backend.ops.sliding_window_attention(q, k, v, (16, 0), scale=0.2)
    assert bitwise_equal(mine, backend.ops.attention(q, k, v, window=(16, 0), scale=0.2))


PACKINGS = {
    "one": ([130], [130]),
    "several": ([64, 1, 130, 7], [64, 1, 130, 7]),
    "empty": ([0, 33, 0, 0, 65, 0], [0, 33, 0, 0, 65, 0]),
    "other lengths": ([5, 40, 0, 17], [40, 5, 9, 0]),
    "all empty": ([0, 0], [0, 0]),
}


@dtypes
@pytest.mark.parametrize("tail", [0, 11])
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_sequences(backend, dtype, packing, tail):
    """Zero-length sequences anywhere; rows behind the last boundary are zero and get no gradient."""
    lengths_q, lengths_k = PACKINGS[packing]
    inputs = tensors(backend, dtype, (sum(lengths_q) + tail, sum(lengths_k) + tail), batch=1, dims=(32, 32))
    cu = {f"cu_seqlens_{n}": lengths_to_cu_seqlens(x, backend.device) for n, x in (("q", lengths_q), ("k", lengths_k))}
    for options in ({}, {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}, {"window": (9, 2)}):
        out, lse = check(backend, inputs, **cu, **options)
        assert not out[:, sum(lengths_q) :].any() and (lse[:, :, sum(lengths_q) :] == -math.inf).all()


@dtypes
def test_packed_with_everything(backend, dtype):
    lengths_q, lengths_k = [40, 0, 70, 3], [50, 6, 70, 3]
    inputs = tensors(backend, dtype, (113, 129), batch=1, dims=(32, 32), sinks=True, latents=21)
    check(
        backend,
        inputs,
        cu_seqlens_q=lengths_to_cu_seqlens(lengths_q, backend.device),
        cu_seqlens_k=lengths_to_cu_seqlens(lengths_k, backend.device),
        seqused_k=int32(backend, 50, 0, 33, 3),
        latent_begin=random_int32(backend, 0, 21, 1, 113),
        latent_end=random_int32(backend, 0, 21, 1, 113),
        softcap=4.0,
        alibi_slopes=torch.rand(4, 4, device=backend.device),
    )


@dtypes
@pytest.mark.parametrize("causal", [True, False])
def test_seqused_k(backend, dtype, causal):
    """Keys behind seqused_k are never read, whatever lies there, and their gradient is zero."""
    inputs = tensors(backend, dtype, (66, 140), batch=4, dims=(32, 32))
    used = [140, 0, 1, 77]
    clean = check(backend, inputs, seqused_k=int32(backend, *used), causal=causal)
    for b, n in enumerate(used):
        inputs["k"][b, n:], inputs["v"][b, n:] = math.nan, math.inf
    upstream = [torch.ones_like(x) for x in clean]
    found, gradients = run_with_gradients(
        attend(backend.ops), inputs, {"seqused_k": int32(backend, *used), "causal": causal}, upstream, "qkv"
    )
    assert all(bitwise_equal(a, b) for a, b in zip(found, clean))
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    for b, n in enumerate(used):
        assert not gradients["k"][b, n:].any() and not gradients["v"][b, n:].any()


@dtypes
@pytest.mark.parametrize("dim", [32, 256])
def test_seqused_k_under_a_bad_output_gradient(backend, dtype, dim):
    """NaN in d_out reaches the keys its rows see, not those that seqused_k leaves out."""
    inputs = tensors(backend, dtype, (66, 140), batch=2, dims=(dim, dim))
    used = [140, 77]
    options = {"seqused_k": int32(backend, *used), "causal": False}
    upstream = [torch.randn_like(x) for x in attend(backend.ops)(**inputs, **options)]
    upstream[0][1, 5] = math.nan
    _, gradients = run_with_gradients(attend(backend.ops), inputs, options, upstream, "qkv")
    for name in "kv":
        assert gradients[name][0].isfinite().all(), name
        assert gradients[name][1, : used[1]].isnan().all(), name
        assert not gradients[name][1, used[1] :].any(), name


@dtypes
def test_padding_and_neighbours_are_never_seen(backend, dtype):
    """Packed sequences between NaN: a gap in the keys, rows behind the last boundary, NaN all around the tensors."""
    inputs = tensors(backend, dtype, (60, 90), batch=1, dims=(32, 32))
    options = {
        "cu_seqlens_q": int32(backend, 0, 20, 20, 50),
        "cu_seqlens_k": int32(backend, 0, 40, 40, 80),
        "seqused_k": int32(backend, 25, 0, 31),
    }
    clean = attend(backend.ops)(**inputs, **options)
    for name in "kv":
        inputs[name][:, 25:40] = inputs[name][:, 71:] = math.nan
    inputs["q"][:, 50:] = math.nan
    inputs = {n: guarded(x) for n, x in inputs.items()}
    upstream = [torch.randn_like(x) for x in clean]
    found, gradients = run_with_gradients(attend(backend.ops), inputs, options, upstream, "qkv")
    for a, b in zip(found, clean):
        assert bitwise_equal(a, b)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name


@dtypes
def test_prefix_rows(backend, dtype):
    inputs = tensors(backend, dtype, (90, 120), dims=(32, 32), sinks=True)
    check(backend, inputs, prefix_len=random_int32(backend, 0, 120, 2, 90))
    # Sorted, constant, and empty for all: what tile bounds are made from.
    check(backend, inputs, prefix_len=random_int32(backend, 0, 120, 2, 90).sort(1).values.contiguous())
    check(backend, inputs, prefix_len=torch.full((2, 90), 64, dtype=torch.int32, device=backend.device))
    inputs.pop("sinks")
    out, lse = check(backend, inputs, prefix_len=torch.zeros(2, 90, dtype=torch.int32, device=backend.device))
    assert not out.any() and (lse == -math.inf).all()


def test_prefix_rows_describe_causal(backend):
    inputs = tensors(backend, torch.bfloat16, (70, 100))
    causal = attend(backend.ops)(**inputs)
    rows = torch.arange(31, 101, device=backend.device).int().expand(2, -1).contiguous()
    prefix = attend(backend.ops)(**inputs, prefix_len=rows)
    assert all(bitwise_equal(a, b) for a, b in zip(causal, prefix))


@dtypes
@pytest.mark.parametrize("shared", [True, False], ids=["one batch row", "per batch row"])
@pytest.mark.parametrize("count", [1, 33, 128])
def test_latents(backend, dtype, count, shared):
    inputs = tensors(backend, dtype, (75, 80), dims=(32, 16), latents=count, shared_latents=shared, sinks=True)
    check(backend, inputs)
    begin, end = (random_int32(backend, 0, count, 2, 75) for _ in range(2))  # half of the ranges are empty
    check(backend, inputs, latent_begin=begin, latent_end=end)
    check(backend, inputs, latent_end=end, prefix_len=random_int32(backend, 0, 80, 2, 75))


def test_latents_that_nobody_sees_change_nothing(backend):
    inputs = tensors(backend, torch.bfloat16, (40, 60), latents=20)
    without = {n: x for n, x in inputs.items() if n in "qkv"}
    plain = attend(backend.ops)(**without)
    zeros = torch.zeros(2, 40, dtype=torch.int32, device=backend.device)
    hidden = attend(backend.ops)(**inputs, latent_end=zeros)
    none = attend(backend.ops)(**without, latent_k=inputs["latent_k"][:, :0], latent_v=inputs["latent_v"][:, :0])
    for other in (hidden, none):
        assert all(bitwise_equal(a, b) for a, b in zip(plain, other))


def test_latents_equal_keys_in_front(backend):
    """A fully visible second segment is a concatenation: here of keys before the first, with no causal mask."""
    inputs = tensors(backend, torch.float32, (30, 50), latents=12, dims=(32, 32))
    joined = {n: torch.cat([inputs[f"latent_{n}"], inputs[n]], 1) for n in "kv"}
    out, lse = attend(backend.ops)(**inputs, causal=False)
    other, other_lse = attend(backend.ops)(inputs["q"], **joined, causal=False)
    torch.testing.assert_close(out, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, other_lse, rtol=1e-5, atol=1e-5)


@dtypes
def test_sinks(backend, dtype):
    """A row with nothing but its sink: output 0, lse = sink; a huge sink takes everything, -inf is none."""
    inputs = tensors(backend, dtype, (40, 20), sinks=True, dims=(32, 32))
    out, lse = check(backend, inputs)
    assert not out[:, :20].any()
    torch.testing.assert_close(lse[:, :, :20], inputs["sinks"][:, None].expand(2, 4, 20), rtol=1e-6, atol=1e-6)
    plain = attend(backend.ops)(**{n: x for n, x in inputs.items() if n != "sinks"})
    none = attend(backend.ops)(**{**inputs, "sinks": torch.full((4,), -math.inf, device=backend.device)})
    torch.testing.assert_close(none[0], plain[0])
    torch.testing.assert_close(none[1], plain[1])
    everything = attend(backend.ops)(**{**inputs, "sinks": torch.full((4,), 1e4, device=backend.device)})[0]
    assert not everything.any()


@dtypes
@pytest.mark.parametrize("per_sequence", [True, False])
def test_alibi(backend, dtype, per_sequence):
    slopes = torch.rand((2, 4) if per_sequence else (4,), device=backend.device)
    inputs = tensors(backend, dtype, (45, 80), dims=(32, 32))
    check(backend, inputs, alibi_slopes=slopes)
    check(backend, inputs, alibi_slopes=slopes, causal=False, softcap=2.0)


@dtypes
def test_no_batch_and_no_latents(backend, dtype):
    check(backend, tensors(backend, dtype, (10, 10), batch=0))
    check(backend, tensors(backend, dtype, (10, 0), latents=0, sinks=True))


@settings(max_examples=15)
@given(data=st.data())
def test_random_packings(backend, data):
    """Random sequence lengths, empty ones included, under random masks."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    sequences = draw(st.integers(1, 5))
    length = st.one_of(st.just(0), st.integers(0, 90))
    lengths_q, lengths_k = ([draw(length) for _ in range(sequences)] for _ in range(2))
    tail_q, tail_k = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    latents = draw(st.sampled_from([None, 17]))
    rows = sum(lengths_q) + tail_q
    inputs = tensors(
        backend,
        draw(st.sampled_from(TWO)),
        (rows, sum(lengths_k) + tail_k),
        batch=1,
        heads=(2, 1),
        dims=(16, 24),
        sinks=draw(st.booleans()),
        latents=latents,
    )
    options = {
        "cu_seqlens_q": lengths_to_cu_seqlens(lengths_q, backend.device),
        "cu_seqlens_k": lengths_to_cu_seqlens(lengths_k, backend.device),
    }
    if draw(st.booleans()):
        options["seqused_k"] = int32(backend, *[draw(st.integers(0, n)) for n in lengths_k])
    if draw(st.booleans()):
        options["prefix_len"] = random_int32(
            backend, 0, max([*lengths_k, 1]) if sum(lengths_k) + tail_k else 0, 1, rows
        )
        options["prefix_len"].clamp_(max=sum(lengths_k) + tail_k)
    else:
        options["window"] = draw(st.tuples(st.integers(-1, 60), st.integers(-1, 60)))
        options["causal"] = draw(st.booleans())
    if latents is not None and draw(st.booleans()):
        options["latent_begin"] = random_int32(backend, 0, latents, 1, rows)
        options["latent_end"] = random_int32(backend, 0, latents, 1, rows)
    check(backend, inputs, **options)
