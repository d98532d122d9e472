"""retention_output: per-head norm times silu(gate), values and gradients, strides, repeatability, bad input."""

from __future__ import annotations

import numerics
import pytest
import torch
from conftest import Backend
from hypothesis import given
from hypothesis import strategies as st

from yoco_ext import reference

SHAPES = [(1, 1, 1, 8), (2, 3, 4, 16), (1, 67, 3, 120), (2, 33, 2, 256), (3, 0, 2, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(backend: Backend, shape: tuple[int, ...]) -> None:
    for dtype in backend.dtypes:
        size = torch.randn(shape[:-1], device=backend.device).exp()[..., None]  # heads of very different size
        tensors = {
            "o": (torch.randn(shape, device=backend.device) * size).to(dtype),
            "gate": (2 * torch.randn(shape, device=backend.device)).to(dtype),
        }
        numerics.compare(
            backend.ops.retention_output,
            reference.retention_output,
            tensors,
            wanted=["o", "gate"],
            length=shape[-1],
            eps=1e-5,
        )


@given(data=st.data())
def test_random_shapes_and_strides(backend: Backend, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(backend.dtypes))
    shape = (*(data.draw(st.integers(1, n)) for n in (3, 9, 4)), 8 * data.draw(st.integers(1, 32)))
    o, gate = (torch.randn(shape, device=backend.device).to(dtype) for _ in range(2))
    layouts = {"plain": lambda x: x, "guarded": numerics.guarded, "transposed": numerics.bthd_from_bhtd}
    tensors = {
        "o": layouts[data.draw(st.sampled_from(sorted(layouts)))](o),
        "gate": layouts[data.draw(st.sampled_from(sorted(layouts)))](gate),
    }
    eps = data.draw(st.sampled_from([1e-6, 1e-5, 1e-2]))
    numerics.compare(
        backend.ops.retention_output, reference.retention_output, tensors, wanted=["o", "gate"], length=256, eps=eps
    )


def test_a_bad_head_stays_alone(backend: Backend) -> None:
    o, gate = (torch.randn(2, 5, 3, 24, device=backend.device) for _ in range(2))
    clean = backend.ops.retention_output(o, gate)
    o[1, 2, 1, 5] = torch.nan
    y = backend.ops.retention_output(o, gate)
    assert y[1, 2, 1].isnan().all()
    y[1, 2, 1] = clean[1, 2, 1]
    assert numerics.bitwise_equal(y, clean)


@pytest.mark.backends("cpu", "reference")
def test_gradcheck(backend: Backend) -> None:
    o, gate = (torch.randn(1, 3, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(backend.ops.retention_output, (o, gate))


def test_bad_input(backend: Backend) -> None:
    o = torch.ones(1, 4, 2, 8, device=backend.device)
    for gate in (torch.ones(1, 4, 2, 16), torch.ones(1, 4, 16), torch.ones(1, 4, 2, 8, dtype=torch.float16)):
        with pytest.raises((ValueError, RuntimeError), match="gate"):
            backend.ops.retention_output(o, gate.to(backend.device))
    with pytest.raises((ValueError, RuntimeError), match=r"\bo\b"):
        backend.ops.retention_output(o[0], o[0])
