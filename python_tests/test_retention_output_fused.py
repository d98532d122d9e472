"""gated_retention and its step with an output gate: norm per head and gate behind the retention, in the same call."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numerics import assert_rule, bitwise_equal, bthd_from_bhtd, compare, guarded, lengths_to_cu_seqlens, rms
from test_gated_retention import DTYPES, INPUTS, make, skip_unless_supported
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from yoco_ext import reference

WANTED = [*INPUTS, "output_gate"]


def make_gated(
    batch: int, time: int, heads: int, dim_k: int, dim_v: int, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor | None]:
    """Fresh random arguments; the gate as the model makes it, with both signs and both tails of silu."""
    tensors = make(batch, time, heads, dim_k, dim_v, dtype, **options)
    gate = 2 * torch.randn(batch, time, heads, dim_v)
    return {**tensors, "output_gate": gate.to(dtype).to(options.get("device", "cpu"))}


def run(backend: Any, tensors: dict[str, Tensor | None], **options: Any) -> tuple[Tensor, Tensor]:
    return backend.ops.gated_retention(**tensors, return_final_state=True, **options)


def check(backend: Any, tensors: dict[str, Tensor | None], *, length: int, **options: Any) -> tuple[Tensor, ...]:
    """Outputs and all gradients by the rule of numerics."""
    return compare(
        backend.ops.gated_retention,
        reference.gated_retention,
        tensors,
        wanted=[name for name in WANTED if tensors[name] is not None],
        length=max(length, 256),  # the norm sums as well
        return_final_state=True,
        **options,
    )


def separately(ops: Any, tensors: dict[str, Tensor | None], eps: float = 1e-5, **options: Any) -> Tensor:
    """The two calls that one replaces."""
    rest = {name: x for name, x in tensors.items() if name != "output_gate"}
    return ops.retention_output(ops.gated_retention(**rest, **options), tensors["output_gate"], eps=eps)


# ---- the rule of numerics ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [0, 1, 63, 64, 65, 130, 1100])
def test_lengths(backend: Any, time: int, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    if backend.emulated and (time > 130 or (dtype == torch.float16 and time != 65)):
        pytest.skip("too slow on the emulator")
    check(backend, make_gated(2, time, 2, 32, 40, dtype, device=backend.device), length=time)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim_k", "dim_v"), [(8, 8), (8, 256), (24, 40), (64, 64), (64, 128), (128, 128), (128, 64), (200, 24), (256, 256)]
)
def test_head_dims(backend: Any, dim_k: int, dim_v: int, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    if backend.emulated and dtype == torch.float16:
        pytest.skip("the instances of bfloat16 from the same source")
    time = 65 if backend.emulated else 150
    check(backend, make_gated(1, time, 2, dim_k, dim_v, dtype, device=backend.device), length=time)


def test_equals_the_two_calls(backend: Any) -> None:
    """With any eps, also none; and the default is retention_output's."""
    tensors = make_gated(2, 70, 3, 16, 24, torch.float32, device=backend.device)
    for eps in (0.0, 1e-6, 0.3):
        want = separately(backend.ops, tensors, eps)
        y = backend.ops.gated_retention(**tensors, norm_eps=eps)
        assert rms(y - want) <= 2e-6 * rms(want)
    assert bitwise_equal(backend.ops.gated_retention(**tensors), backend.ops.gated_retention(**tensors, norm_eps=1e-5))
    assert rms(backend.ops.gated_retention(**tensors) - separately(reference, tensors)) <= 1e-5 * rms(want)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_o_is_not_rounded_before_the_norm(backend: Any, dtype: torch.dtype) -> None:
    """Stricter than the rule. With one key and value the direction of o is v's, which is exact, so that the only
    rounding left is the last."""
    tensors = make_gated(1, 1, 3, 16, 64, dtype, state=False)
    wide = {name: None if x is None else x.double() for name, x in tensors.items()}
    exact = reference.gated_retention(**wide, norm_eps=0.0)
    y = backend.ops.gated_retention(**tensors, norm_eps=0.0)
    assert rms(y.double() - exact) <= 1.05 * rms(exact.to(dtype).double() - exact)
    state = torch.zeros(1, 3, 16, 64)
    tensors.pop("initial_state")
    stepped = backend.ops.gated_retention_step(**tensors, state=state, norm_eps=0.0)
    assert rms(stepped.double() - exact) <= 1.05 * rms(exact.to(dtype).double() - exact)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_with_rotary_and_logits(backend: Any, dtype: torch.dtype, interleaved: bool) -> None:
    """Everything that the layer fuses."""
    tensors = make_gated(2, 70, 2, 32, 40, dtype, device=backend.device, gate_dtype=torch.float32)
    tensors["g"] = torch.randn(2, 70, 2, device=backend.device)
    check(
        backend,
        tensors,
        length=70,
        inv_freq=10_000.0 ** -torch.linspace(0, 1, 12, device=backend.device),
        interleaved=interleaved,
        offsets=torch.tensor([0, 1000], dtype=torch.int32, device=backend.device),
        gate_logit_normalizer=16.0,
    )


@hypothesis_settings(max_examples=20)
@given(data=st.data())
def test_random_shapes(backend: Any, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(backend.dtypes))
    largest = 4 if backend.emulated else 32
    dim_k, dim_v = (8 * data.draw(st.integers(1, largest)) for _ in range(2))
    time = data.draw(st.integers(1, 70 if backend.emulated else 200))
    heads = data.draw(st.integers(1, 3))
    tensors = make_gated(1, time, heads, dim_k, dim_v, dtype, device=backend.device)
    eps = data.draw(st.sampled_from([1e-6, 1e-5, 1e-2]))
    check(backend, tensors, length=time, norm_eps=eps, scale=data.draw(st.sampled_from([None, 1.0])))


# ---- gradients -----------------------------------------------------------------------------------------------------
@pytest.mark.backends("cpu", "reference")
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(backend: Any, packed: bool) -> None:
    tensors = make_gated(1, 9, 2, 8, 8, torch.float64, decay="medium", sequences=2 if packed else 1)
    options = {"cu_seqlens": lengths_to_cu_seqlens([3, 4])} if packed else {}

    def function(*leaves: Tensor) -> Any:
        return run(backend, dict(zip(WANTED, leaves, strict=True)), norm_eps=1e-3, **options)

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in WANTED])


def test_gradient_through_one_output_only(backend: Any) -> None:
    tensors = make_gated(2, 70, 2, 16, 16, torch.float32, device=backend.device)
    o, state = torch.randn(2, 70, 2, 16, device=backend.device), torch.randn(2, 2, 16, 16, device=backend.device)
    for upstream, wanted in (([o, None], WANTED), ([None, state], INPUTS[1:])):
        compare(
            backend.ops.gated_retention,
            reference.gated_retention,
            tensors,
            wanted=wanted,
            length=256,
            upstream=upstream,
            return_final_state=True,
        )


@pytest.mark.backends("cpu", "cuda", "emulated")
def test_only_the_gradients_asked_for(backend: Any) -> None:
    tensors = make_gated(1, 40, 2, 16, 16, torch.float32, device=backend.device)
    upstream = torch.randn(1, 40, 2, 16, device=backend.device)

    def gradients(names: list[str]) -> dict[str, Tensor]:
        leaves = {n: x.detach().requires_grad_(n in names) for n, x in tensors.items()}
        y = backend.ops.gated_retention(**leaves)
        return dict(zip(names, torch.autograd.grad(y, [leaves[n] for n in names], upstream), strict=True))

    everything = gradients(WANTED)
    for names in (["output_gate"], ["q"], ["v", "output_gate"], ["initial_state"]):
        for name, gradient in gradients(names).items():
            assert bitwise_equal(gradient, everything[name]), f"{name} of {names}"


@pytest.mark.backends("cpu", "cuda", "emulated")
def test_backward_without_a_kept_o(backend: Any) -> None:
    """A recorded call whose forward was not told (keep_o) makes o again; one that is not recorded keeps nothing."""
    raw = torch.ops.yoco_ext.gated_retention
    tensors = make_gated(1, 70, 2, 16, 16, torch.bfloat16, device=backend.device)
    lengths = lengths_to_cu_seqlens([30, 35], backend.device)
    tensors["initial_state"] = torch.randn(2, 2, 16, 16, device=backend.device)
    results = []
    for keep_o in (True, False):
        q, k, v, g, state, gate = (tensors[name].detach().requires_grad_() for name in WANTED)
        y, _, o = raw(q, k, v, g, state, lengths, 0.25, True, 0.0, None, None, False, gate, 1e-5, keep_o)
        assert o.shape == (y.shape if keep_o else (0,)) and not o.requires_grad
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [q, k, v, g, state, gate])])
    for a, b in zip(*results, strict=True):
        assert bitwise_equal(a, b)
    rest = {name: x for name, x in tensors.items() if name not in ("output_gate", "initial_state")}
    without = raw(*rest.values(), None, None, 0.25, False)
    assert len(without) == 3 and without[1].numel() == 0 and without[2].numel() == 0


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(backend: Any, reentrant: bool) -> None:
    tensors = make_gated(1, 70, 2, 16, 24, torch.float32, device=backend.device)

    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, gate: Tensor) -> Tensor:
        return backend.ops.gated_retention(q, k, v, g, initial_state=state, output_gate=gate)

    gradients = []
    for again in (False, True):
        leaves = [tensors[name].detach().requires_grad_() for name in WANTED]
        y = checkpoint(call, *leaves, use_reentrant=reentrant) if again else call(*leaves)
        y.square().sum().backward()
        gradients.append([x.grad for x in leaves])
    for a, b in zip(*gradients, strict=True):
        assert bitwise_equal(a, b)


# ---- packed sequences, layouts, neighbours -------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[0, 65, 0, 1, 20], [130, 7, 64], [0], []], ids=str)
def test_packed(backend: Any, lengths: list[int], dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    if backend.emulated and (sum(lengths) > 100 or dtype == torch.float16):
        pytest.skip("too slow on the emulator")
    device, end = backend.device, sum(lengths)
    tensors = make_gated(1, end + 5, 2, 24, 24, dtype, device=device, sequences=len(lengths), state=len(lengths) > 0)
    cu_seqlens = lengths_to_cu_seqlens(lengths, device)
    y, states = check(backend, tensors, length=max([*lengths, 1]), cu_seqlens=cu_seqlens)
    assert not y[:, end:].any(), "rows after the last sequence are zero"
    if not backend.fused:
        return
    for n, (begin, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        piece = {name: x[:, begin:stop] for name, x in tensors.items() if name != "initial_state"}
        y_n, state_n = run(backend, {**piece, "initial_state": tensors["initial_state"][n : n + 1]})
        assert bitwise_equal(y[:, begin:stop].detach().contiguous(), y_n.contiguous()), f"sequence {n}"
        assert bitwise_equal(states[n : n + 1].detach().contiguous(), state_n), f"sequence {n}"


def test_rows_of_no_sequence_are_zero_whatever_the_gate(backend: Any) -> None:
    """0 * NaN and 0 / sqrt(0) are NaN: neither may show in padding, nor in the gradients of what is beside it."""
    tensors = make_gated(1, 50, 2, 16, 16, torch.float32, device=backend.device, state=False)
    options = {"cu_seqlens": lengths_to_cu_seqlens([30, 12], backend.device), "norm_eps": 0.0}
    want = backend.ops.gated_retention(**tensors, **options)
    assert not want[:, 42:].any()
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in tensors.items()}
    backend.ops.gated_retention(**leaves, **options).square().sum().backward()
    for name in ("q", "k", "v", "g", "output_gate"):
        gradient = leaves[name].grad
        assert gradient is not None and gradient.isfinite().all() and gradient[:, :42].any(), name
        assert not gradient[:, 42:].any(), name
    tensors["output_gate"][:, 42:] = torch.nan
    assert bitwise_equal(backend.ops.gated_retention(**tensors, **options), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_surrounded_by_nan(backend: Any, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    if backend.emulated and dtype == torch.float16:
        pytest.skip("too slow on the emulator")
    plain = make_gated(2, 66, 2, 24, 40, dtype, device=backend.device)
    for view in (guarded, bthd_from_bhtd, lambda x: guarded(x, pad=3)):  # the last one: rows without alignment
        views = {name: view(x) if name in ("q", "k", "v", "output_gate") else x for name, x in plain.items()}
        check(backend, views, length=66)


def test_gate_out_of_one_projection(backend: Any) -> None:
    """q, k, v and the gate side by side, as one matrix product gives them."""
    tensors = make_gated(2, 66, 2, 16, 16, torch.bfloat16, device=backend.device)
    names = ["q", "k", "v", "output_gate"]
    together = torch.cat([tensors[n] for n in names], -1)  # [B, T, H, 4 * 16]
    views = {**tensors, **dict(zip(names, together.split(16, -1), strict=True))}
    for a, b in zip(run(backend, tensors), run(backend, views), strict=True):
        assert bitwise_equal(a, b)


def test_a_nan_stays_in_its_head_and_row(backend: Any) -> None:
    clean = make_gated(2, 70, 2, 16, 24, torch.float32, device=backend.device)
    want, want_state = run(backend, clean)
    for name, value in (("output_gate", torch.nan), ("output_gate", torch.inf), ("q", torch.nan)):
        dirty = {n: x.clone() for n, x in clean.items()}
        dirty[name][1, 65, 0, 3] = value
        y, state = run(backend, dirty)
        assert not y[1, 65, 0].isfinite().all(), "it shows in its own row"
        if name == "output_gate":  # one component, and not the norm
            others = torch.arange(24, device=y.device) != 3
            assert torch.equal(y[1, 65, 0, others], want[1, 65, 0, others])
            assert torch.equal(y[1, :, 0, others], want[1, :, 0, others]) and torch.equal(state, want_state)
        for where in ((0,), (1, slice(None), 1), (1, slice(0, 64), 0)):
            assert torch.equal(y[where], want[where]), name
    for name in ("k", "v"):  # the past of a token that is not finite
        dirty = {n: x.clone() for n, x in clean.items()}
        dirty[name][1, 66, 0] = torch.nan
        y, _ = run(backend, dirty)
        past = 66 if backend.name == "cpu" else 64  # elsewhere it may reach its own chunk
        for where in ((0,), (1, slice(None), 1), (1, slice(0, past), 0)):
            assert torch.equal(y[where], want[where]), name
        assert y[1, 66:, 0].isnan().all()


@pytest.mark.backends("cpu", "cuda", "emulated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(backend: Any, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    time = 70 if backend.emulated else 1300
    tensors = make_gated(1, time, 1, 32, 24, dtype, device=backend.device)
    upstream = torch.randn(1, time, 1, 24).to(dtype).to(backend.device)

    def everything() -> list[Tensor]:
        leaves = {name: tensors[name].detach().requires_grad_() for name in WANTED}
        y = backend.ops.gated_retention(**leaves)
        return [y, *torch.autograd.grad(y, list(leaves.values()), upstream)]

    first, threads = everything(), torch.get_num_threads()
    with torch.no_grad():
        assert bitwise_equal(backend.ops.gated_retention(**tensors), first[0]), "whether o is kept shows in y"
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for name, a, b in zip(["y", *WANTED], first, everything(), strict=True):
                assert bitwise_equal(a.contiguous(), b.contiguous()), f"{name} with {n} threads"
    finally:
        torch.set_num_threads(threads)


# ---- steps ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [1, 4, 7, 16])
@pytest.mark.parametrize(("dim_k", "dim_v"), [(8, 8), (40, 24), (64, 128), (128, 136), (256, 256)])
def test_step(backend: Any, dim_k: int, dim_v: int, time: int, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    if backend.emulated and time in (4, 16):
        pytest.skip("too slow on the emulator")
    tensors = make_gated(2, time, 3, dim_k, dim_v, dtype, device=backend.device)
    tensors["output_gate"] = guarded(tensors["output_gate"])
    options = {"gate_logit_normalizer": 16.0, "norm_eps": 1e-6}
    results = []
    for ops, wide in ((backend.ops, False), (reference, True), (reference, False)):
        mine = {name: x.double() if wide else x for name, x in tensors.items()}
        state = mine.pop("initial_state").clone()
        results.append((ops.gated_retention_step(**mine, state=state, **options), state))
    assert_rule("y", *(y for y, _ in results), length=dim_v)
    assert_rule("state", *(s for _, s in results), length=16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_carried_states_and_steps_equal_one_pass(backend: Any, dtype: torch.dtype) -> None:
    """Cut anywhere and the state carried on: by gated_retention, then by steps of 1, 5 and 16 tokens."""
    skip_unless_supported(backend, dtype)
    tensors = make_gated(2, 92, 2, 40, 24, dtype, device=backend.device)
    wide = {name: x.double() for name, x in tensors.items()}
    exact, plain = (reference.gated_retention(**x, return_final_state=True) for x in (wide, tensors))
    y, state = run(backend, {n: x if n == "initial_state" else x[:, :70] for n, x in tensors.items()})
    pieces, state = [y], state.clone()
    for begin, end in pairwise([70, 71, 76, 92]):
        piece = {name: x[:, begin:end] for name, x in tensors.items() if name != "initial_state"}
        pieces.append(backend.ops.gated_retention_step(**piece, state=state))
    assert_rule("y", torch.cat(pieces, 1), exact[0], plain[0], length=256)
    assert_rule("state", state, exact[1], plain[1], length=92)


def test_step_is_bitwise_repeatable(backend: Any) -> None:
    """With any number of threads, and any batch around a row; the state is the one of the step without a gate."""
    tensors = make_gated(3, 3, 5, 64, 72, torch.bfloat16, device=backend.device)
    start = tensors.pop("initial_state")
    want_state = start.clone()
    want = backend.ops.gated_retention_step(**tensors, state=want_state)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            state = start.clone()
            assert bitwise_equal(backend.ops.gated_retention_step(**tensors, state=state), want)
            assert bitwise_equal(state, want_state)
    finally:
        torch.set_num_threads(threads)
    alone = {name: x[1:2] for name, x in tensors.items()}
    state = start[1:2].clone()
    assert bitwise_equal(backend.ops.gated_retention_step(**alone, state=state), want[1:2].contiguous())
    plain = start.clone()
    rest = {name: x for name, x in tensors.items() if name != "output_gate"}
    backend.ops.gated_retention_step(**rest, state=plain)
    assert bitwise_equal(plain, want_state)


# ---- bad input -----------------------------------------------------------------------------------------------------
BAD = {
    "output_gate shape": lambda gate: {"output_gate": gate[..., :8]},
    "output_gate rank": lambda gate: {"output_gate": gate.flatten(2)},
    "output_gate dtype": lambda gate: {"output_gate": gate.half()},
    "output_gate strides": lambda gate: {"output_gate": gate.transpose(1, 3).contiguous().transpose(1, 3)},
    "norm_eps negative": lambda gate: {"norm_eps": -1e-5},
    "norm_eps infinite": lambda gate: {"norm_eps": float("inf")},
    "norm_eps nan": lambda gate: {"norm_eps": float("nan")},
    "norm_eps text": lambda gate: {"norm_eps": "1e-5"},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(backend: Any, case: str) -> None:
    tensors = make_gated(2, 3, 2, 16, 16, torch.float32, device=backend.device)
    changed = {**tensors, **BAD[case](tensors["output_gate"])}
    with pytest.raises(ValueError, match=case.split()[0]):
        backend.ops.gated_retention(**changed)
    state = changed.pop("initial_state")
    before = state.clone()
    with pytest.raises(ValueError, match=case.split()[0]):
        backend.ops.gated_retention_step(**changed, state=state)
    assert torch.equal(state, before), "a refused call leaves the state alone"


@pytest.mark.backends("cpu", "cuda", "emulated")
@pytest.mark.parametrize("case", [name for name in BAD if "text" not in name])
def test_the_op_below_refuses_it_too(backend: Any, case: str) -> None:
    raw = torch.ops.yoco_ext
    tensors = make_gated(2, 3, 2, 16, 16, torch.float32, device=backend.device)
    given_last = {"output_gate": tensors["output_gate"], "norm_eps": 1e-5, **BAD[case](tensors["output_gate"])}
    q, k, v, g, state = (tensors[name] for name in INPUTS)
    with pytest.raises(RuntimeError, match=case.split()[0]):
        raw.gated_retention(q, k, v, g, state, None, 0.25, False, **given_last)
    with pytest.raises(RuntimeError, match=case.split()[0]):
        raw.gated_retention_step(q, k, v, g, state, 0.25, **given_last)


def test_the_step_has_no_gradient_for_the_gate(backend: Any) -> None:
    tensors = make_gated(1, 2, 1, 8, 8, torch.float32, device=backend.device)
    state = tensors.pop("initial_state")
    tensors["output_gate"].requires_grad_()
    with pytest.raises(ValueError, match="no_grad"):
        backend.ops.gated_retention_step(**tensors, state=state)


@pytest.mark.backends("cpu", "cuda")
def test_autocast(backend: Any) -> None:
    tensors = make_gated(1, 5, 2, 16, 16, torch.float32, device=backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        y, _ = run(backend, tensors)
        state = tensors["initial_state"].clone()
        step = {n: x[:, :3] for n, x in tensors.items() if n != "initial_state"}
        stepped = backend.ops.gated_retention_step(**step, state=state)
    narrow = {n: x.bfloat16() if n in ("q", "k", "v", "output_gate") else x for n, x in tensors.items()}
    assert y.dtype == stepped.dtype == torch.bfloat16
    assert bitwise_equal(y, run(backend, narrow)[0])
