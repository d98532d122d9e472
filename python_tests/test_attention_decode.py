"""attention_decode: the rule of numerics over layouts, dtypes, options; what is equal bit for bit; bad input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numerics
import pytest
import torch
from conftest import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from yoco_ext import reference


@dataclass
class Case:
    """A contiguous cache of `capacity` slots with `lengths` tokens in use; the rest is NaN where the dtype has NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    seqused_k: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, op: Any, **more: Any) -> Any:
        return op(self.q, self.k, self.v, seqused_k=self.seqused_k, **self.options, **more)

    def paged(self, page_size: int, *, spare: int = 3) -> Case:
        """The same tokens in shuffled pages; entries of the table behind the used pages are out of range."""
        batch, capacity = self.k.shape[:2]
        pages = -(-capacity // page_size)
        table = torch.randperm(batch * pages + spare, device=self.k.device)[: batch * pages].view(batch, pages).int()
        caches = []
        for cache in (self.k, self.v):
            paged = poison(cache.new_empty(batch * pages + spare, page_size, *cache.shape[2:]))
            for b in range(batch):
                for i in range(pages):
                    piece = cache[b, i * page_size : (i + 1) * page_size]
                    paged[table[b, i].item(), : len(piece)] = piece
            caches.append(paged)
        for b, used in enumerate(self.seqused_k.tolist()):
            table[b, -(-used // page_size) :] = 2**30
        return Case(self.q, *caches, self.seqused_k, {**self.options, "block_table": table})

    def ring(self, capacity: int) -> Case:
        """The last `capacity` tokens of each sequence, position p in slot p % capacity."""
        caches = []
        for cache in (self.k, self.v):
            rolled = poison(cache.new_empty(cache.shape[0], capacity, *cache.shape[2:]))
            for b, used in enumerate(self.seqused_k.tolist()):
                positions = torch.arange(max(0, used - capacity), used)
                rolled[b, positions % capacity] = cache[b, positions]
            caches.append(rolled)
        return Case(self.q, *caches, self.seqused_k, {**self.options, "ring": True})


def poison(x: Tensor) -> Tensor:
    if x.dtype == torch.int8:
        return x.fill_(127)
    if x.dtype == torch.float8_e4m3fn:
        x.view(torch.uint8).fill_(0x7F)
        return x
    return x.fill_(torch.nan)


def make(
    backend: Backend,
    dtype: torch.dtype,
    lengths: list[int],
    *,
    time: int = 1,
    heads: tuple[int, int] = (6, 2),
    dims: tuple[int, int] = (64, 64),
    cache_dtype: torch.dtype | None = None,
    spare: int = 5,
    **options: Any,
) -> Case:
    device, capacity = backend.device, max([*lengths, 1]) + spare
    q = torch.randn(len(lengths), time, heads[0], dims[0], device=device).to(dtype)
    caches, scales = [], {}
    for name, dim in (("k_scale", dims[0]), ("v_scale", dims[1])):
        values = torch.randn(len(lengths), capacity, heads[1], dim, device=device)
        if cache_dtype is None:
            cache = values.to(dtype)
        else:
            limit = 127 if cache_dtype == torch.int8 else 448
            scale = values.abs().amax((0, 1, 3)) / limit
            scaled = values / scale[:, None]
            cache = (scaled.round() if cache_dtype == torch.int8 else scaled).to(cache_dtype)
            scales[name] = scale
        for b, used in enumerate(lengths):
            poison(cache[b, used:])
        caches.append(cache)
    seqused_k = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Case(q, *caches, seqused_k, {**scales, **options})


def check(backend: Backend, case: Case) -> tuple[Tensor, Tensor]:
    """Output and lse by the rule of numerics; returns them."""
    options = dict(case.options)
    tensors = {"q": case.q, "k_cache": case.k, "v_cache": case.v, "sinks": options.pop("sinks", None)}
    latents = options.pop("latents", None)
    if latents is not None:
        tensors |= {"latent_k": latents[0], "latent_v": latents[1]}

    def call(op: Any) -> Any:
        def wrapped(latent_k: Tensor | None = None, latent_v: Tensor | None = None, **arguments: Any) -> Any:
            both = None if latent_k is None else (latent_k, latent_v)
            return op(latents=both, return_lse=True, seqused_k=case.seqused_k, **arguments)

        return wrapped

    length = max([*case.seqused_k.tolist(), 1])
    return numerics.compare(
        call(backend.ops.attention_decode), call(reference.attention_decode), tensors, length=length, **options
    )


LENGTHS = [[1], [64, 63, 65], [0, 17, 200], [1031], [3, 1300]]


def lengths_for(backend: Backend, lengths: list[int]) -> list[int]:
    return [min(n, 150) for n in lengths] if backend.emulated else lengths


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("time", [1, 3, 16])
def test_lengths(backend: Backend, lengths: list[int], time: int) -> None:
    for dtype in backend.dtypes:
        check(backend, make(backend, dtype, lengths_for(backend, lengths), time=time))


@pytest.mark.parametrize(
    ("dims", "heads"),
    [
        ((8, 8), (1, 1)),
        ((32, 128), (12, 2)),
        ((128, 96), (8, 8)),
        ((72, 40), (5, 1)),
        ((256, 256), (6, 1)),
        ((24, 200), (12, 2)),
    ],
    ids=str,
)
def test_dims_and_heads(backend: Backend, dims: tuple[int, int], heads: tuple[int, int]) -> None:
    for dtype in backend.dtypes:
        check(backend, make(backend, dtype, lengths_for(backend, [97, 600]), time=2, heads=heads, dims=dims))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 40)], ids=str)
@pytest.mark.parametrize("time", [1, 5])
def test_quantised_caches(backend: Backend, cache_dtype: torch.dtype, dims: tuple[int, int], time: int) -> None:
    for dtype in backend.dtypes:
        lengths = lengths_for(backend, [700, 33])
        case = make(backend, dtype, lengths, time=time, dims=dims, cache_dtype=cache_dtype)
        check(backend, case)
        check(backend, case.paged(16))


def test_every_stored_number(backend: Backend) -> None:
    """All 256 codes of int8 and float8 turn into the right values: one token, so the output is its value."""
    for cache_dtype in (torch.int8, torch.float8_e4m3fn):
        codes = torch.arange(256, dtype=torch.uint8, device=backend.device).view(cache_dtype).view(1, 1, 1, 256)
        k = torch.zeros_like(codes.view(torch.uint8)).view(cache_dtype)
        for dtype in backend.dtypes:
            q = torch.ones(1, 1, 1, 256, dtype=dtype, device=backend.device)
            used = torch.ones(1, dtype=torch.int32, device=backend.device)
            out = backend.ops.attention_decode(q, k, codes, seqused_k=used).flatten()
            torch.testing.assert_close(out.double(), codes.double().flatten(), rtol=0, atol=0, equal_nan=True)


def test_more_rows_than_one_tile(backend: Backend) -> None:
    """16 tokens of 6 heads per KV head: 96 packed rows, so K and V are read by two row tiles."""
    for dtype in backend.dtypes:
        for cache_dtype in (None, torch.float8_e4m3fn):
            lengths = lengths_for(backend, [300, 70])
            check(backend, make(backend, dtype, lengths, time=16, heads=(12, 2), cache_dtype=cache_dtype))


def test_broadcast_caches(backend: Backend) -> None:
    """One prompt's cache for all sequences, one KV head for all: dimensions of stride 0."""
    for dtype in backend.dtypes:
        case = make(backend, dtype, [90, 90], heads=(4, 2))
        for dim in (0, 2):
            k, v = (x.narrow(dim, 0, 1).expand_as(x) for x in (case.k, case.v))
            shared = Case(case.q, k, v, case.seqused_k)
            same = Case(case.q, k.contiguous(), v.contiguous(), case.seqused_k)
            check(backend, shared)
            if backend.fused:
                got, expected = (c.run(backend.ops.attention_decode) for c in (shared, same))
                assert numerics.bitwise_equal(got, expected)


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": (40, 0)},
    "narrow window": {"window": (0, 0)},
    "two-sided": {"causal": False, "window": (70, 2)},
    "not causal": {"causal": False},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.3},
    "sinks": {"sinks": (6,)},
    "alibi": {"alibi_slopes": (6,)},
    "alibi per sequence": {"alibi_slopes": (2, 6), "window": (100, 0)},
    "latents": {"latents": 1, "latent_len": [3, 70]},
    "latents per sequence": {"latents": 2, "sinks": (6,), "softcap": 20.0},
    "everything": {
        "window": (200, 0),
        "softcap": 8.0,
        "sinks": (6,),
        "alibi_slopes": (6,),
        "latents": 2,
        "latent_len": [70, 0],
    },
}


def with_options(case: Case, name: str) -> Case:
    options = dict(OPTIONS[name])
    device, dtype = case.q.device, case.q.dtype
    if "sinks" in options:
        options["sinks"] = torch.randn(*options["sinks"], device=device)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(*options["alibi_slopes"], device=device)
    if "latents" in options:
        shape = (options["latents"], 70, case.k.shape[2])
        dims = (case.k.shape[3], case.v.shape[3])
        options["latents"] = tuple(torch.randn(*shape, d, device=device).to(dtype) for d in dims)
    if "latent_len" in options:
        options["latent_len"] = torch.tensor(options["latent_len"], dtype=torch.int32, device=device)
    case.options.update(options)
    return case


@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("time", [1, 4])
def test_options(backend: Backend, name: str, time: int) -> None:
    for dtype in backend.dtypes:
        case = with_options(make(backend, dtype, lengths_for(backend, [300, 1100]), time=time), name)
        check(backend, case)
        if case.options.get("window", (-1, 0))[0] >= 0 and case.options.get("causal", True):
            check(backend, case.ring(case.options["window"][0] + time + 3))


@settings(max_examples=25)
@given(data=st.data())
def test_random(backend: Backend, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(backend.dtypes))
    most = 150 if backend.emulated else 1400
    lengths = data.draw(st.lists(st.integers(0, most), min_size=1, max_size=3))
    kv_heads = data.draw(st.integers(1, 3))
    case = make(
        backend,
        dtype,
        lengths,
        time=data.draw(st.integers(1, 16)),
        heads=(kv_heads * data.draw(st.integers(1, 4)), kv_heads),
        dims=(8 * data.draw(st.integers(1, 16)), 8 * data.draw(st.integers(1, 16))),
        cache_dtype=data.draw(st.sampled_from([None, None, torch.int8, torch.float8_e4m3fn])),
        window=(data.draw(st.sampled_from([-1, 0, 5, 64, 500])), data.draw(st.sampled_from([-1, 0, 3]))),
        causal=data.draw(st.booleans()),
        num_splits=data.draw(st.sampled_from([0, 0, 1, 3, 50])),
        softcap=data.draw(st.sampled_from([0.0, 0.0, 10.0])),
    )
    if data.draw(st.booleans()):
        case = case.paged(data.draw(st.sampled_from([1, 7, 16, 64, 100])))
    elif case.k.dtype == dtype and data.draw(st.booleans()):
        case.q, case.k, case.v = (numerics.guarded(x) for x in (case.q, case.k, case.v))
    check(backend, case)


@pytest.mark.parametrize("time", [1, 4])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_layouts_are_equal_bit_for_bit(backend: Backend, cache_dtype: torch.dtype | None, time: int) -> None:
    if not backend.fused:
        pytest.skip("bit for bit is what the compiled kernels promise")
    for dtype in backend.dtypes:
        lengths = lengths_for(backend, [900, 1, 130])
        case = make(backend, dtype, lengths, time=time, cache_dtype=cache_dtype, window=(120, 0))
        expected = case.run(backend.ops.attention_decode, return_lse=True)
        layouts = [case.paged(n) for n in (1, 5, 16, 48, 256, 2000)] + [case.ring(n) for n in (124, 125, 128, 777)]
        if cache_dtype is None:
            heads_first = [numerics.bthd_from_bhtd(x) for x in (case.q, case.k, case.v)]
            layouts.append(Case(*heads_first, case.seqused_k, case.options))
            guarded = [numerics.guarded(x) for x in (case.q, case.k, case.v)]
            layouts.append(Case(*guarded, case.seqused_k, case.options))
        for other in layouts:
            got = other.run(backend.ops.attention_decode, return_lse=True)
            assert all(numerics.bitwise_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_batch_composition_does_not_matter(backend: Backend) -> None:
    for dtype in backend.dtypes:
        lengths = lengths_for(backend, [900, 0, 130, 1300])
        case = make(backend, dtype, lengths, time=2)
        together = case.run(backend.ops.attention_decode)
        for b in range(len(lengths)):
            one = slice(b, b + 1)
            alone = Case(case.q[one], case.k[one], case.v[one], case.seqused_k[one]).run(backend.ops.attention_decode)
            assert numerics.bitwise_equal(alone, together[one])


def test_repeats_and_threads(backend: Backend) -> None:
    threads = torch.get_num_threads()
    for dtype in backend.dtypes:
        case = make(backend, dtype, lengths_for(backend, [2000, 77]), time=3, heads=(8, 4))
        first = case.run(backend.ops.attention_decode, return_lse=True)
        try:
            for n in (1, 2, 3, 1, 2):
                torch.set_num_threads(n)
                again = case.run(backend.ops.attention_decode, return_lse=True)
                if backend.fused:
                    assert all(numerics.bitwise_equal(a, b) for a, b in zip(again, first, strict=True))
        finally:
            torch.set_num_threads(threads)


def test_no_latents_seen_is_no_latents(backend: Backend) -> None:
    if not backend.fused:
        pytest.skip("bit for bit is what the compiled kernels promise")
    for dtype in backend.dtypes:
        case = make(backend, dtype, lengths_for(backend, [600, 31, 0]), time=2)
        expected = case.run(backend.ops.attention_decode, return_lse=True)
        latents = tuple(torch.full((1, 9, 2, 64), torch.nan, device=backend.device).to(dtype) for _ in range(2))
        none = torch.zeros(3, dtype=torch.int32, device=backend.device)
        got = case.run(backend.ops.attention_decode, return_lse=True, latents=latents, latent_len=none)
        assert all(numerics.bitwise_equal(a, b) for a, b in zip(got, expected, strict=True))
        empty = tuple(x[:, :0] for x in latents)
        got = case.run(backend.ops.attention_decode, return_lse=True, latents=empty)
        assert all(numerics.bitwise_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("num_splits", [1, 5, 10_000])
def test_any_number_of_splits(backend: Backend, num_splits: int) -> None:
    for dtype in backend.dtypes:
        case = make(backend, dtype, lengths_for(backend, [1500, 64, 3]), time=2, num_splits=num_splits)
        check(backend, case)


def test_rows_that_see_nothing(backend: Backend) -> None:
    """Four query tokens, two tokens in the cache: the first two queries stand before the first key."""
    for dtype in backend.dtypes:
        case = make(backend, dtype, [2, 0], time=4)
        out, lse = case.run(backend.ops.attention_decode, return_lse=True)
        assert (out[0, :2] == 0).all() and (out[1] == 0).all()
        assert lse[0, :, :2].isneginf().all() and lse[1].isneginf().all() and lse[0, :, 2:].isfinite().all()
        sinks = torch.randn(6, device=backend.device)
        out, lse = case.run(backend.ops.attention_decode, return_lse=True, sinks=sinks)
        assert (out[1] == 0).all()
        torch.testing.assert_close(lse[1].float(), sinks[:, None].expand(6, 4), rtol=1e-6, atol=1e-6)


def test_same_as_attention(backend: Backend) -> None:
    """The last queries of a full attention are what decode gives."""
    for dtype in backend.dtypes:
        length, time = (90, 3) if backend.emulated else (300, 5)
        q = torch.randn(2, length, 6, 64, device=backend.device).to(dtype)
        k, v = (torch.randn(2, length, 2, 64, device=backend.device).to(dtype) for _ in range(2))
        used = torch.full((2,), length, dtype=torch.int32, device=backend.device)
        for window in ((-1, -1), (100, 0)):
            exact = reference.attention(q.double(), k.double(), v.double(), window=window)[:, -time:]
            plain = reference.attention(q, k, v, window=window)[:, -time:]
            out = backend.ops.attention_decode(q[:, -time:], k, v, seqused_k=used, window=window)
            numerics.assert_rule("out", out, exact, plain, length=length)


@pytest.mark.parametrize("dtype_name", ["bfloat16", "float32"])
@pytest.mark.backends("cpu", "cuda", "emulated")
def test_values_are_not_seen_through_the_mask(backend: Backend, dtype_name: str) -> None:
    """Query i must not notice NaN keys and values of tokens that only later queries see, nor those of other heads."""
    dtype, time, used = getattr(torch, dtype_name), 6, 140
    case = make(backend, dtype, [used], time=time, window=(30, 0))
    clean = case.run(backend.ops.attention_decode)
    for token in (used - 3, used - 1, used - 40):
        for cache in (case.k, case.v):
            kept = cache[0, token, 1].clone()
            cache[0, token, 1] = torch.nan
            out = case.run(backend.ops.attention_decode)
            cache[0, token, 1] = kept
            positions = torch.arange(used - time, used)
            sees = (positions >= token) & (positions - 30 <= token)
            assert numerics.bitwise_equal(out[:, :, :3], clean[:, :, :3])
            assert out[0, sees, 3:].isnan().any(-1).all() or not sees.any()
            assert numerics.bitwise_equal(out[0, ~sees, 3:], clean[0, ~sees, 3:])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seqused_k": [-1, 3]}, "seqused_k"),
        ({"seqused_k": [3, 41]}, "seqused_k"),
        ({"block_table": [[0, 9, 1], [2, 3, 4]]}, "block_table"),
        ({"block_table": [[0, -1, 5], [2, 3, 4]]}, "block_table"),
        ({"latent_len": [0, 8]}, "latent_len"),
        ({"latent_len": [-1, 0]}, "latent_len"),
    ],
)
def test_bad_contents(backend: Backend, change: dict[str, list], match: str) -> None:
    if backend.device == "cuda":
        pytest.skip("contents of index tensors on the GPU are clamped there, not read by the host")
    case = make(backend, torch.float32, [30, 30], spare=10)
    if "block_table" in change:
        case = case.paged(16)
    latents = tuple(torch.zeros(1, 7, 2, 64, device=backend.device) for _ in range(2))
    case.options["latents"] = latents
    for name, value in change.items():
        tensor = torch.tensor(value, dtype=torch.int32, device=backend.device)
        if name == "seqused_k":
            case.seqused_k = tensor
        else:
            case.options[name] = tensor
    with pytest.raises((ValueError, RuntimeError), match=match):
        case.run(backend.ops.attention_decode)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seqused_k": torch.ones(2)}, "seqused_k"),
        ({"seqused_k": torch.ones(3, dtype=torch.int32)}, "seqused_k"),
        ({"q": torch.ones(2, 17, 6, 64)}, "q"),
        ({"q": torch.ones(2, 1, 5, 64)}, "heads"),
        ({"q": torch.ones(2, 1, 6, 32)}, "k_cache|head dim"),
        ({"k_cache": torch.ones(2, 35, 2, 64, dtype=torch.float16)}, "k_cache"),
        ({"v_cache": torch.ones(2, 34, 2, 64)}, "v_cache"),
        ({"window": (-2, 0)}, "window"),
        ({"sinks": torch.ones(5)}, "sinks"),
        ({"k_scale": torch.ones(3)}, "k_scale"),
        ({"num_splits": -1}, "num_splits"),
        ({"latent_len": torch.zeros(2, dtype=torch.int32)}, "latent"),
        ({"ring": True, "window": (60, 0)}, "ring|window"),
        ({"ring": True}, "ring|window"),
    ],
)
def test_bad_arguments(backend: Backend, change: dict[str, Any], match: str) -> None:
    case = make(backend, torch.float32, [30, 30])
    arguments: dict[str, Any] = {"q": case.q, "k_cache": case.k, "v_cache": case.v, "seqused_k": case.seqused_k}
    arguments |= {n: x.to(backend.device) if isinstance(x, Tensor) else x for n, x in change.items()}
    with pytest.raises((ValueError, RuntimeError), match=match):
        backend.ops.attention_decode(**arguments)
