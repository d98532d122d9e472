"""gated_retention_step: a few tokens against the state, equal to the whole-sequence op."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numerics import assert_rule, bitwise_equal, bthd_from_bhtd, guarded
from test_gated_retention import DECAYS, DTYPES, make, skip_unless_supported
from torch import Tensor

from yoco_ext import reference


def step(ops: Any, tensors: dict[str, Tensor | None], state: Tensor, begin: int, end: int, **options: Any) -> Tensor:
    piece = {name: x[:, begin:end] for name, x in tensors.items() if name != "initial_state" and x is not None}
    return ops.gated_retention_step(**piece, state=state, **options)


def check(backend: Any, tensors: dict[str, Tensor | None], **options: Any) -> None:
    """One call against float64 and against plain PyTorch, o and the state."""
    time = tensors["q"].shape[1]
    wide = {name: x.double() for name, x in tensors.items() if x is not None}
    states = [t["initial_state"].clone() for t in (tensors, wide, tensors)]
    o = step(backend.ops, tensors, states[0], 0, time, **options)
    exact = step(reference, wide, states[1], 0, time, **options)
    plain = step(reference, tensors, states[2], 0, time, **options)
    assert o.dtype == tensors["q"].dtype
    assert_rule("o", o, exact, plain, length=time)
    assert_rule("state", states[0], states[1], states[2], length=time)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [1, 2, 7, 16])
@pytest.mark.parametrize("decay", DECAYS)
def test_against_float64(backend: Any, time: int, decay: str, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    check(backend, make(2, time, 3, 32, 40, dtype, device=backend.device, decay=decay))
    check(backend, make(1, time, 1, 8, 8, dtype, device=backend.device, decay=decay, gate_dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim_k", "dim_v"), [(8, 256), (24, 40), (64, 64), (128, 128), (200, 24), (256, 256)])
def test_head_dims(backend: Any, dim_k: int, dim_v: int, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    for time in (1, 4):
        check(backend, make(3, time, 2, dim_k, dim_v, dtype, device=backend.device), scale=0.11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_equal_the_forward(backend: Any, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    tensors = make(2, 75, 2, 16, 24, dtype, device=backend.device)
    wide = {name: x.double() for name, x in tensors.items()}
    exact, exact_state = reference.gated_retention(**wide, return_final_state=True)
    plain, plain_state = reference.gated_retention(**tensors, return_final_state=True)
    state = tensors["initial_state"].clone()
    ends = [0, 1, 2, 18, 34, 39, 55, 71, 75]  # 1, 5 and 16 tokens a call
    pieces = [step(backend.ops, tensors, state, b, e) for b, e in pairwise(ends)]
    assert_rule("o", torch.cat(pieces, 1), exact, plain, length=75)
    assert_rule("state", state, exact_state, plain_state, length=75)


def test_prefill_then_decode(backend: Any) -> None:
    """The state that gated_retention leaves is the one that the step takes."""
    tensors = make(2, 70, 2, 16, 16, torch.float32, device=backend.device)
    exact = reference.gated_retention(**{name: x.double() for name, x in tensors.items()})
    plain = reference.gated_retention(**tensors)
    head = {name: x if name == "initial_state" else x[:, :66] for name, x in tensors.items()}
    o, state = backend.ops.gated_retention(**head, return_final_state=True)
    pieces = [o, *(step(backend.ops, tensors, state, t, t + 1) for t in range(66, 70))]
    assert_rule("o", torch.cat(pieces, 1), exact, plain, length=70)


def test_one_call_of_many_tokens_equals_many_calls(backend: Any) -> None:
    tensors = make(1, 16, 2, 16, 16, torch.float32, device=backend.device)
    together, apart = tensors["initial_state"].clone(), tensors["initial_state"].clone()
    o = step(backend.ops, tensors, together, 0, 16)
    pieces = torch.cat([step(backend.ops, tensors, apart, t, t + 1) for t in range(16)], 1)
    assert_rule("o", o, pieces.double(), pieces, length=16)
    assert_rule("state", together, apart.double(), apart, length=16)


def test_drift_over_thousands_of_steps(backend: Any) -> None:
    """A state rounded to bfloat16 drifts by tens of percent here; a float32 state must not."""
    steps = 64 if backend.emulated else 4096
    tensors = make(1, steps, 1, 8, 8, torch.bfloat16, device=backend.device, decay="weak", gate_dtype=torch.float32)
    state = tensors["initial_state"].clone()
    for t in range(0, steps, 16):
        step(backend.ops, tensors, state, t, t + 16)
    wide = {name: x.double() for name, x in tensors.items()}
    exact = reference.gated_retention(**wide, return_final_state=True)[1]
    error = (state.double() - exact).norm() / exact.norm()
    assert error <= 2e-6 * steps**0.5, f"{error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_neighbours(backend: Any, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    plain = make(2, 5, 3, 24, 40, dtype, device=backend.device)
    want_state = plain["initial_state"].clone()
    want = step(backend.ops, plain, want_state, 0, 5)
    for layout in (guarded, bthd_from_bhtd):
        views = {**plain, **{name: layout(plain[name]) for name in ("q", "k", "v")}}
        views["g"] = guarded(plain["g"])
        # The state itself must be contiguous, but what lies before and behind it is not ours.
        shape = plain["initial_state"].shape
        buffer = torch.full((shape[0] + 2, *shape[1:]), torch.nan, dtype=want_state.dtype, device=backend.device)
        state = buffer[1:-1].copy_(plain["initial_state"])
        o = step(backend.ops, views, state, 0, 5)
        assert bitwise_equal(o.contiguous(), want.contiguous()) and bitwise_equal(state, want_state)
        assert buffer[0].isnan().all() and buffer[-1].isnan().all(), "wrote outside the state"


def test_bitwise_repeatable_with_any_number_of_threads(backend: Any) -> None:
    tensors = make(2, 3, 5, 64, 64, torch.bfloat16, device=backend.device)
    want_state = tensors["initial_state"].clone()
    want = step(backend.ops, tensors, want_state, 0, 3)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            state = tensors["initial_state"].clone()
            assert bitwise_equal(step(backend.ops, tensors, state, 0, 3), want) and bitwise_equal(state, want_state)
    finally:
        torch.set_num_threads(threads)


def test_a_batch_row_does_not_depend_on_the_batch(backend: Any) -> None:
    tensors = make(4, 2, 3, 32, 32, torch.bfloat16, device=backend.device)
    state = tensors["initial_state"].clone()
    o = step(backend.ops, tensors, state, 0, 2)
    for n in range(4):
        alone = {name: x[n : n + 1] for name, x in tensors.items()}
        state_n = alone["initial_state"].clone()
        assert bitwise_equal(step(backend.ops, alone, state_n, 0, 2), o[n : n + 1].contiguous())
        assert bitwise_equal(state_n, state[n : n + 1].contiguous())


@given(data=st.data())
@hypothesis_settings(max_examples=25)
def test_random_shapes(backend: Any, data: st.DataObject) -> None:
    dims = st.integers(1, 4 if backend.emulated else 32)
    dtype = data.draw(st.sampled_from(backend.dtypes), label="dtype")
    tensors = make(
        data.draw(st.integers(1, 3), label="batch"),
        data.draw(st.integers(1, 16), label="time"),
        data.draw(st.integers(1, 5), label="heads"),
        8 * data.draw(dims, label="dim_k / 8"),
        8 * data.draw(dims, label="dim_v / 8"),
        dtype,
        device=backend.device,
        decay=data.draw(st.sampled_from(DECAYS), label="decay"),
        gate_dtype=data.draw(st.sampled_from([dtype, torch.float32]), label="gate dtype"),
    )
    check(backend, tensors, scale=data.draw(st.sampled_from([None, 1.0, 0.05]), label="scale"))


BAD = {
    "k": lambda t: {"k": t["k"][:, :1]},
    "g": lambda t: {"g": t["g"][0]},
    "state": lambda t: {"state": t["state"].half()},
    "state ": lambda t: {"state": t["state"][:1]},
    "state  ": lambda t: {"state": t["state"].transpose(2, 3)},
    "v": lambda t: {"v": t["v"].double()},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(backend: Any, case: str) -> None:
    tensors = make(2, 2, 2, 16, 16, torch.float32, device=backend.device)
    arguments = {"state" if name == "initial_state" else name: x for name, x in tensors.items()}
    before = arguments["state"].clone()
    with pytest.raises((ValueError, RuntimeError), match=rf"\b{case.strip()}\b"):
        backend.ops.gated_retention_step(**{**arguments, **BAD[case](arguments)})
    assert torch.equal(arguments["state"], before), "a refused call leaves the state alone"


@pytest.mark.parametrize("time", [0, 17])
def test_takes_1_to_16_tokens(backend: Any, time: int) -> None:
    tensors = make(1, time, 1, 8, 8, torch.float32, device=backend.device)
    state = tensors.pop("initial_state")
    with pytest.raises((ValueError, RuntimeError), match="16"):
        backend.ops.gated_retention_step(**tensors, state=state)
