"""gated_retention with gate_logit_normalizer: the log decay logsigmoid(x) / tau made inside the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import bitwise_equal, compare, lengths_to_cu_seqlens, rms
from test_gated_retention import DTYPES, INPUTS, make, skip_unless_supported
from torch import Tensor
from torch.nn.functional import logsigmoid

from yoco_ext import nn, reference

LOGITS = {
    "layer": lambda shape: torch.randn(shape),
    "wide": lambda shape: 20 * torch.randn(shape),  # decays from nothing to everything
}


def with_logits(tensors: dict[str, Tensor | None], logits: str, gate_dtype: torch.dtype) -> dict[str, Tensor | None]:
    g = tensors["g"]
    return {**tensors, "g": LOGITS[logits](g.shape).to(gate_dtype).to(g.device)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["narrow", "float32"])
@pytest.mark.parametrize(("logits", "normalizer"), [("layer", 16.0), ("layer", 1.0), ("wide", 16.0)])
def test_values_and_gradients(backend: Any, dtype: torch.dtype, gate: str, logits: str, normalizer: float) -> None:
    skip_unless_supported(backend, dtype)
    if gate == "float32" and dtype in (torch.float32, torch.float64):
        pytest.skip("the same as narrow, or no such combination in use")
    time = 130
    tensors = make(2, time, 2, 32, 24, dtype, device=backend.device)
    tensors = with_logits(tensors, logits, torch.float32 if gate == "float32" else dtype)
    compare(
        backend.ops.gated_retention,
        reference.gated_retention,
        tensors,
        wanted=INPUTS,
        length=time,
        return_final_state=True,
        gate_logit_normalizer=normalizer,
    )


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_instance_and_packed_sequences(backend: Any, dim: int) -> None:
    lengths, dtype = [70, 0, 33], torch.bfloat16
    tensors = make(1, sum(lengths) + 2, 1, dim, dim, dtype, device=backend.device, sequences=3)
    compare(
        backend.ops.gated_retention,
        reference.gated_retention,
        with_logits(tensors, "layer", dtype),
        wanted=INPUTS,
        length=70,
        return_final_state=True,
        cu_seqlens=lengths_to_cu_seqlens(lengths, backend.device),
        gate_logit_normalizer=16.0,
    )


def test_equals_decays_made_outside(backend: Any) -> None:
    """The same float32 numbers up to the last digits of a logarithm, forward and backward."""
    tensors = with_logits(make(1, 200, 2, 32, 32, torch.float32, device=backend.device), "wide", torch.float32)
    upstream = torch.randn(1, 200, 2, 32, device=backend.device)

    def run(fused: bool) -> list[Tensor]:
        leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}
        if fused:
            o = backend.ops.gated_retention(**leaves, gate_logit_normalizer=16.0)
        else:
            o = backend.ops.gated_retention(**{**leaves, "g": logsigmoid(leaves["g"]) / 16.0})
        return [o, *torch.autograd.grad(o, list(leaves.values()), upstream)]

    for name, a, b in zip(("o", *INPUTS), run(True), run(False), strict=True):
        assert rms(a.double() - b.double()) <= 1e-5 * rms(b) + 1e-7, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(backend: Any, dtype: torch.dtype) -> None:
    skip_unless_supported(backend, dtype)
    tensors = with_logits(make(2, 7, 3, 40, 32, dtype, device=backend.device), "wide", dtype)
    start = tensors.pop("initial_state")
    states = {name: start.clone() for name in ("step", "plain")}
    o = backend.ops.gated_retention_step(**tensors, state=states["step"], gate_logit_normalizer=16.0)
    wide = torch.promote_types(dtype, torch.float32)
    decays = {**tensors, "g": logsigmoid(tensors["g"].to(wide)) / 16.0}
    expected = backend.ops.gated_retention_step(**decays, state=states["plain"])
    tolerance = 4 * torch.finfo(dtype).eps
    assert rms(o.double() - expected.double()) <= tolerance * rms(expected)
    assert rms(states["step"].double() - states["plain"].double()) <= 1e-6 * rms(states["plain"])


def test_infinite_and_nan_logits(backend: Any) -> None:
    """-inf forgets everything, +inf nothing; NaN shows from its token on."""
    tensors = make(1, 90, 1, 16, 16, torch.float32, device=backend.device, state=False)
    g = torch.zeros(1, 90, 1, device=backend.device)
    g[:, 10], g[:, 20] = -torch.inf, torch.inf
    tensors["g"] = g
    o = backend.ops.gated_retention(**tensors, gate_logit_normalizer=16.0)
    assert o.isfinite().all()
    alone = {n: None if x is None else x[:, 10:] for n, x in tensors.items()}
    again = backend.ops.gated_retention(**alone, gate_logit_normalizer=16.0)
    assert rms(o[:, 10:] - again) <= 1e-6 * rms(again)
    g[:, 70] = torch.nan
    bad = backend.ops.gated_retention(**tensors, gate_logit_normalizer=16.0)
    assert bad[:, :70].isfinite().all() and bad[:, 70:].isnan().all()


@pytest.mark.backends("cpu")
def test_gradcheck(backend: Any) -> None:
    tensors = with_logits(make(1, 70, 1, 8, 8, torch.float64), "layer", torch.float64)
    inputs = [x.requires_grad_() for x in tensors.values()]

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
        return backend.ops.gated_retention(q, k, v, g, initial_state=state, gate_logit_normalizer=4.0)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("normalizer", [0.0, -1.0, "16", True])
def test_bad_normalizer(backend: Any, normalizer: Any) -> None:
    tensors = make(1, 3, 1, 8, 8, torch.float32, device=backend.device)
    with pytest.raises(ValueError, match=r"gate_logit_normalizer.*positive number"):
        backend.ops.gated_retention(**tensors, gate_logit_normalizer=normalizer)
    state = tensors.pop("initial_state")
    with pytest.raises(ValueError, match=r"gate_logit_normalizer.*positive number"):
        backend.ops.gated_retention_step(**tensors, state=state, gate_logit_normalizer=normalizer)


@pytest.mark.backends("cpu")
@torch.no_grad()
def test_layer_and_its_reference_agree(backend: Any) -> None:
    """nn.GatedRetention hands logits to the kernels."""
    fused, plain = (nn.GatedRetention(64, 2, ops=ops) for ops in ("fused", "reference"))
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 90, 64)
    a, b = fused(x), plain(x)
    assert rms((a - b).double()) <= 1e-5 * rms(b)
    states = [torch.zeros(2, 2, 32, 32) for _ in range(2)]
    whole = torch.cat([fused(x[:, :60], state=states[0]), fused(x[:, 60:], state=states[0], offsets=_offsets(60))], 1)
    assert rms((whole - a).double()) <= 1e-5 * rms(a)
    steps = [fused(x[:, t : t + 10], state=states[1], offsets=_offsets(t)) for t in range(0, 90, 10)]
    assert rms((torch.cat(steps, 1) - a).double()) <= 1e-5 * rms(a)
    assert bitwise_equal(fused(x), a)


def _offsets(t: int) -> Tensor:
    return torch.full((2,), t, dtype=torch.int32)
