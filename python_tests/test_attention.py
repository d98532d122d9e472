"""attention: the rule of numerics over shapes, layouts and dtypes; repeatability; what a kernel must not read or write.

Masks have their own file, test_attention_masks.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import attend, check, int32, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_rule, bitwise_equal, bthd_from_bhtd, guarded, rms, run_with_gradients
from torch.nn.functional import scaled_dot_product_attention

from yoco_ext import reference

# The reference is what these compare with; it has its own file, test_reference_attention.py.
pytestmark = pytest.mark.backends("cpu", "cuda", "emulated")

LOW = [torch.bfloat16, torch.float16]
DTYPES = [*LOW, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def need(backend, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")


@dtypes
@pytest.mark.parametrize(
    "time",
    [(0, 5), (5, 0), (1, 1), (1, 130), (130, 1), (31, 33), (64, 128), (113, 203), (128, 217), (239, 239), (257, 64)],
    ids=str,
)
def test_lengths(backend, dtype, time):
    need(backend, dtype)
    check(backend, tensors(backend, dtype, time, heads=(2, 1)))


@dtypes
@pytest.mark.parametrize(
    "dims", [(8, 8), (16, 64), (64, 24), (72, 72), (128, 128), (128, 256), (256, 128), (256, 256)], ids=str
)
def test_head_dims(backend, dtype, dims):
    need(backend, dtype)
    check(backend, tensors(backend, dtype, (67, 99), batch=1, dims=dims))


@dtypes
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (8, 1), (24, 8)], ids=str)
def test_grouped_query_heads(backend, dtype, heads):
    need(backend, dtype)
    check(backend, tensors(backend, dtype, (37, 70), heads=heads, dims=(32, 32)))


@dtypes
def test_everything_at_once(backend, dtype):
    need(backend, dtype)
    inputs = tensors(backend, dtype, (70, 91), sinks=True, latents=19, dims=(64, 32))
    check(backend, inputs, softcap=5.0, alibi_slopes=torch.rand(2, 4, device=backend.device), window=(40, 3), scale=0.3)


@pytest.mark.parametrize("time", [1500])
def test_thousands_of_tokens(backend, time):
    if backend.emulated:
        time //= 4
    dtype = torch.bfloat16
    check(backend, tensors(backend, dtype, (time, time), batch=1, heads=(2, 1)))


@dtypes
@pytest.mark.parametrize("size", [0.0, 4.0])
def test_flat_and_peaked_softmax(backend, dtype, size):
    """All logits zero, and logits in the hundreds: one key takes all."""
    need(backend, dtype)
    check(backend, tensors(backend, dtype, (65, 130), batch=1, size=size))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("latents", [None, 1], ids=["keys", "keys and a latent"])
def test_rows_that_see_few_keys(backend, dtype, latents):
    """With two or three keys dP - delta cancels: a delta made of the rounded output is up to twice as bad as plain
    PyTorch, one made of P dP is better. Pooled over many such rows."""
    inputs = tensors(backend, dtype, (2, 2), batch=32, heads=(4, 4), dims=(32, 32), latents=latents)
    upstream = [torch.randn(32, 2, 4, 32, device=backend.device).to(dtype), None]
    wide = {n: x.double() for n, x in inputs.items()}
    exact = run_with_gradients(attend(reference), wide, {}, upstream, inputs)[1]
    plain, ours = (run_with_gradients(attend(ops), inputs, {}, upstream, inputs)[1] for ops in (reference, backend.ops))
    for name in inputs:
        error, allowed = (rms(g[name].double() - exact[name]) for g in (ours, plain))
        assert error <= 1.15 * allowed, f"d{name}: {error:.2e}, plain PyTorch {allowed:.2e}"


@dtypes
@pytest.mark.parametrize("layout", ["bhtd", "guarded", "fused qkv", "broadcast"])
def test_layouts(backend, dtype, layout):
    """Views that cost no copy give the same bits as contiguous tensors, and NaN around them is never seen."""
    need(backend, dtype)
    inputs = tensors(backend, dtype, (65, 65), heads=(2, 2), dims=(32, 32))
    if layout == "bhtd":
        views = {n: bthd_from_bhtd(x) for n, x in inputs.items()}
    elif layout == "guarded":
        views = {n: guarded(x) for n, x in inputs.items()}
    elif layout == "fused qkv":
        together = torch.stack([inputs[n] for n in "qkv"], 2)  # [B, T, 3, H, D]
        views = {n: together[:, :, i] for i, n in enumerate("qkv")}
    else:
        inputs = {n: x[:1, :, :1].expand(2, -1, 2, -1) for n, x in inputs.items()}
        views, inputs = inputs, {n: x.contiguous() for n, x in inputs.items()}
    assert any(not x.is_contiguous() for x in views.values())
    upstream = [torch.randn(2, 65, 2, 32, device=backend.device), torch.randn(2, 2, 65, device=backend.device)]
    run = [run_with_gradients(attend(backend.ops), t, {}, upstream, "qkv") for t in (inputs, views)]
    pairs = [*zip(run[0][0], run[1][0]), *((run[0][1][n], run[1][1][n]) for n in "qkv")]
    if layout == "broadcast" and backend.name in ("cuda", "emulated") and dtype != torch.float32:
        # TMA reads no broadcast dimension: on Hopper another kernel does, whose roundings may fall the other way.
        assert all(rms(a.double() - b.double()) <= 0.5 * torch.finfo(dtype).eps * rms(b) for a, b in pairs)
    else:
        assert all(bitwise_equal(a, b) for a, b in pairs)


@dtypes
def test_gradient_layouts(backend, dtype):
    """Upstream gradients come expanded, transposed, or for one output only."""
    need(backend, dtype)
    inputs = tensors(backend, dtype, (33, 48), dims=(16, 16))
    one = torch.ones((), device=backend.device)
    lse = torch.randn(2, 33, 4, device=backend.device).transpose(1, 2)
    for upstream in (
        [one.expand(2, 33, 4, 16), None],
        [torch.randn(2, 4, 33, 16, device=backend.device).transpose(1, 2), lse],
        [torch.randn(2, 33, 16, 4, device=backend.device).transpose(2, 3), None],
        [None, lse],
    ):
        check(backend, inputs, upstream=upstream)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("case", ["plain", "packed", "latents", "softcap", "window", "prefix"])
def test_gradcheck(backend, case):
    """Finite differences through the compiled op, out and lse, in float64."""
    inputs = tensors(backend, torch.float64, (5, 7), batch=1, heads=(2, 1), dims=(8, 8), latents=3)
    tensor_names = ["q", "k", "v"] + (["latent_k", "latent_v"] if case == "latents" else [])
    options = {
        "plain": {"causal": False},
        "packed": {"cu_seqlens_q": int32(backend, 0, 2, 2, 4), "cu_seqlens_k": int32(backend, 0, 3, 4, 6)},
        "latents": {"latent_begin": int32(backend, [0, 1, 2, 3, 0]), "latent_end": int32(backend, [3, 2, 3, 3, 0])},
        "softcap": {"softcap": 1.5, "alibi_slopes": torch.rand(2)},
        "window": {"window": (2, 1), "causal": False},
        "prefix": {"prefix_len": int32(backend, [0, 7, 3, 1, 5])},
    }[case]
    leaves = [inputs[n].requires_grad_() for n in tensor_names]

    def function(*args):
        out, lse = attend(backend.ops)(**dict(zip(tensor_names, args)), **options)
        return out, lse.masked_fill(lse.isinf(), 0)  # no finite differences of -inf

    assert torch.autograd.gradcheck(function, leaves)


def test_only_the_gradients_asked_for(backend):
    """Each subset gives the same bits as all together, and None elsewhere."""
    inputs = tensors(backend, torch.float32, (40, 50), sinks=True, latents=5, dims=(32, 32))
    names = list(inputs)
    upstream = [torch.randn(2, 40, 4, 32, device=backend.device), torch.randn(2, 4, 40, device=backend.device)]
    _, everything = run_with_gradients(attend(backend.ops), inputs, {}, upstream, names)
    assert everything.keys() == set(names)
    for subset in (["q"], ["k"], ["v"], ["sinks"], ["latent_k"], ["latent_v"], ["q", "latent_v"], ["k", "v"]):
        _, found = run_with_gradients(attend(backend.ops), inputs, {}, upstream, subset)
        assert found.keys() == set(subset)
        for name in subset:
            torch.testing.assert_close(found[name], everything[name], rtol=1e-6, atol=1e-6)


@dtypes
def test_bitwise_repeats(backend, dtype):
    need(backend, dtype)
    inputs = tensors(backend, dtype, (129, 200), batch=1, sinks=True, latents=9)
    upstream = [torch.randn(1, 129, 4, 64, device=backend.device), torch.randn(1, 4, 129, device=backend.device)]

    def run():
        outputs, found = run_with_gradients(
            attend(backend.ops), inputs, {"deterministic": True}, upstream, list(inputs)
        )
        return [*outputs, *found.values()]

    first = run()
    for _ in range(3 if backend.emulated else 20):
        assert all(bitwise_equal(a, b) for a, b in zip(first, run()))


@pytest.mark.backends("cpu")
def test_any_number_of_threads(backend):
    inputs = tensors(backend, torch.bfloat16, (300, 300), sinks=True, latents=9)
    upstream = [torch.randn(2, 300, 4, 64), torch.randn(2, 4, 300)]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            outputs, found = run_with_gradients(attend(backend.ops), inputs, {}, upstream, list(inputs))
            results.append([*outputs, *found.values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(bitwise_equal(a, b) for a, b in zip(results[0], other))


def test_batch_composition(backend):
    """A sequence gives the same bits alone, in a batch, and packed beside others."""
    inputs = tensors(backend, torch.bfloat16, (70, 70), batch=3)
    together = attend(backend.ops)(**inputs)
    bounds = int32(backend, 0, 70, 140, 210)
    flat = {n: x.flatten(0, 1)[None] for n, x in inputs.items()}
    packed = attend(backend.ops)(**flat, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    for b in range(3):
        alone = attend(backend.ops)(**{n: x[b : b + 1] for n, x in inputs.items()})
        assert bitwise_equal(alone[0], together[0][b : b + 1]) and bitwise_equal(alone[1], together[1][b : b + 1])
        assert bitwise_equal(alone[0], packed[0][:, 70 * b : 70 * b + 70])
        assert bitwise_equal(alone[1], packed[1][..., 70 * b : 70 * b + 70])


@dtypes
def test_nan_propagates_only_where_it_is_seen(backend, dtype):
    """One head of one batch row is NaN; the other heads and rows keep their bits."""
    need(backend, dtype)
    inputs = tensors(backend, dtype, (40, 40), dims=(16, 16))
    clean = attend(backend.ops)(**inputs)
    inputs["k"][1, :, 1] = math.nan
    inputs["v"][0, :, 0] = math.inf
    out, lse = attend(backend.ops)(**inputs)
    assert out[1, :, 2:].isnan().all() and lse[1, 2:].isnan().all()
    assert not out[0, :, :2].isfinite().any()
    for b, heads in ((1, slice(0, 2)), (0, slice(2, 4))):
        assert bitwise_equal(out[b, :, heads], clean[0][b, :, heads])
        assert bitwise_equal(lse[b, heads], clean[1][b, heads])


@dtypes
@pytest.mark.parametrize("which", ["k", "v"])
def test_rows_before_a_bad_key_keep_their_values(backend, dtype, which):
    """A causal row shares its tile with keys it does not see: 0 * NaN must not reach it."""
    need(backend, dtype)
    inputs = tensors(backend, dtype, (100, 100), batch=1, dims=(32, 32))
    clean = attend(backend.ops)(**inputs)
    inputs[which][0, 50] = math.nan
    out, lse = attend(backend.ops)(**inputs)
    # Equal up to one rounding, norm-wise: a tile that holds NaN may take another path.
    seen, expected = out[:, :50].double(), clean[0][:, :50].double()
    rounding = max(torch.finfo(inputs["q"].dtype).eps, 2e-5)
    assert (seen - expected).norm() <= rounding * expected.norm()
    torch.testing.assert_close(lse[..., :50], clean[1][..., :50], atol=1e-4, rtol=0)
    assert out[:, 50:].isnan().all()


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("causal", [False, True])
def test_an_infinite_upstream_gradient_stays_in_its_column(backend, dtype, causal):
    """dV of the keys that a row sees is infinite where the row's d_out is; all else of dV keeps its value. (In kernels
    that split numbers into parts an infinity would leave NaN.)"""
    inputs, options = tensors(backend, dtype, (200, 200), batch=1, dims=(32, 32)), {"causal": causal}
    d_out = torch.randn_like(inputs["q"])
    ours = attend(backend.ops)
    clean = run_with_gradients(ours, inputs, options, [d_out, None], "v")[1]["v"]
    d_out[0, 70, 0, 3] = math.inf
    dv = run_with_gradients(ours, inputs, options, [d_out, None], "v")[1]["v"]
    expected = torch.zeros_like(dv, dtype=torch.bool)
    expected[0, : 71 if causal else 200, 0, 3] = True
    assert torch.equal(dv == math.inf, expected)
    # Equal up to rounding: a tile that holds an infinity may take another path.
    seen, other = clean[~expected].double(), dv[~expected].double()
    assert (other - seen).norm() <= max(torch.finfo(dtype).eps, 2e-6) * seen.norm()


@pytest.mark.backends("cpu", "cuda")
def test_lse_and_sdpa_agree(backend):
    """Not only with our own reference: PyTorch's fused attention, and a log-sum-exp from first principles."""
    inputs = tensors(backend, torch.float32, (100, 100), heads=(4, 4))
    out, lse = attend(backend.ops)(**inputs)
    q, k, v = (x.transpose(1, 2) for x in inputs.values())
    torch.testing.assert_close(
        out.transpose(1, 2), scaled_dot_product_attention(q, k, v, is_causal=True), rtol=1e-4, atol=1e-5
    )
    logits = (q.double() @ k.double().transpose(2, 3) / 8).masked_fill(
        ~torch.ones(100, 100, dtype=torch.bool, device=q.device).tril(), -math.inf
    )
    assert_rule("lse", lse, logits.logsumexp(-1), lse, length=100)


def test_autocast(backend):
    inputs = tensors(backend, torch.float32, (20, 20))
    with torch.autocast(backend.device, torch.bfloat16):
        out = backend.ops.attention(**inputs)
        mixed = backend.ops.attention(inputs["q"].bfloat16(), inputs["k"], inputs["v"].half())
    low = backend.ops.attention(**{n: x.bfloat16() for n, x in inputs.items()})
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert bitwise_equal(out, low)


def test_double_backward_is_refused(backend):
    inputs = tensors(backend, torch.float32, (4, 4), dims=(8, 8))
    q = inputs.pop("q").requires_grad_()
    (dq,) = torch.autograd.grad(backend.ops.attention(q, **inputs).sum(), [q], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(dq.sum(), [q])


@settings(max_examples=12)
@given(data=st.data())
def test_random_shapes(backend, data):
    """Random lengths, heads, dimensions, strides and masks."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(backend.dtypes))
    time = draw(st.tuples(st.integers(0, 110), st.integers(0, 110)))
    kv = draw(st.integers(1, 3))
    dims = draw(st.tuples(*[st.integers(1, 16).map(lambda n: 8 * n)] * 2))
    inputs = tensors(
        backend,
        dtype,
        time,
        batch=draw(st.integers(1, 2)),
        heads=(kv * draw(st.integers(1, 3)), kv),
        dims=dims,
        sinks=draw(st.booleans()),
        latents=draw(st.sampled_from([None, 0, 1, 40])),
        shared_latents=draw(st.booleans()),
    )
    if draw(st.booleans()):
        inputs = {n: guarded(x) if x.dim() == 4 and n in "qkv" else x for n, x in inputs.items()}
    window = draw(st.tuples(st.integers(-1, 160), st.integers(-1, 160)))
    check(backend, inputs, causal=draw(st.booleans()), window=window, softcap=draw(st.sampled_from([0.0, 3.0])))


def test_reference_is_the_definition():
    """The functions of both packages have the same parameters and defaults."""
    import inspect

    from yoco_ext import ops

    for name in reference.__all__:
        fused, plain = (inspect.signature(getattr(m, name)).parameters for m in (ops, reference))
        explicit = {n: p for n, p in plain.items() if p.kind is not p.VAR_KEYWORD and n in fused}
        assert {n: p.default for n, p in explicit.items()} == {n: fused[n].default for n in explicit}, name
        if not any(p.kind is p.VAR_KEYWORD for p in (*fused.values(), *plain.values())):
            assert fused.keys() == plain.keys(), name
