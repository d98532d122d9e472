"""append_kv: what is written where (and nothing else), rotation, quantisation, refusal before any write."""

from __future__ import annotations

from typing import Any

import numerics
import pytest
import torch
from conftest import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from yoco_ext import reference

CACHE_DTYPES = [None, torch.int8, torch.float8_e4m3fn]


def filled(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """A cache that holds something recognisable everywhere."""
    return torch.randint(1, 60, shape, device=device).float().to(dtype)


def both(backend: Backend, k: Tensor, v: Tensor, caches: tuple[Tensor, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """The caches after the op and after the reference in the same precision."""
    ours, expected = [c.clone() for c in caches], [c.clone() for c in caches]
    assert backend.ops.append_kv(k, v, *ours, **options) is None
    reference.append_kv(k, v, *expected, **options)
    return (*ours, *expected)


def tokens(
    backend: Backend, shape: tuple[int, ...], dims: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    k, v = (torch.randn(*shape, d, device=backend.device).to(dtype) for d in dims)
    return k, v


def scales(backend: Backend, heads: int, cache_dtype: torch.dtype | None) -> dict[str, Tensor]:
    if cache_dtype is None:
        return {}
    limit = 127 if cache_dtype == torch.int8 else 448
    # Some heads saturate, some do not.
    return {n: (torch.rand(heads, device=backend.device) + 0.5) * 3 / limit for n in ("k_scale", "v_scale")}


def int32(backend: Backend, values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=backend.device)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "paged", "ring", "strided"])
def test_bit_for_bit(backend: Backend, layout: str, cache_dtype: torch.dtype | None) -> None:
    """Without a rotation there is one right answer; what is not written stays as it was."""
    for dtype in backend.dtypes:
        k, v = tokens(backend, (3, 11, 2), (64, 40), dtype)
        options: dict[str, Any] = {"seqused_k": int32(backend, [0, 9, 29]), **scales(backend, 2, cache_dtype)}
        shape = (3, 40, 2)
        if layout == "paged":
            shape = (14, 8, 2)
            options["block_table"] = int32(backend, [[3, 1, -1, -1, -1], [7, 2, 9, 99, 99], [10, 11, 12, 6, 0]])
        elif layout == "ring":
            shape = (3, 7, 2)  # fewer slots than tokens: the last ones stay
            options["ring"] = True
        caches = tuple(filled((*shape, d), cache_dtype or dtype, backend.device) for d in (64, 40))
        if layout == "strided":
            caches = tuple(c.transpose(1, 2).contiguous().transpose(1, 2) for c in caches)
            k, v = numerics.guarded(k), numerics.bthd_from_bhtd(v)
        our_k, our_v, k_expected, v_expected = both(backend, k, v, caches, **options)
        assert numerics.bitwise_equal(our_k, k_expected)
        assert numerics.bitwise_equal(our_v, v_expected)
        assert not numerics.bitwise_equal(our_k, caches[0])


def test_int8_is_rounded_once(backend: Backend) -> None:
    """-100.5000001 is nearer to -101; by way of float32 it would be a tie and go to -100."""
    if torch.float64 not in backend.dtypes:
        pytest.skip(f"{backend.name} has no float64")
    k = torch.tensor([-100.5000001, 10.5000001, 41.4999999, 42.5, 43.5, 0.0, 127.4, 900.0], dtype=torch.float64)
    k = k.view(1, 1, 1, 8).to(backend.device)
    caches = tuple(filled((1, 2, 1, 8), torch.int8, backend.device) for _ in range(2))
    backend.ops.append_kv(k, k, *caches, seqused_k=int32(backend, [0]))
    for cache in caches:
        assert cache[0, 0, 0].tolist() == [-101, 11, 41, 42, 44, 0, 127, 127]


@settings(max_examples=25)
@given(data=st.data())
def test_packed_and_random(backend: Backend, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(backend.dtypes))
    cache_dtype = data.draw(st.sampled_from(CACHE_DTYPES))
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    used = [data.draw(st.integers(0, 30)) for _ in lengths]
    heads, dims = data.draw(st.integers(1, 3)), (8 * data.draw(st.integers(1, 17)), 8 * data.draw(st.integers(1, 17)))
    k, v = tokens(backend, (1, sum(lengths) + data.draw(st.integers(0, 3)), heads), dims, dtype)
    options = {
        "seqused_k": int32(backend, used),
        "cu_seqlens": numerics.lengths_to_cu_seqlens(lengths, backend.device),
        **scales(backend, heads, cache_dtype),
    }
    caches = tuple(filled((len(lengths), 50, heads, d), cache_dtype or dtype, backend.device) for d in dims)
    our_k, our_v, k_expected, v_expected = both(backend, k, v, caches, **options)
    assert numerics.bitwise_equal(our_k, k_expected) and numerics.bitwise_equal(our_v, v_expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "pairs"), [(64, 32), (40, 7), (128, 64)])
def test_rotation(backend: Backend, dim: int, pairs: int, interleaved: bool) -> None:
    """The key is rotated by its position in the cache, also at 1M, and rounded once."""
    inv_freq = 500_000.0 ** (-torch.arange(pairs, device=backend.device) / pairs)
    for dtype in backend.dtypes:
        k, v = tokens(backend, (2, 5, 2), (dim, 8), dtype)
        used = int32(backend, [3, 1_048_570])
        options = {"seqused_k": used, "inv_freq": inv_freq, "interleaved": interleaved, "ring": True}
        caches = tuple(torch.zeros(2, 16, 2, d, dtype=dtype, device=backend.device) for d in (dim, 8))

        def call(op: Any, k: Tensor, v: Tensor, caches: tuple = caches, options: dict = options) -> tuple[Tensor, ...]:
            k_cache, v_cache = (c.to(k.dtype) for c in caches)
            k_cache, v_cache = k_cache.clone(), v_cache.clone()
            op(k, v, k_cache, v_cache, **options)
            return k_cache, v_cache

        out = numerics.compare(
            lambda k, v: call(backend.ops.append_kv, k, v),
            lambda k, v: call(reference.append_kv, k, v),
            {"k": k, "v": v},
        )
        turned = backend.ops.rotary(k, inv_freq, offsets=used, interleaved=interleaved)
        for b, begin in enumerate(used.tolist()):
            slots = (begin + torch.arange(5)) % 16
            assert numerics.bitwise_equal(out[0][b, slots], turned[b])


def test_rotated_and_quantised(backend: Backend) -> None:
    """Rounded once, from the rotated key: at most half a unit of the stored number away (and float32 noise)."""
    inv_freq = 10_000.0 ** (-torch.arange(32, device=backend.device) / 32)
    for dtype in backend.dtypes:
        k, v = tokens(backend, (1, 9, 2), (64, 64), dtype)
        used = int32(backend, [1000])
        cache = torch.zeros(1, 2000, 2, 64, dtype=torch.int8, device=backend.device)
        scale = torch.full((2,), 0.05, device=backend.device)
        backend.ops.append_kv(
            k, v, cache, cache.clone(), seqused_k=used, inv_freq=inv_freq, k_scale=scale, v_scale=scale
        )
        exact = reference.rotary(k.double(), inv_freq, offsets=1000) / 0.05
        assert (cache[0, 1000:1009].double() - exact[0].clamp(-127, 127)).abs().max() <= 0.5 + 1e-4


def test_every_rounding(backend: Backend) -> None:
    """Ties go to even, large numbers saturate, float8 subnormals and NaN survive; int8 stores NaN as 0."""
    values = torch.tensor(
        [0.5, 1.5, -2.5, 126.5, 127.4, 200, -1e30, torch.inf, torch.nan, -0.0, 2**-9, 2**-10, 3 * 2**-10]
    )
    values = torch.cat([values, torch.tensor([1.0625, 1.1875, 447.0, 449.0, 464.0, 500.0, 0.0146, 0.0157, -0.0156])])
    values = torch.cat([values, torch.randn(42) * 10]).to(backend.device)
    for dtype in backend.dtypes:
        k = values.to(dtype).view(1, 1, 1, 64)
        used = int32(backend, [0])
        for cache_dtype in (torch.int8, torch.float8_e4m3fn):
            cache = torch.zeros(1, 1, 1, 64, dtype=cache_dtype, device=backend.device)
            backend.ops.append_kv(k, k, cache, cache.clone(), seqused_k=used)
            wide = k.float()
            if cache_dtype == torch.int8:
                expected = wide.nan_to_num(nan=0.0).round().clamp(-127, 127).to(torch.int8)
            else:
                expected = wide.clamp(-448, 448).to(torch.float8_e4m3fn)
            nan = expected.float().isnan()
            assert torch.equal(cache.float().isnan(), nan)
            assert numerics.bitwise_equal(cache[~nan], expected[~nan])


def test_append_then_decode_is_attention(backend: Backend) -> None:
    """A sequence fed in pieces through the cache gives what one pass gives."""
    pieces = [7, 1, 16, 3]
    for dtype in backend.dtypes:
        total = sum(pieces)
        q = torch.randn(2, total, 4, 32, device=backend.device).to(dtype)
        k, v = tokens(backend, (2, total, 2), (32, 32), dtype)
        exact = reference.attention(q.double(), k.double(), v.double())
        plain = reference.attention(q, k, v)
        caches = [torch.full((2, 32, 2, 32), torch.nan, dtype=dtype, device=backend.device) for _ in range(2)]
        outs, begin = [], 0
        for n in pieces:
            part = slice(begin, begin + n)
            backend.ops.append_kv(k[:, part], v[:, part], *caches, seqused_k=int32(backend, [begin] * 2))
            begin += n
            outs.append(backend.ops.attention_decode(q[:, part], *caches, seqused_k=int32(backend, [begin] * 2)))
        numerics.assert_rule("out", torch.cat(outs, 1), exact, plain, length=total)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seqused_k": [0, 38]}, "sequence 1|seqused_k"),
        ({"seqused_k": [-1, 3]}, "seqused_k"),
        ({"block_table": [[0, 1], [2, 10]]}, "block_table"),
        ({"block_table": [[-1, 1], [2, 3]]}, "block_table"),
    ],
)
def test_refusal_writes_nothing(backend: Backend, change: dict[str, list], match: str) -> None:
    if backend.device == "cuda":
        pytest.skip("contents of index tensors on the GPU are clamped there, not read by the host")
    k, v = tokens(backend, (2, 5, 2), (16, 16), torch.float32)
    options = {"seqused_k": int32(backend, change.get("seqused_k", [0, 19]))}
    shape = (2, 40, 2, 16)
    if "block_table" in change:
        options["block_table"] = int32(backend, change["block_table"])
        shape = (4, 20, 2, 16)
    caches = [filled(shape, torch.float32, backend.device) for _ in range(2)]
    before = [c.clone() for c in caches]
    with pytest.raises((ValueError, RuntimeError), match=match):
        backend.ops.append_kv(k, v, *caches, **options)
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"v": torch.ones(2, 4, 2, 16)}, r"\bv\b"),
        ({"k_cache": torch.ones(2, 40, 3, 16)}, "k_cache"),
        ({"v_cache": torch.ones(2, 40, 2, 16, dtype=torch.float16)}, "v_cache"),
        ({"seqused_k": torch.zeros(2)}, "seqused_k"),
        ({"k_scale": torch.ones(3)}, "k_scale"),
        ({"inv_freq": torch.ones(9)}, "inv_freq"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens|batch"),
        ({"ring": True, "block_table": torch.zeros(2, 3, dtype=torch.int32)}, "ring"),
    ],
)
def test_bad_arguments(backend: Backend, change: dict[str, Any], match: str) -> None:
    k, v = tokens(backend, (2, 5, 2), (16, 16), torch.float32)
    caches = [filled((2, 40, 2, 16), torch.float32, backend.device) for _ in range(2)]
    arguments = {"k": k, "v": v, "k_cache": caches[0], "v_cache": caches[1], "seqused_k": int32(backend, [0, 3])}
    arguments |= {n: x.to(backend.device) if isinstance(x, Tensor) else x for n, x in change.items()}
    with pytest.raises((ValueError, RuntimeError), match=match):
        backend.ops.append_kv(**arguments)
