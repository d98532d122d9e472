"""gated_retention: every back end against float64, over decay strengths, lengths, head dims, layouts and packings."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numerics import (
    assert_rule,
    bitwise_equal,
    bthd_from_bhtd,
    compare,
    guarded,
    lengths_to_cu_seqlens,
    rms,
)
from torch import Tensor

from yoco_ext import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
INPUTS = ["q", "k", "v", "g", "initial_state"]


def log_decay(shape: tuple[int, ...], kind: str) -> Tensor:
    """Log decays in float64, from none at all to one that erases the state."""
    weak = -1e-4 * torch.rand(shape, dtype=torch.float64)
    if kind == "none":
        return torch.zeros(shape, dtype=torch.float64)
    if kind == "weak":
        return weak
    if kind == "layer":  # what the model's gate gives at initialisation
        return torch.nn.functional.logsigmoid(torch.randn(shape, dtype=torch.float64)) / 16
    if kind == "medium":
        return -torch.rand(shape, dtype=torch.float64)
    if kind == "strong":
        return -10 * torch.rand(shape, dtype=torch.float64)
    if kind == "erase":  # a few tokens forget everything, the others next to nothing
        return torch.where(torch.rand(shape) < 0.1, -1e4, weak)
    raise AssertionError(kind)


DECAYS = ["none", "weak", "layer", "medium", "strong", "erase"]


def make(
    batch: int,
    time: int,
    heads: int,
    dim_k: int,
    dim_v: int,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    decay: str = "layer",
    state: bool = True,
    sequences: int | None = None,
    gate_dtype: torch.dtype | None = None,
) -> dict[str, Tensor | None]:
    """Fresh random arguments of gated_retention."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors: dict[str, Tensor | None] = {
        "q": torch.randn(batch, time, heads, dim_k).to(dtype),
        "k": torch.randn(batch, time, heads, dim_k).to(dtype),
        "v": torch.randn(batch, time, heads, dim_v).to(dtype),
        "g": log_decay((batch, time, heads), decay).to(gate_dtype or dtype),
        "initial_state": None,
    }
    if state:
        tensors["initial_state"] = torch.randn(sequences or batch, heads, dim_k, dim_v).to(wide)
    return {name: None if x is None else x.to(device) for name, x in tensors.items()}


def run(backend: Any, tensors: dict[str, Tensor | None], **options: Any) -> tuple[Tensor, Tensor]:
    return backend.ops.gated_retention(**tensors, return_final_state=True, **options)


def check(backend: Any, tensors: dict[str, Tensor | None], *, length: int, **options: Any) -> tuple[Tensor, ...]:
    """Outputs and all gradients by the rule of numerics."""
    wanted = [name for name in INPUTS if tensors[name] is not None]
    return compare(
        backend.ops.gated_retention,
        reference.gated_retention,
        tensors,
        wanted=wanted,
        length=length,
        return_final_state=True,
        **options,
    )


def skip_unless_supported(backend: Any, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")


# ---- the rule of numerics ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [0, 1, 3, 63, 64, 65, 127, 500, 1000, 2049])
def test_lengths(backend: Any, time: int, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    if backend.emulated and time > 130:
        pytest.skip("too slow on the emulator")
    tensors = make(1 if time > 1000 else 2, time, 2, 32, 40, dtype, device=backend.device)
    check(backend, tensors, length=time)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("gate", ["narrow", "float32"])
def test_decay_strengths(backend: Any, decay: str, gate: str, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    if gate == "float32" and dtype == torch.float32:
        pytest.skip("the same as narrow")
    time = 70 if backend.emulated else 330
    gate_dtype = torch.float32 if gate == "float32" else dtype
    tensors = make(1, time, 2, 32, 32, dtype, device=backend.device, decay=decay, gate_dtype=gate_dtype)
    check(backend, tensors, length=time)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim_k", "dim_v"), [(8, 8), (8, 256), (24, 40), (64, 64), (64, 128), (128, 128), (128, 64), (200, 24), (256, 256)]
)
def test_head_dims(backend: Any, dim_k: int, dim_v: int, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    time = 65 if backend.emulated else 150
    check(backend, make(1, time, 2, dim_k, dim_v, dtype, device=backend.device), length=time)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_initial_state_and_with_a_scale(backend: Any, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    tensors = make(2, 100, 3, 16, 24, dtype, device=backend.device, state=False)
    check(backend, tensors, length=100, scale=0.37)
    o = backend.ops.gated_retention(**tensors, scale=0.37)
    assert isinstance(o, Tensor), "without return_final_state there is one output"
    assert bitwise_equal(o, run(backend, tensors, scale=0.37)[0])
    explicit = run(backend, tensors, scale=16**-0.5)[0]
    assert bitwise_equal(backend.ops.gated_retention(**tensors), explicit), "the default scale is dim_k ** -0.5"


def test_gradient_through_one_output_only(backend: Any) -> None:
    tensors = make(2, 77, 2, 16, 16, torch.float32, device=backend.device)
    shapes = [torch.randn(2, 77, 2, 16).to(backend.device), torch.randn(2, 2, 16, 16).to(backend.device)]
    for upstream in ([shapes[0], None], [None, shapes[1]]):
        # q does not reach the final state.
        wanted = INPUTS if upstream[0] is not None else INPUTS[1:]
        compare(
            backend.ops.gated_retention,
            reference.gated_retention,
            tensors,
            wanted=wanted,
            length=77,
            upstream=upstream,
            return_final_state=True,
        )


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("decay", ["weak", "layer"])
def test_gate_gradient_of_a_long_sequence(backend: Any, decay: str, dtype: torch.dtype) -> None:
    """A gate gradient summed over the whole sequence loses its digits to cancellation as the length grows."""
    time = 16384
    tensors = make(1, time, 1, 32, 32, dtype, device=backend.device, decay=decay, gate_dtype=torch.float32)
    check(backend, tensors, length=time)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("decay", DECAYS)
def test_low_precision_inputs_lose_nothing_but_the_last_rounding(backend: Any, decay: str) -> None:
    """Stricter than the rule: states are float32 sums of products that keep 16 bits of the decayed factor; everything
    else is within 2x of the exact result rounded to bfloat16, the float32 gradient of g included."""
    tensors = make(2, 700, 2, 64, 64, torch.bfloat16, decay=decay, gate_dtype=torch.float32)
    upstream = [torch.randn(2, 700, 2, 64).bfloat16(), torch.randn(2, 2, 64, 64)]
    wide = {name: x.double() for name, x in tensors.items() if x is not None}

    def gradients(function: Any, given: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        outputs = function(**leaves, return_final_state=True)
        pairs = zip(outputs, upstream, strict=True)
        return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), [u.to(o.dtype) for o, u in pairs])]

    exact = gradients(reference.gated_retention, wide)
    ours = gradients(backend.ops.gated_retention, tensors)
    for name, a, e in zip(["o", "final_state", *(f"d{n}" for n in INPUTS)], ours, exact, strict=True):
        if name.endswith("state"):
            assert rms(a.double() - e) <= 2e-5 * rms(e), f"{name}: {rms(a.double() - e) / rms(e):.2e}"
        else:
            assert rms(a.double() - e) <= 2 * rms(e.bfloat16().double() - e), name


# ---- packed sequences ----------------------------------------------------------------------------------------------
PACKINGS = [[1, 99, 200], [0, 65, 0, 0, 64, 1, 0], [0], [3], [128, 0], [0, 0, 7]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", PACKINGS, ids=str)
@pytest.mark.parametrize("tail", [0, 5, 70])
def test_packed(backend: Any, lengths: list[int], tail: int, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    if backend.emulated and (sum(lengths) > 140 or tail > 5):
        pytest.skip("too slow on the emulator")
    time = sum(lengths) + tail
    tensors = make(1, time, 2, 16, 24, dtype, device=backend.device, sequences=len(lengths))
    cu_seqlens = lengths_to_cu_seqlens(lengths, backend.device)
    o, _ = check(backend, tensors, length=max(lengths), cu_seqlens=cu_seqlens)
    assert not o[:, sum(lengths) :].any(), "rows after the last sequence are zero"
    for n, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(run(backend, tensors, cu_seqlens=cu_seqlens)[1][n], tensors["initial_state"][n])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_equals_separate_bit_for_bit(backend: Any, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    lengths = [1, 0, 66, 20] if backend.emulated else [1, 0, 130, 1100, 64]
    cu_seqlens = lengths_to_cu_seqlens(lengths, backend.device)
    tensors = make(1, sum(lengths), 2, 16, 24, dtype, device=backend.device, sequences=len(lengths))
    o, states = run(backend, tensors, cu_seqlens=cu_seqlens)
    ends = cu_seqlens.tolist()
    for n, (begin, end) in enumerate(pairwise(ends)):
        piece = {name: x[:, begin:end] for name, x in tensors.items() if name != "initial_state"}
        o_n, state_n = run(backend, {**piece, "initial_state": tensors["initial_state"][n : n + 1]})
        assert bitwise_equal(o[:, begin:end].contiguous(), o_n.contiguous()), f"sequence {n}"
        assert bitwise_equal(states[n : n + 1].contiguous(), state_n), f"sequence {n}"


def test_packed_gradients_of_rows_after_the_end_are_zero(backend: Any) -> None:
    tensors = make(1, 90, 2, 16, 16, torch.float32, device=backend.device, state=False)
    for name in ("q", "k", "v", "g"):
        tensors[name].requires_grad_()
    cu_seqlens = lengths_to_cu_seqlens([30, 0, 25], backend.device)
    backend.ops.gated_retention(**tensors, cu_seqlens=cu_seqlens).sum().backward()
    for name in ("q", "k", "v", "g"):
        gradient = tensors[name].grad
        assert gradient is not None and not gradient[:, 55:].any(), name
        assert gradient[:, :55].any(), name


# ---- layouts and neighbours ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_views(backend: Any, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    plain = make(2, 83, 3, 24, 16, dtype, device=backend.device)
    views = {**plain, **{name: bthd_from_bhtd(plain[name]) for name in ("q", "k", "v")}}
    views["g"] = plain["g"].transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(run(backend, plain), run(backend, views), strict=True):
        assert bitwise_equal(a.contiguous(), b.contiguous())
    check(backend, views, length=83)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_surrounded_by_nan(backend: Any, dtype: torch.dtype) -> None:
    """Rows, heads and columns beside the tensors are NaN: nothing of them may be read."""
    skip_unless_supported(backend, dtype)
    plain = make(2, 70, 2, 24, 40, dtype, device=backend.device)
    views = {name: guarded(x) if name in ("q", "k", "v", "g") else x for name, x in plain.items()}
    check(backend, views, length=70)


def test_nan_stays_in_its_sequence_head_and_future(backend: Any) -> None:
    """Rows of the same chunk may see it: there the causal mask is a factor 0 in a product, and 0 * NaN is NaN."""
    time = 70 if backend.emulated else 200
    clean = make(2, time, 2, 16, 16, torch.float32, device=backend.device)
    want, want_state = run(backend, clean)
    for name in ("q", "k", "v", "g"):
        dirty = {n: None if x is None else x.clone() for n, x in clean.items()}
        dirty[name][1, 66, 0] = torch.nan
        o, state = run(backend, dirty)
        assert o[1, 66, 0].isnan().any(), f"a NaN in {name} shows in its own row"
        assert state[1, 0].isnan().any() == (name != "q")
        for other in (o[0], o[1, :, 1], o[1, :64, 0], state[0], state[1, 1]):
            assert not other.isnan().any(), f"a NaN in {name} leaks"
        assert torch.equal(o[0], want[0]) and torch.equal(o[1, :, 1], want[1, :, 1])
        assert torch.equal(o[1, :64, 0], want[1, :64, 0]) and torch.equal(state[0], want_state[0])
        if name == "q":
            assert not o[1, 67:, 0].isnan().any() and torch.equal(state, want_state)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [5, 64, 200])
def test_nan_does_not_reach_the_past(backend: Any, time: int, dtype: torch.dtype) -> None:
    """Also inside a chunk, where several tokens that are not finite must not reach each other's past."""
    clean = make(1, time, 1, 24, 40, dtype)
    want, _ = run(backend, clean)
    bad = sorted({0, 3, time // 2, time - 1})
    for name in ("k", "v", "g"):
        for value in (torch.nan, torch.inf):
            if name == "g" and value == torch.inf:
                continue  # not a decay
            dirty = {n: x.clone() for n, x in clean.items()}
            for column, token in enumerate(bad[1:]):
                dirty[name][0, token, 0, ...] = 0 if name == "v" else dirty[name][0, token, 0, ...]
                if name == "g":
                    dirty[name][0, token, 0] = value
                else:
                    dirty[name][0, token, 0, column] = value
            o, _ = run(backend, dirty)
            assert torch.equal(o[0, : bad[1]], want[0, : bad[1]]), f"{value} in {name} reaches the past"
            if name == "v":  # each column of v is a sequence of its own
                for column, token in enumerate(bad[1:]):
                    assert o[0, :token, 0, column].isfinite().all() and not o[0, token, 0, column].isfinite()


def test_infinite_decay_forgets_everything(backend: Any) -> None:
    tensors = make(1, 80, 2, 16, 16, torch.float32, device=backend.device)
    tensors["g"][:, 65] = -torch.inf
    o, state = run(backend, tensors)
    after = {name: x if name == "initial_state" else x[:, 65:] for name, x in tensors.items()}
    after["initial_state"] = torch.zeros_like(tensors["initial_state"])
    o_after, state_after = run(backend, after)
    assert_rule("o", o[:, 65:], o_after.double(), o_after, length=15)
    assert_rule("final_state", state, state_after.double(), state_after, length=15)


# ---- invariances ---------------------------------------------------------------------------------------------------
@given(data=st.data())
@hypothesis_settings(max_examples=15)
def test_split_anywhere(backend: Any, data: st.DataObject) -> None:
    """One pass, and two passes that hand the state over, are the same function: values and gradients."""
    time = data.draw(st.integers(0, 80 if backend.emulated else 300), label="time")
    cut = data.draw(st.integers(0, time), label="cut")
    dtype = data.draw(st.sampled_from(backend.dtypes), label="dtype")
    decay = data.draw(st.sampled_from(DECAYS), label="decay")
    tensors = make(1, time, 2, 16, 16, dtype, device=backend.device, decay=decay)

    def in_two(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, return_final_state: bool
    ) -> tuple[Tensor, Tensor]:
        head = (x[:, :cut] for x in (q, k, v, g))
        tail = (x[:, cut:] for x in (q, k, v, g))
        o_1, state = backend.ops.gated_retention(*head, initial_state=initial_state, return_final_state=True)
        o_2, state = backend.ops.gated_retention(*tail, initial_state=state, return_final_state=True)
        return torch.cat([o_1, o_2], 1), state

    compare(in_two, reference.gated_retention, tensors, wanted=INPUTS, length=time, return_final_state=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(backend: Any, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    time = 70 if backend.emulated else 1300
    tensors = make(1, time, 2, 32, 24, dtype, device=backend.device)
    upstream = [torch.randn(1, time, 2, 24).to(backend.device), torch.randn(1, 2, 32, 24).to(backend.device)]

    def everything() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors.values()]
        outputs = run(backend, dict(zip(tensors, leaves, strict=True)))
        pairs = zip(outputs, upstream, strict=True)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [u.to(o.dtype) for o, u in pairs])]

    first = everything()
    threads = torch.get_num_threads()
    try:
        for n in (threads, 1, 2, 3):
            torch.set_num_threads(n)
            for name, a, b in zip(["o", "final_state", *INPUTS], first, everything(), strict=True):
                assert bitwise_equal(a.contiguous(), b.contiguous()), f"{name} with {n} threads"
    finally:
        torch.set_num_threads(threads)


def test_a_batch_row_does_not_depend_on_the_batch(backend: Any) -> None:
    time = 66 if backend.emulated else 1100
    tensors = make(3, time, 2, 16, 24, torch.bfloat16, device=backend.device)
    o, state = run(backend, tensors)
    for n in range(3):
        alone = {name: x[n : n + 1] for name, x in tensors.items()}
        o_n, state_n = run(backend, alone)
        assert bitwise_equal(o[n : n + 1].contiguous(), o_n.contiguous()), f"row {n}"
        assert bitwise_equal(state[n : n + 1].contiguous(), state_n), f"row {n}"


def test_recurrent_form_agrees(backend: Any) -> None:
    """The two forms of the paper, Eq. 7 and Eq. 8."""
    from yoco_ext.reference.retention import recurrent

    time = 70 if backend.emulated else 200
    tensors = make(2, time, 2, 16, 24, torch.float32, device=backend.device)
    wide = {name: x.double() for name, x in tensors.items()}
    o, state = run(backend, tensors, scale=0.5)
    o_64, state_64 = recurrent(*(wide[n] for n in "qkvg"), 0.5, wide["initial_state"])
    o_32, state_32 = recurrent(*(tensors[n] for n in "qkvg"), 0.5, tensors["initial_state"])
    assert_rule("o", o, o_64, o_32, length=time)
    assert_rule("final_state", state, state_64, state_32, length=time)


# ---- gradients -----------------------------------------------------------------------------------------------------
@pytest.mark.backends("cpu", "reference")
@pytest.mark.parametrize("time", [1, 5, 66])
def test_gradcheck(backend: Any, time: int) -> None:
    tensors = make(1, time, 2, 8, 8, torch.float64, decay="medium")
    leaves = [x.requires_grad_() for x in tensors.values()]

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return run(backend, dict(zip(INPUTS, inputs, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=time > 5)


@pytest.mark.backends("cpu", "reference")
def test_gradcheck_packed(backend: Any) -> None:
    tensors = make(1, 12, 1, 8, 16, torch.float64, decay="medium", sequences=4)
    leaves = [x.requires_grad_() for x in tensors.values()]
    cu_seqlens = lengths_to_cu_seqlens([3, 0, 6, 1])

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return run(backend, dict(zip(INPUTS, inputs, strict=True)), cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(function, leaves)


# ---- random shapes -------------------------------------------------------------------------------------------------
@given(data=st.data())
@hypothesis_settings(max_examples=25)
def test_random_shapes_and_strides(backend: Any, data: st.DataObject) -> None:
    small = backend.emulated
    dtype = data.draw(st.sampled_from(backend.dtypes), label="dtype")
    heads = data.draw(st.integers(1, 3), label="heads")
    dim_k = 8 * data.draw(st.integers(1, 4 if small else 20), label="dim_k / 8")
    dim_v = 8 * data.draw(st.integers(1, 4 if small else 20), label="dim_v / 8")
    lengths = data.draw(st.lists(st.integers(0, 70 if small else 150), min_size=1, max_size=4), label="lengths")
    decay = data.draw(st.sampled_from(DECAYS), label="decay")
    gate_dtype = data.draw(st.sampled_from([dtype, torch.float32]), label="gate dtype")
    with_state = data.draw(st.booleans(), label="state")
    make_options = {"device": backend.device, "decay": decay, "state": with_state, "gate_dtype": gate_dtype}
    options: dict[str, Any] = {"scale": data.draw(st.sampled_from([None, 1.0, 0.05]), label="scale")}
    if data.draw(st.booleans(), label="packed"):
        time = sum(lengths) + data.draw(st.integers(0, 9), label="tail")
        options["cu_seqlens"] = lengths_to_cu_seqlens(lengths, backend.device)
        tensors = make(1, time, heads, dim_k, dim_v, dtype, sequences=len(lengths), **make_options)
    else:
        tensors = make(len(lengths) % 3 + 1, max(lengths), heads, dim_k, dim_v, dtype, **make_options)
    for name in ("q", "k", "v"):
        layout = data.draw(st.sampled_from(["plain", "transposed", "guarded"]), label=name)
        if layout == "transposed":
            tensors[name] = bthd_from_bhtd(tensors[name])
        elif layout == "guarded":
            tensors[name] = guarded(tensors[name])
    check(backend, tensors, length=max(lengths), **options)


# ---- bad input -----------------------------------------------------------------------------------------------------
BAD = {
    "k": lambda t: {"k": t["k"][..., :8]},
    "v": lambda t: {"v": t["v"][:, :-1]},
    "g": lambda t: {"g": t["g"][..., None]},
    "q": lambda t: {"q": t["q"][0]},
    "k.dtype": lambda t: {"k": t["k"].half()},
    "g.dtype": lambda t: {"g": t["g"].half()},
    "initial_state": lambda t: {"initial_state": torch.zeros(2, 2, 16, 8, device=t["q"].device)},
    "initial_state ": lambda t: {"initial_state": torch.zeros(2, 2, 16, 16, device=t["q"].device).half()},
    "v ": lambda t: {"v": t["v"].transpose(2, 3).contiguous().transpose(2, 3)},
    "cu_seqlens": lambda t: {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32, device=t["q"].device)},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(backend: Any, case: str) -> None:
    tensors = make(2, 10, 2, 16, 16, torch.float32, device=backend.device)
    with pytest.raises((ValueError, RuntimeError), match=rf"(?i)\b{case.strip().split('.')[0]}\b"):
        backend.ops.gated_retention(**{**tensors, **BAD[case](tensors)})


@pytest.mark.parametrize("dim", [4, 12, 264])
def test_head_dims_that_do_not_exist(backend: Any, dim: int) -> None:
    tensors = make(1, 4, 1, dim, dim, torch.float32, device=backend.device, state=False)
    with pytest.raises((ValueError, RuntimeError), match="multiple of 8"):
        backend.ops.gated_retention(**tensors)
