"""Attention where the Hopper kernels differ: tiles of whole tokens, more tiles than SMs, what TMA brings along.

The same rules hold on every back end, so every back end runs them; the shapes are chosen for csrc/cuda/attention/sm90.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

import pytest
import torch
from attention_cases import attend, check, int32, random_int32, tensors
from numerics import assert_rule, bitwise_equal, compare, run_with_gradients

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
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("latents", [None, 150])
@pytest.mark.parametrize("prefixes", [(0, 900, 30), (900, 0, 900), (40, 130, 900), (900, 850, 0)], ids=str)
def test_warpgroups_that_see_different_blocks(backend, dtype, dim, latents, prefixes):
    """64 rows see nothing of many blocks, before or behind those that they see: they pass them on and take their turn.
    Only some keys of the last block count, and whoever sees it or not takes part in clearing the others."""
    inputs = tensors(backend, dtype, (180, 1000), batch=1, heads=(1, 1), dims=(dim, dim), latents=latents)
    prefix_len = int32(backend, *(n for n in prefixes for _ in range(64)))[None, :180]
    used = int32(backend, 890)
    check_forward(backend, inputs, prefix_len=prefix_len.contiguous(), seqused_k=used)


@pytest.mark.backends("cuda", "emulated")
@dtypes
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("window", [(0, 0), (50, 0), (63, 0), (64, 0), (127, 0), (200, 10)], ids=str)
@pytest.mark.parametrize("scores", ["plain", "softcap", "alibi"])
def test_where_a_row_lies_changes_no_bit(backend, dtype, dim, window, scores):
    """Which ends of its key blocks a row's warpgroup multiplies depends on its neighbours; the products left out are
    zeros."""
    inputs = tensors(backend, dtype, (260, 300), batch=1, heads=(1, 1), dims=(dim, dim))
    options: dict[str, Any] = {"causal": False, "window": window}
    if scores == "softcap":
        options["softcap"] = 2.0
    elif scores == "alibi":
        options["alibi_slopes"] = torch.tensor([0.3], device=backend.device)
    out, lse = attend(backend.ops)(**inputs, **options)
    for first in (1, 37, 64, 100, 197, 255):
        rows, rows_lse = attend(backend.ops)(inputs["q"][:, first:], inputs["k"], inputs["v"], **options)
        assert bitwise_equal(rows, out[:, first:]) and bitwise_equal(rows_lse, lse[..., first:]), first


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


def backward_case(backend, dtype, dims, case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of several tiles of rows and of keys, and the options of the case."""
    options: dict[str, Any] = {}
    inputs = tensors(
        backend,
        dtype,
        (150, 200),
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
    return inputs, options


@dtypes
@pytest.mark.parametrize("dims", [(256, 256), (136, 256), (192, 144)], ids=str)
@pytest.mark.parametrize("case", ["causal", "window", "prefix", "packed", "latents", "group of 5", "deterministic"])
def test_backward_of_wide_heads(backend, dtype, dims, case):
    """Above head dim 128 dK and dV have one warpgroup each: several key tiles, walks of one row tile and of many."""
    inputs, options = backward_case(backend, dtype, dims, case)
    check(backend, inputs, **options)


MODIFIED = ["softcap", "alibi", "softcap and alibi", "negative scale", "scale of zero"]


def modified_score(backend, option: str, heads: int, sequences: int = 1) -> dict[str, Any]:
    """Options that make a score more than a positive scale times q.k."""
    options: dict[str, Any] = {}
    if "softcap" in option:
        options["softcap"] = 1.5  # of scores around 1: up to saturation
    if "alibi" in option:
        options["alibi_slopes"] = torch.rand(*([sequences] if sequences > 1 else []), heads, device=backend.device) / 4
    if "scale" in option:
        options["scale"] = -0.1 if "negative" in option else 0.0
    return options


@dtypes
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("option", MODIFIED)
def test_backward_of_modified_scores(backend, dtype, dim, option):
    """Second instances of the kernels: by keys, with dQ and without (deterministic), and dQ by rows."""
    inputs, _ = backward_case(backend, dtype, (dim, dim), "causal")
    options = modified_score(backend, option, 2)
    check(backend, inputs, **options)
    if option == "softcap and alibi":
        check(backend, inputs, **options, deterministic=True)
        compare(attend(backend.ops), attend(reference), inputs, wanted=["q"], length=350, **options)
        compare(attend(backend.ops), attend(reference), inputs, wanted=["k", "v"], length=350, **options)


@dtypes
@pytest.mark.parametrize("dims", [(64, 64), (128, 72), (256, 136)], ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("case", ["window", "prefix", "packed", "latents", "group of 5"])
def test_masks_of_modified_scores(backend, dtype, dims, case, deterministic):
    """Where rows and keys are counted from: slopes per head and per sequence, none on latents."""
    inputs, options = backward_case(backend, dtype, dims, case)
    options |= modified_score(backend, "softcap and alibi", inputs["q"].shape[2], 3 if case == "packed" else 1)
    check(backend, inputs, **options, deterministic=deterministic)


@pytest.mark.backends("emulated")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("option", ["plain", *MODIFIED])
def test_which_backward_runs(backend, dim, option, tmp_path, monkeypatch):
    """No option sends the gradients to the slower kernels of the sm_80 family."""
    if os.environ.get("PTXSIM_CC", "90") != "90":
        pytest.skip("the emulator stands for another GPU (PTXSIM_CC)")
    monkeypatch.setenv("PTXSIM_STATS", str(tmp_path / "launches"))
    inputs = tensors(backend, torch.bfloat16, (10, 20), batch=1, heads=(2, 1), dims=(dim, dim))
    for deterministic in (False, True):
        options = modified_score(backend, option, 2) | {"deterministic": deterministic}
        run_with_gradients(attend(backend.ops), inputs, options, lambda out: [torch.randn_like(x) for x in out], "qkv")
    launches = [json.loads(line)["kernel"] for line in (tmp_path / "launches").read_text().splitlines()]
    backward = [name for name in launches if "attention_backward" in name]
    assert len(backward) == 3 and sum("backward_q" in name for name in backward) == 1
    assert all("sm90" in name for name in backward), backward


@dtypes
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("option", ["", "softcap and alibi"])
def test_gradients_of_keys_before_a_bad_row(backend, dtype, dim, option):
    """A row shares its tile with keys it does not see: its NaN must not reach them, whichever gradient it spoils."""
    inputs = tensors(backend, dtype, (90, 90), batch=1, heads=(2, 1), dims=(dim, dim))
    options = modified_score(backend, option, 2)
    upstream = [torch.randn_like(x) for x in attend(backend.ops)(**inputs)]
    _, clean = run_with_gradients(attend(backend.ops), inputs, options, upstream, "qkv")
    inputs["v"][0, 70] = math.inf  # dP of rows 70 on: dQ, and dK of all they see
    upstream[0][0, 40, 1] = math.nan  # dV and dK of keys up to 40
    _, found = run_with_gradients(attend(backend.ops), inputs, options, upstream, "qkv")
    assert found["v"][0, :41].isnan().all() and found["k"][0, :41].isnan().all()
    assert found["v"][0, 41:].isfinite().all()
    assert_close = torch.testing.assert_close
    assert_close(found["v"][0, 41:], clean["v"][0, 41:], rtol=0.02, atol=0.02)
    assert not found["k"][0, 41:].isfinite().any()
    assert found["q"][0, :40].isfinite().all() and not found["q"][0, 70:].isfinite().any()
    assert_close(found["q"][0, :40], clean["q"][0, :40], rtol=0.02, atol=0.02)
