"""gated_retention with rotary on load: equal to rotary of q and k before it, forward, gradients, states and steps."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numerics import assert_rule, bitwise_equal, bthd_from_bhtd, guarded, lengths_to_cu_seqlens
from test_gated_retention import DTYPES, check, make, run, skip_unless_supported
from torch import Tensor

from yoco_ext import reference

STYLES = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def frequencies(rotary_dim: int, device: str) -> Tensor:
    """From a whole radian per position to a ten-thousandth."""
    return 10_000.0 ** -torch.linspace(0, 1, rotary_dim // 2, device=device)


def ints(device: str, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


# ---- the rule of numerics ------------------------------------------------------------------------------------------
@STYLES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [0, 1, 63, 65, 129, 500])
def test_lengths(backend: Any, time: int, dtype: torch.dtype, interleaved: bool) -> None:
    skip_unless_supported(backend, dtype)
    if backend.emulated and time > 130:
        pytest.skip("too slow on the emulator")
    tensors = make(2, time, 2, 32, 40, dtype, device=backend.device)
    options = {"inv_freq": frequencies(32, backend.device), "interleaved": interleaved}
    check(backend, tensors, length=time, offsets=ints(backend.device, 0, 1000), **options)


# Whole and partial rotary, in pieces of eight and not, states of one block and of several, Dk below and above Dv.
@STYLES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim_k", "dim_v", "rotary_dim"),
    [
        *[(8, 8, 8), (24, 40, 24), (64, 64, 64), (64, 128, 32), (72, 16, 50), (128, 128, 128), (128, 64, 2)],
        *[(200, 256, 120), (256, 64, 256), (256, 256, 192)],
    ],
)
def test_head_dims(
    backend: Any, dim_k: int, dim_v: int, rotary_dim: int, dtype: torch.dtype, interleaved: bool
) -> None:
    skip_unless_supported(backend, dtype)
    if backend.emulated and dtype == torch.float16 and dim_k + dim_v > 128:
        pytest.skip("the instances of bfloat16 from the same source")
    time = 70 if backend.emulated else 130
    tensors = make(1, time, 2, dim_k, dim_v, dtype, device=backend.device)
    options = {"inv_freq": frequencies(rotary_dim, backend.device), "interleaved": interleaved}
    check(backend, tensors, length=time, offsets=ints(backend.device, 37), **options)


@STYLES
@pytest.mark.parametrize("offset", [100_003, 16_777_217, 2_000_000_000])
def test_far_positions(backend: Any, offset: int, interleaved: bool) -> None:
    """A float32 angle would be wrong by whole radians."""
    for dtype in (torch.bfloat16, torch.float32):
        tensors = make(1, 66, 1, 32, 16, dtype, device=backend.device)
        check(
            backend,
            tensors,
            length=66,
            inv_freq=frequencies(32, backend.device),
            interleaved=interleaved,
            offsets=ints(backend.device, offset),
        )


def test_gradient_through_one_output_only(backend: Any) -> None:
    inv_freq = frequencies(16, backend.device)
    tensors = make(2, 77, 2, 16, 16, torch.float32, device=backend.device)
    for upstream in ([torch.randn(2, 77, 2, 16), None], [None, torch.randn(2, 2, 16, 16)]):
        gradients = []
        for fused in (True, False):
            leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
            q, k = (x if fused else backend.ops.rotary(x, inv_freq) for x in (leaves["q"], leaves["k"]))
            options = {"inv_freq": inv_freq} if fused else {}
            given_tensors = {**leaves, "q": q, "k": k}
            outputs = backend.ops.gated_retention(**given_tensors, return_final_state=True, **options)
            pairs = [(o, u.to(o.device)) for o, u in zip(outputs, upstream, strict=True) if u is not None]
            torch.autograd.backward([o for o, _ in pairs], [u for _, u in pairs])
            gradients.append({name: x.grad for name, x in leaves.items()})
        for name, ours in gradients[0].items():
            other = gradients[1][name]
            if ours is None or other is None:
                assert not (ours if other is None else other).any() if (ours, other) != (None, None) else True
                continue
            assert (ours - other).norm() <= 1e-5 * other.norm() + 1e-6, name


@pytest.mark.backends("cpu", "reference")
@STYLES
def test_gradcheck(backend: Any, interleaved: bool) -> None:
    tensors = make(2, 5, 2, 8, 8, torch.float64, decay="medium")
    inv_freq, offsets = frequencies(4, "cpu"), ints("cpu", 3, 0)

    def function(*leaves: Tensor) -> Any:
        return backend.ops.gated_retention(
            *leaves[:4],
            initial_state=leaves[4],
            return_final_state=True,
            inv_freq=inv_freq,
            interleaved=interleaved,
            offsets=offsets,
        )

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors.values()])


# ---- packed sequences, layouts --------------------------------------------------------------------------------------
@STYLES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[0, 65, 0, 1, 20], [130, 7, 64]], ids=str)
def test_packed(backend: Any, lengths: list[int], dtype: torch.dtype, interleaved: bool) -> None:
    skip_unless_supported(backend, dtype)
    if backend.emulated and sum(lengths) > 100:
        pytest.skip("too slow on the emulator")
    device = backend.device
    tensors = make(1, sum(lengths) + 5, 2, 24, 24, dtype, device=device, sequences=len(lengths))
    options = {"inv_freq": frequencies(16, device), "interleaved": interleaved}
    offsets = torch.randint(0, 10_000, (len(lengths),), dtype=torch.int32, device=device)
    cu_seqlens = lengths_to_cu_seqlens(lengths, device)
    o, states = check(backend, tensors, length=max(lengths), cu_seqlens=cu_seqlens, offsets=offsets, **options)
    assert not o[:, sum(lengths) :].any(), "rows after the last sequence are zero"
    if not backend.fused:
        return
    for n, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        piece = {name: x[:, begin:end] for name, x in tensors.items() if name != "initial_state"}
        piece["initial_state"] = tensors["initial_state"][n : n + 1]
        o_n, state_n = run(backend, piece, offsets=int(offsets[n]), **options)
        assert bitwise_equal(o[:, begin:end].detach().contiguous(), o_n.contiguous()), f"sequence {n}"
        assert bitwise_equal(states[n : n + 1].detach().contiguous(), state_n), f"sequence {n}"


@STYLES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_surrounded_by_nan(backend: Any, dtype: torch.dtype, interleaved: bool) -> None:
    skip_unless_supported(backend, dtype)
    plain = make(2, 70, 2, 48, 40, dtype, device=backend.device)
    options = {"inv_freq": frequencies(32, backend.device), "interleaved": interleaved}
    for view in (guarded, bthd_from_bhtd, lambda x: guarded(x, pad=3)):  # the last one: rows without alignment
        views = {name: view(x) if name in ("q", "k", "v") else x for name, x in plain.items()}
        check(backend, views, length=70, **options)


def test_without_frequencies_nothing_turns(backend: Any) -> None:
    tensors = make(2, 70, 2, 16, 16, torch.float32, device=backend.device)
    still = torch.zeros(8, device=backend.device)
    for a, b in zip(run(backend, tensors), run(backend, tensors, inv_freq=still, offsets=77), strict=True):
        assert torch.equal(a, b)


def test_a_nan_stays_in_its_head_and_sequence(backend: Any) -> None:
    options = {"inv_freq": frequencies(16, backend.device)}
    clean = make(2, 70, 2, 16, 16, torch.bfloat16, device=backend.device)
    want, _ = run(backend, clean, **options)
    for name in ("q", "k"):
        dirty = {n: x.clone() for n, x in clean.items()}
        dirty[name][1, 66, 0, 3] = torch.nan
        o, _ = run(backend, dirty, **options)
        assert o[1, 66, 0].isnan().any()
        for where in ((0,), (1, slice(None), 1), (1, slice(0, 64), 0)):
            assert torch.equal(o[where], want[where]), name


# ---- states and steps -----------------------------------------------------------------------------------------------
@STYLES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_carried_states_and_steps_equal_one_pass(backend: Any, dtype: torch.dtype, interleaved: bool) -> None:
    """Cut anywhere, the state carried on with offsets: by gated_retention, then by steps of 1, 5 and 16 tokens."""
    skip_unless_supported(backend, dtype)
    tensors = make(2, 121, 2, 40, 24, dtype, device=backend.device)
    options = {"inv_freq": frequencies(24, backend.device), "interleaved": interleaved}
    first = ints(backend.device, 0, 321)
    wide = {name: x.double() for name, x in tensors.items()}
    exact = reference.gated_retention(**wide, offsets=first, return_final_state=True, **options)
    plain = reference.gated_retention(**tensors, offsets=first, return_final_state=True, **options)
    state, pieces = tensors["initial_state"], []
    for begin, end in pairwise([0, 70, 99]):
        piece = {name: x[:, begin:end] for name, x in tensors.items() if name != "initial_state"}
        o, state = run(backend, {**piece, "initial_state": state}, offsets=first + begin, **options)
        pieces.append(o)
    state = state.clone()
    for begin, end in pairwise([99, 100, 105, 121]):
        piece = {name: x[:, begin:end] for name, x in tensors.items() if name != "initial_state"}
        pieces.append(backend.ops.gated_retention_step(**piece, state=state, offsets=first + begin, **options))
    assert_rule("o", torch.cat(pieces, 1), exact[0], plain[0], length=121)
    assert_rule("state", state, exact[1], plain[1], length=121)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim_k", "dim_v", "rotary_dim"), [(8, 40, 8), (128, 128, 128), (256, 24, 200)])
def test_step(backend: Any, dim_k: int, dim_v: int, rotary_dim: int, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    for interleaved in (False, True):
        tensors = make(3, 7, 2, dim_k, dim_v, dtype, device=backend.device)
        options = {"inv_freq": frequencies(rotary_dim, backend.device), "interleaved": interleaved}
        options["offsets"] = ints(backend.device, 0, 1_000_003, 5)
        results = []
        for ops, wide in ((backend.ops, False), (reference, True), (reference, False)):
            given_tensors = {name: x.double() if wide else x for name, x in tensors.items()}
            state = given_tensors.pop("initial_state").clone()
            results.append((ops.gated_retention_step(**given_tensors, state=state, **options), state))
        assert_rule("o", *(o for o, _ in results), length=7)
        assert_rule("state", *(s for _, s in results), length=7)


@pytest.mark.backends("cpu", "cuda", "emulated")
@pytest.mark.parametrize(("dim_k", "dim_v"), [(16, 16), (256, 40)])
def test_several_segments(backend: Any, dim_k: int, dim_v: int) -> None:
    """Long enough to be cut up; the first pass turns only k."""
    time = 2100
    tensors = make(1, time, 1, dim_k, dim_v, torch.bfloat16, device=backend.device, gate_dtype=torch.float32)
    check(backend, tensors, length=time, inv_freq=frequencies(dim_k, backend.device), offsets=ints(backend.device, 9))


@pytest.mark.backends("cuda", "emulated")
@STYLES
def test_blocks_of_all_columns(backend: Any, interleaved: bool) -> None:
    """With many heads a block covers 128 columns; with few 64, and the halves of a pair come from far apart."""
    tensors = make(1, 5, 70, 128, 128, torch.bfloat16, device=backend.device)
    check(backend, tensors, length=5, inv_freq=frequencies(128, backend.device), interleaved=interleaved)


# What the Hopper kernels take: both columns of a pair in one block of 128 columns, or a whole head of 256 in two.
@pytest.mark.unpoisoned
@pytest.mark.backends("emulated")
@pytest.mark.skipif(os.environ.get("PTXSIM_CC", "90") != "90", reason="Hopper's kernels")
@pytest.mark.parametrize(
    ("dim", "rotary_dim", "interleaved", "backward"),
    [
        *[(256, 256, False, True), (256, 192, True, True), (192, 128, False, True), (128, 128, False, True)],
        *[(256, 192, False, False), (160, 160, False, False)],
    ],
)
def test_which_kernels_run_on_hopper(
    backend: Any,
    dim: int,
    rotary_dim: int,
    interleaved: bool,
    backward: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = make(1, 5, 1, dim, dim, torch.bfloat16, device=backend.device)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    options = {"inv_freq": frequencies(rotary_dim, backend.device), "interleaved": interleaved}

    def kernels(call: Any) -> tuple[Any, list[str]]:
        file = tmp_path / "launches.json"
        file.write_text("")
        monkeypatch.setenv("PTXSIM_STATS", str(file))
        result = call()
        monkeypatch.delenv("PTXSIM_STATS")
        names = [json.loads(line)["kernel"] for line in file.read_text().splitlines()]
        return result, [name for name in names if "retention_run" in name]

    (o, _), names = kernels(lambda: run(backend, leaves, **options))
    assert len(names) == 1 and "sm90" in names[0], names
    _, names = kernels(lambda: torch.autograd.grad(o.sum(), leaves["q"]))
    assert len(names) == 2 and all(("sm90" in name) == backward for name in names), names


@pytest.mark.backends("cuda", "emulated")
@STYLES
@pytest.mark.parametrize(("dim_k", "dim_v"), [(256, 256), (144, 200)])
def test_wide_heads_over_many_chunks(backend: Any, dim_k: int, dim_v: int, interleaved: bool) -> None:
    """Seven chunks: on Hopper a ring of two stages comes round more than three times."""
    tensors = make(1, 400, 1, dim_k, dim_v, torch.bfloat16, device=backend.device)
    options = {"inv_freq": frequencies(dim_k, backend.device), "interleaved": interleaved}
    check(backend, tensors, length=400, offsets=ints(backend.device, 70_001), **options)


@pytest.mark.backends("emulated")
@pytest.mark.parametrize(
    ("dim", "interleaved"), [(64, False), (128, True), (256, False), (256, True)], ids=lambda x: str(x)
)
@pytest.mark.parametrize("schedule", ["lazy", "random-1", "random-2"])
def test_asynchronous_copies(
    backend: Any, schedule: str, dim: int, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that land as late as the architecture allows, and random orders of warps and blocks, under the race
    checker: the bits of an ordinary run."""
    time = 330 if dim == 256 else 140
    tensors = make(1, time, 1, dim, 64, torch.bfloat16)
    upstream = torch.randn(1, time, 1, 64).bfloat16()
    options = {"inv_freq": frequencies(dim, "cpu"), "interleaved": interleaved, "offsets": 5}

    def everything() -> list[Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        o, state = run(backend, leaves, **options)
        return [o, state, *torch.autograd.grad([o, state], list(leaves.values()), [upstream, state.detach()])]

    want = everything()
    mode, _, seed = schedule.partition("-")
    monkeypatch.setenv("PTXSIM_MODE", mode)
    monkeypatch.setenv("PTXSIM_RACE", "1")
    if seed:
        monkeypatch.setenv("PTXSIM_SEED", seed)
    for a, b in zip(want, everything(), strict=True):
        assert bitwise_equal(a, b)


@hypothesis_settings(max_examples=25)
@given(data=st.data())
def test_random_shapes(backend: Any, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(backend.dtypes))
    largest = 8 if backend.emulated else 32
    dim_k, dim_v = (8 * data.draw(st.integers(1, largest)) for _ in range(2))
    time = data.draw(st.integers(1, 70 if backend.emulated else 200))
    heads = data.draw(st.integers(1, 3))
    tensors = make(1, time, heads, dim_k, dim_v, dtype, device=backend.device, state=data.draw(st.booleans()))
    check(
        backend,
        tensors,
        length=time,
        inv_freq=frequencies(2 * data.draw(st.integers(1, dim_k // 2)), backend.device),
        interleaved=data.draw(st.booleans()),
        offsets=data.draw(st.integers(0, 100_000)),
        gate_logit_normalizer=data.draw(st.sampled_from([None, 16.0])),
    )
