"""swiglu: values and gradients by the rule of numerics, extreme gates, strides, bad input."""

from __future__ import annotations

import numerics
import pytest
import torch
from conftest import Backend
from hypothesis import given
from hypothesis import strategies as st

from yoco_ext import reference

SHAPES = [(1,), (0, 8), (3, 17), (2, 5, 64), (129, 257), (1, 20011)]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(backend: Backend, shape: tuple[int, ...]) -> None:
    for dtype in backend.dtypes:
        tensors = {name: (3 * torch.randn(shape, device=backend.device)).to(dtype) for name in ("gate", "up")}
        numerics.compare(backend.ops.swiglu, reference.swiglu, tensors, wanted=["gate", "up"])


@given(data=st.data())
def test_random_strides(backend: Backend, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(backend.dtypes))
    shape = (data.draw(st.integers(0, 5)), data.draw(st.integers(0, 40)), 2 * data.draw(st.integers(1, 40)))
    both = torch.randn(*shape, device=backend.device).to(dtype)
    gate, up = both.chunk(2, dim=-1)  # the two halves of one projection: rows are not contiguous
    numerics.compare(backend.ops.swiglu, reference.swiglu, {"gate": gate, "up": up}, wanted=["gate", "up"])


def test_extreme_gates(backend: Backend) -> None:
    gate = torch.tensor(
        [-1e4, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e4, -torch.inf, torch.inf], device=backend.device
    )
    for dtype in backend.dtypes:
        y = backend.ops.swiglu(gate.to(dtype), torch.ones_like(gate).to(dtype))
        assert torch.equal(y[5:8].double(), gate[5:8].to(dtype).double())
        assert (y[:3].double().abs() < 1e-30).all() and (y[3:5] == 0).all()
        assert y[9] == torch.inf
    # -inf * sigmoid(-inf) has no value: NaN like in PyTorch's own silu, and the neighbours do not notice.


def test_nan_stays_where_it_is(backend: Backend) -> None:
    for dtype in backend.dtypes:
        gate, up = (torch.randn(100, device=backend.device).to(dtype) for _ in range(2))
        clean = backend.ops.swiglu(gate, up)
        gate[31], up[77] = torch.nan, torch.nan
        y = backend.ops.swiglu(gate, up)
        bad = torch.zeros(100, dtype=torch.bool, device=backend.device)
        bad[31] = bad[77] = True
        assert torch.equal(y.isnan(), bad) and torch.equal(y[~bad], clean[~bad])


@pytest.mark.backends("cpu", "reference")
def test_gradcheck(backend: Backend) -> None:
    gate, up = (torch.randn(3, 19, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(backend.ops.swiglu, (gate, up))


def test_bad_input(backend: Backend) -> None:
    gate = torch.ones(4, 8, device=backend.device)
    for up in (torch.ones(4, 7), torch.ones(8, 4), torch.ones(4, 8, dtype=torch.float16)):
        with pytest.raises((ValueError, RuntimeError), match="up"):
            backend.ops.swiglu(gate, up.to(backend.device))
    with pytest.raises((ValueError, RuntimeError), match="gate"):
        backend.ops.swiglu(gate.int(), gate.int())
