"""Differential attention: the combine kernel, and the whole against its definition by two attentions."""

from __future__ import annotations

import numerics
import pytest
import torch
from conftest import Backend
from hypothesis import given
from hypothesis import strategies as st

import yoco_ext.reference as reference

SHAPES = [(1, 1, 1, 8), (2, 3, 4, 16), (1, 67, 3, 120), (2, 33, 2, 256), (3, 0, 2, 64), (1, 300, 2, 128)]


def combine_inputs(backend: Backend, shape, dtype, lam: str, weight: str):
    batch, time, heads, dim = shape
    size = torch.randn(batch, time, 2 * heads, 1, device=backend.device).exp()  # heads of very different size
    lam_shape = {"scalar": (), "head": (heads,), "token": (batch, time, heads)}[lam]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weight_dtype = {"none": None, "same": dtype, "float32": torch.float32}[weight]
    return {
        "a": (torch.randn(batch, time, 2 * heads, dim, device=backend.device) * size).to(dtype),
        "lam": torch.randn(lam_shape, device=backend.device).to(acc),
        "weight": None if weight_dtype is None else torch.randn(dim, device=backend.device).to(weight_dtype),
    }


@pytest.mark.parametrize(
    ("lam", "weight", "sigmoid", "normalize"),
    [
        ("scalar", "same", False, True),
        ("head", "float32", True, True),
        ("token", "none", False, True),
        ("token", "none", True, False),
        ("scalar", "same", False, False),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_combine_values_and_gradients(backend: Backend, shape, lam, weight, sigmoid, normalize) -> None:
    for dtype in backend.dtypes:
        if dtype == torch.float64 and weight == "float32":
            continue  # float64 stays float64 throughout
        tensors = combine_inputs(backend, shape, dtype, lam, weight)
        numerics.compare(
            backend.ops.differential_combine,
            reference.differential_combine,
            tensors,
            wanted=[name for name, t in tensors.items() if t is not None],
            length=max(1, shape[3], shape[0] * shape[1] * shape[2] * shape[3]),
            sigmoid=sigmoid,
            normalize=normalize,
            eps=1e-5,
            scale=0.4,
        )


@given(data=st.data())
def test_combine_random_shapes_and_strides(backend: Backend, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(backend.dtypes))
    shape = (*(data.draw(st.integers(1, n)) for n in (3, 9, 4)), 8 * data.draw(st.integers(1, 32)))
    tensors = combine_inputs(backend, shape, dtype, data.draw(st.sampled_from(["scalar", "head", "token"])), "same")
    layout = data.draw(st.sampled_from([lambda x: x, numerics.guarded, numerics.bthd_from_bhtd]))
    tensors["a"] = layout(tensors["a"])
    numerics.compare(
        backend.ops.differential_combine,
        reference.differential_combine,
        tensors,
        wanted=list(tensors),
        length=shape[0] * shape[1] * shape[2] * shape[3],
        eps=data.draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
    )


def test_combine_takes_a_number(backend: Backend) -> None:
    a = torch.randn(2, 5, 4, 16, device=backend.device)
    expected = backend.ops.differential_combine(a, torch.tensor(0.3, device=backend.device))
    assert numerics.bitwise_equal(backend.ops.differential_combine(a, 0.3), expected)


def test_combine_is_repeatable_and_a_bad_head_stays_alone(backend: Backend) -> None:
    tensors = combine_inputs(backend, (2, 70, 3, 24), torch.float32, "token", "same")
    up = torch.randn(2, 70, 3, 24, device=backend.device)

    def once() -> tuple:
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        y = backend.ops.differential_combine(**leaves)
        return y.detach(), torch.autograd.grad(y, list(leaves.values()), up)

    (y, gradients), (again, repeated) = once(), once()
    assert numerics.bitwise_equal(y, again)
    assert all(numerics.bitwise_equal(a, b) for a, b in zip(gradients, repeated, strict=True))
    tensors["a"][1, 2, 3, 5] = torch.nan
    spoilt, _ = once()
    assert spoilt[1, 2, 1].isnan().all()
    spoilt[1, 2, 1] = y[1, 2, 1]
    assert numerics.bitwise_equal(spoilt, y)


@pytest.mark.backends("cpu", "reference")
@pytest.mark.parametrize("normalize", [True, False])
def test_combine_gradcheck(backend: Backend, normalize: bool) -> None:
    a = torch.randn(1, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    lam, weight = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (2, 8))
    for sigmoid in (False, True):
        assert torch.autograd.gradcheck(
            lambda *x, s=sigmoid: backend.ops.differential_combine(*x, normalize=normalize, sigmoid=s, scale=0.3),
            (a, lam, weight),
        )


# ---- the whole -----------------------------------------------------------------------------------------------------
def attention_inputs(backend: Backend, dtype, *, batch=2, time_q=37, time_k=37, heads=4, heads_kv=2, dim=32):
    def random(*shape):
        return torch.randn(shape, device=backend.device).to(dtype)

    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "q": random(batch, time_q, 2 * heads, dim),
        "k": random(batch, time_k, 2 * heads_kv, dim),
        "v": random(batch, time_k, heads_kv, 2 * dim),
        "lam": (0.7 + 0.1 * torch.randn(batch, time_q, heads, device=backend.device)).to(acc),
        "weight": (1 + 0.1 * torch.randn(2 * dim, device=backend.device)).to(dtype),
    }


CASES = {
    "causal": {},
    "window": {"window": (9, 0), "scale": 0.3},
    "full": {"causal": False},
    "softcap": {"softcap": 5.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_attention_values_and_gradients(backend: Backend, case: str, dim: int) -> None:
    for dtype in backend.dtypes:
        if backend.emulated and (dtype != torch.bfloat16 or case != "causal"):
            continue  # attention itself has its own tests there
        shape = {"batch": 1, "heads": 2, "heads_kv": 1} if backend.emulated else {}
        tensors = attention_inputs(backend, dtype, dim=dim, **shape)
        numerics.compare(
            backend.ops.differential_attention,
            reference.differential_attention,
            tensors,
            wanted=list(tensors),
            length=37 * 37 * dim,
            lambda_init=0.2,
            **CASES[case],
        )


@pytest.mark.backends("cpu", "reference", "cuda")
def test_attention_takes_values_as_pairs_packed_sequences_sinks_and_slopes(backend: Backend) -> None:
    tensors = attention_inputs(backend, torch.float32, batch=1, time_q=40, time_k=40)
    expected = backend.ops.differential_attention(**tensors, lambda_init=0.2)
    pairs = {**tensors, "v": tensors["v"].reshape(1, 40, 4, 32)}
    assert numerics.bitwise_equal(backend.ops.differential_attention(**pairs, lambda_init=0.2), expected)
    tensors["sinks"] = torch.randn(8, device=backend.device)
    bounds = numerics.lengths_to_cu_seqlens([13, 27], backend.device)
    numerics.compare(
        backend.ops.differential_attention,
        reference.differential_attention,
        tensors,
        wanted=list(tensors),
        length=40 * 40 * 32,
        lambda_init=0.5,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        alibi_slopes=torch.rand(8, device=backend.device),
    )


@pytest.mark.backends("cpu", "cuda")
def test_one_call_is_four_calls_of_flash_attn(backend: Backend) -> None:
    """What ArchScale's FlashDiffAttention does: four attentions, concatenation, difference, norm, factor."""
    from yoco_ext.compat.flash_attn import flash_attn_varlen_func

    tensors = attention_inputs(backend, torch.float32, batch=1, time_q=40, time_k=40)
    q, k, v = tensors["q"][0], tensors["k"][0], tensors["v"].reshape(40, 4, 32)
    bounds, lam, lambda_init = numerics.lengths_to_cu_seqlens([13, 27], backend.device), 0.61, 0.35

    def one(i: int, j: int):
        pair = q[:, i::2], k[:, i::2], v[:, j::2]
        return flash_attn_varlen_func(*pair, bounds, bounds, 27, 27, causal=True, window_size=(7, 0))

    first, second = (torch.cat([one(i, 0), one(i, 1)], -1) for i in (0, 1))
    normed = torch.nn.functional.rms_norm(first - lam * second, (64,), tensors["weight"], 1e-5)
    found = backend.ops.differential_attention(
        q[None],
        k[None],
        v[None],
        lam,
        tensors["weight"],
        lambda_init=lambda_init,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        window=(7, 0),
    )
    torch.testing.assert_close(found[0], normed * (1 - lambda_init), atol=2e-5, rtol=1e-4)


@pytest.mark.backends("cpu", "reference", "cuda")
def test_v2_values_and_gradients(backend: Backend) -> None:
    for dtype in backend.dtypes:
        tensors = attention_inputs(backend, dtype, heads=4, heads_kv=2)
        tensors["k"] = tensors["k"][:, :, ::2]
        tensors["lam"] = torch.randn(2, 37, 4, device=backend.device).to(tensors["lam"].dtype)
        del tensors["weight"]
        numerics.compare(
            backend.ops.differential_attention_v2,
            reference.differential_attention_v2,
            tensors,
            wanted=list(tensors),
            length=37 * 37 * 32,
        )


@pytest.mark.backends("cpu", "reference")
def test_v2_is_a_difference_of_neighbouring_heads(backend: Backend) -> None:
    q, k, v = torch.randn(1, 9, 4, 16), torch.randn(1, 9, 1, 16), torch.randn(1, 9, 1, 16)
    lam = torch.randn(1, 9, 2)
    a = reference.attention(q, k, v)
    expected = a[:, :, 0::2] - lam.sigmoid()[..., None] * a[:, :, 1::2]
    torch.testing.assert_close(backend.ops.differential_attention_v2(q, k, v, lam), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.backends("cpu", "cuda")
def test_layers_share_paired_keys_and_values(backend: Backend) -> None:
    """Two cross layers over one SharedKV: values, and gradients of k and v summed over the layers."""
    tensors = attention_inputs(backend, torch.float32)
    tensors["first"] = tensors.pop("q")
    tensors["second"] = torch.randn_like(tensors["first"])

    def shared_layers(first, second, k, v, **rest):
        shared = yoco_ext_shared(backend, k, v)
        return tuple(backend.ops.differential_cross_attention(q, shared, **rest) for q in (first, second))

    def layers(first, second, k, v, **rest):
        return tuple(reference.differential_attention(q, k, v, **rest) for q in (first, second))

    numerics.compare(
        shared_layers, layers, tensors, wanted=["first", "second", "k", "v"], length=37 * 37 * 32, lambda_init=0.3
    )


def yoco_ext_shared(backend: Backend, k, v):
    return backend.ops.SharedKV(backend.ops.pair_heads(k), v)


@pytest.mark.backends("cpu", "reference", "cuda")
def test_decode_continues_a_prefill(backend: Backend) -> None:
    tensors = attention_inputs(backend, torch.float32)
    rest = {"lam": tensors["lam"][:, -3:], "weight": tensors["weight"], "lambda_init": 0.3}
    full = backend.ops.differential_attention(**tensors, lambda_init=0.3)
    caches = [torch.full((2, 64, 2, 64), torch.nan, device=backend.device) for _ in range(2)]
    used = torch.zeros(2, dtype=torch.int32, device=backend.device)
    k = backend.ops.pair_heads(tensors["k"])
    backend.ops.append_kv(k, tensors["v"], *caches, seqused_k=used)
    out = backend.ops.differential_attention_decode(tensors["q"][:, -3:], *caches, seqused_k=used + 37, **rest)
    torch.testing.assert_close(out, full[:, -3:], atol=1e-5, rtol=1e-4)


@pytest.mark.backends("cpu")
def test_compiles_without_graph_breaks(backend: Backend) -> None:
    tensors = attention_inputs(backend, torch.float32)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}

    def step(q, k, v, lam, weight):
        return backend.ops.differential_attention(q, k, v, lam, weight, lambda_init=0.2)

    expected = step(**leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(**leaves)
    up = torch.randn_like(expected)
    torch.testing.assert_close(compiled, expected)
    for a, b in zip(
        torch.autograd.grad(compiled, list(leaves.values()), up),
        torch.autograd.grad(expected, list(leaves.values()), up),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_bad_input(backend: Backend) -> None:
    ops, a = backend.ops, torch.ones(1, 4, 4, 16, device=backend.device)
    lam = torch.ones(3, device=backend.device)
    for match, call in {
        "a:": lambda: ops.differential_combine(a[:, :, :3], 0.1),
        "lam": lambda: ops.differential_combine(a, lam),
        "lam:": lambda: ops.differential_combine(a, None),
        "weight": lambda: ops.differential_combine(a, 0.1, torch.ones(8, device=backend.device)),
        "eps": lambda: ops.differential_combine(a, 0.1, eps=-1.0),
        "k:": lambda: ops.differential_attention(a, a[..., :8], a, 0.1, lambda_init=0.1),
        "v:": lambda: ops.differential_attention(a, a, a[:, :, :3], 0.1, lambda_init=0.1),
        "return_lse": lambda: ops.differential_attention(a, a, a, 0.1, lambda_init=0.1, return_lse=True),
        "q:": lambda: ops.differential_attention_v2(a, torch.cat([a, a], 2), a, lam),
        "shared_kv.k": lambda: ops.differential_cross_attention(a, ops.SharedKV(a, a), 0.1, lambda_init=0.1),
        "k_cache": lambda: ops.differential_attention_decode(a, a, a, 0.1, lambda_init=0.1, seqused_k=lam),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
