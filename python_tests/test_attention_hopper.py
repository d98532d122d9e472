"""Attention where the Hopper kernels differ: tiles of whole tokens, more tiles than SMs, what TMA brings along.

The same rules hold on every back end, so every back end runs them; the shapes are chosen for csrc/cuda/attention/sm90.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import attend, check, int32, random_int32, tensors
from numerics import assert_rule, bitwise_equal, run_with_gradients

from yoco_ext import reference

pytestmark = pytest.mark.backends("cpu", "cuda", "emulated")
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))


def check_forward(backend, inputs, **options):
    """The rule of numerics for out and lse, without gradients."""
    out, lse = attend(backend.ops)(**inputs, **options)
    exact = attend(reference)(**{n: x if x is None else x.double() for n, x in inputs.items()}, **options)
    plain = attend(reference)(**inputs, **options)
    length = inputs["k"].shape[1] + 16
    assert_rule("out", out, exact[0], plain[0], length=length)
    assert_rule("lse", lse, exact[1], plain[1], length=length)
    return out, lse


@dtypes
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_more_tiles_than_multiprocessors(backend, dtype, dim):
    """150 tiles: a CTA takes a second one from a counter, over rings whose slots and parities go on from the first."""
    inputs = tensors(backend, dtype, (9, 21), batch=75, heads=(2, 2), dims=(dim, dim))
    together = check_forward(backend, inputs)
    for b in (0, 74):
        alone = attend(backend.ops)(**{n: x[b : b + 1] for n, x in inputs.items()})
        assert bitwise_equal(alone[0], together[0][b : b + 1]) and bitwise_equal(alone[1], together[1][b : b + 1])


@dtypes
@pytest.mark.parametrize("group", [5, 7, 90, 150, 200])
def test_tiles_hold_whole_tokens(backend, dtype, group):
    """Query heads that do not divide a tile, that fill it with one token, and more of them than it has rows."""
    inputs = tensors(backend, dtype, (43 if group < 10 else 3, 150), batch=1, heads=(group, 1), dims=(64, 64))
    check_forward(backend, inputs)


@dtypes
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_full_blocks_between_masked_ones(backend, dtype, dim):
    """Several key blocks per tile: masked at both ends of the window, whole in between, then latents."""
    inputs = tensors(backend, dtype, (200, 700), batch=1, heads=(1, 1), dims=(dim, dim), latents=150)
    check_forward(backend, inputs, window=(450, 0))
    check_forward(backend, inputs, window=(450, 0), softcap=3.0)


@dtypes
@pytest.mark.parametrize("keys", [1, 79, 80, 81, 127, 128, 129])
def test_keys_behind_the_sequence(backend, dtype, keys):
    """They are in the tensor, so TMA loads them; NaN there changes no bit."""
    inputs = tensors(backend, dtype, (40, 300), batch=2, heads=(2, 1), dims=(256 if keys < 100 else 64,) * 2)
    used = int32(backend, keys, 300)
    clean = check_forward(backend, inputs, seqused_k=used, causal=False)
    for name in "kv":
        inputs[name][0, keys:] = math.nan
    dirty = attend(backend.ops)(**inputs, seqused_k=used, causal=False)
    assert all(bitwise_equal(a, b) for a, b in zip(clean, dirty))


@dtypes
def test_split_keys(backend, dtype):
    """Few rows on many keys: the blocks are split over CTAs, latents included."""
    inputs = tensors(backend, dtype, (3, 2500), batch=1, heads=(4, 2), dims=(128, 128), latents=300, sinks=True)
    check_forward(backend, inputs)


@dtypes
def test_a_query_block_longer_than_announced(backend, dtype):
    """max_seqlen_q is a hint for the launch: rows beyond it are computed all the same."""
    inputs = tensors(backend, dtype, (500, 300), batch=1, heads=(1, 1))
    bounds = {"cu_seqlens_q": int32(backend, 0, 20, 460), "cu_seqlens_k": int32(backend, 0, 30, 290)}
    out, lse = attend(backend.ops)(**inputs, **bounds, max_seqlen_q=20, max_seqlen_k=30)
    expected = attend(backend.ops)(**inputs, **bounds, max_seqlen_q=440, max_seqlen_k=260)
    assert bitwise_equal(out, expected[0]) and bitwise_equal(lse, expected[1])


@dtypes
@pytest.mark.parametrize("dims", [(256, 256), (136, 256), (192, 144)], ids=str)
@pytest.mark.parametrize("case", ["causal", "window", "prefix", "packed", "latents", "group of 5", "deterministic"])
def test_backward_of_wide_heads(backend, dtype, dims, case):
    """Above head dim 128 dK and dV have one warpgroup each: several key tiles, walks of one row tile and of many."""
    time = (150, 200)
    options: dict[str, Any] = {}
    inputs = tensors(
        backend,
        dtype,
        time,
        batch=1,
        heads=(5, 1) if case == "group of 5" else (2, 1),
        dims=dims,
        sinks=case == "latents",
        latents=70 if case == "latents" else None,
    )
    if case == "window":
        options = {"window": (20, 3)}
    elif case == "prefix":
        options = {"prefix_len": random_int32(backend, 0, 200, 1, 150)}
    elif case == "packed":
        options = {
            "cu_seqlens_q": int32(backend, 0, 3, 3, 120),
            "cu_seqlens_k": int32(backend, 0, 70, 71, 190),
            "seqused_k": int32(backend, 65, 1, 90),
        }
    elif case == "latents":
        options = {
            "latent_begin": random_int32(backend, 0, 30, 1, 150),
            "latent_end": random_int32(backend, 20, 70, 1, 150),
        }
    elif case == "deterministic":
        options = {"deterministic": True}
    check(backend, inputs, **options)


@dtypes
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gradients_of_keys_before_a_bad_row(backend, dtype, dim):
    """A row shares its tile with keys it does not see: its NaN must not reach them, whichever gradient it spoils."""
    inputs = tensors(backend, dtype, (90, 90), batch=1, heads=(2, 1), dims=(dim, dim))
    upstream = [torch.randn_like(x) for x in attend(backend.ops)(**inputs)]
    _, clean = run_with_gradients(attend(backend.ops), inputs, {}, upstream, "qkv")
    inputs["v"][0, 70] = math.inf  # dP of rows 70 on: dQ, and dK of all they see
    upstream[0][0, 40, 1] = math.nan  # dV and dK of keys up to 40
    _, found = run_with_gradients(attend(backend.ops), inputs, {}, upstream, "qkv")
    assert found["v"][0, :41].isnan().all() and found["k"][0, :41].isnan().all()
    assert found["v"][0, 41:].isfinite().all()
    assert_close = torch.testing.assert_close
    assert_close(found["v"][0, 41:], clean["v"][0, 41:], rtol=0.02, atol=0.02)
    assert not found["k"][0, 41:].isfinite().any()
    assert found["q"][0, :40].isfinite().all() and not found["q"][0, 70:].isfinite().any()
    assert_close(found["q"][0, :40], clean["q"][0, :40], rtol=0.02, atol=0.02)
