"""gated_memory: silu(gate) * memory, its norm by groups, values and gradients, strides, repeatability, bad input."""

from __future__ import annotations

import numerics
import pytest
import torch
from conftest import Backend
from hypothesis import given
from hypothesis import strategies as st

from yoco_ext import reference

# (shape, groups); 1032 and 4104 do not fit one warp's registers, 9000 not a block's, 12287 just fits 48 KB of sums
CASES = [((1, 8), 1), ((3, 5, 127), 1), ((2, 33, 256), 4), ((70, 96), 3), ((0, 64), 2), ((3, 1032), 1), ((2, 9000), 1)]
CASES += [((1, 12287), 1)]


@pytest.mark.parametrize("weight", ["none", "same", "float32"])
@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_values_and_gradients(backend: Backend, shape, groups, weight) -> None:
    for dtype in backend.dtypes:
        if dtype == torch.float64 and weight == "float32":
            continue  # float64 stays float64 throughout
        size = torch.randn(shape[:-1], device=backend.device).exp()[..., None]  # rows of very different size
        weight_dtype = {"none": None, "same": dtype, "float32": torch.float32}[weight]
        tensors = {
            "gate": (2 * torch.randn(shape, device=backend.device)).to(dtype),
            "memory": (torch.randn(shape, device=backend.device) * size).to(dtype),
            "weight": None if weight_dtype is None else torch.randn(shape[-1], device=backend.device).to(weight_dtype),
        }
        numerics.compare(
            backend.ops.gated_memory,
            reference.gated_memory,
            tensors,
            wanted=[name for name, t in tensors.items() if t is not None],
            length=max(shape[-1], torch.Size(shape[:-1]).numel()),
            normalize=True,
            groups=groups,
            eps=1e-5,
        )


def test_without_a_norm_it_is_swiglu(backend: Backend) -> None:
    gate, memory = (torch.randn(2, 5, 48, device=backend.device) for _ in range(2))
    y = backend.ops.gated_memory(gate, memory)
    assert numerics.bitwise_equal(y, backend.ops.swiglu(gate, memory))
    torch.testing.assert_close(y, torch.nn.functional.silu(gate) * memory)


@given(data=st.data())
def test_random_shapes_and_strides(backend: Backend, data: st.DataObject) -> None:
    dtype, groups = data.draw(st.sampled_from(backend.dtypes)), data.draw(st.integers(1, 4))
    # Of one or two components hardly any gradient is left: all of it cancels, and with it every relative error.
    rows, dim = data.draw(st.integers(1, 33)), groups * data.draw(st.integers(8, 100))
    gate, memory = (
        numerics.guarded(torch.randn(2, rows, dim, device=backend.device).to(dtype)).transpose(0, 1) for _ in range(2)
    )
    tensors = {"gate": gate, "memory": memory, "weight": torch.randn(dim, device=backend.device).to(dtype)}
    numerics.compare(
        backend.ops.gated_memory,
        reference.gated_memory,
        tensors,
        wanted=list(tensors),
        length=max(dim, 2 * rows),
        normalize=True,
        groups=groups,
        eps=data.draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
    )


@pytest.mark.backends("cpu", "reference")
def test_gradcheck(backend: Backend) -> None:
    gate, memory = (torch.randn(3, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: backend.ops.gated_memory(*x, normalize=True, groups=2), (gate, memory, weight)
    )


def test_repeatable_and_a_bad_row_stays_alone(backend: Backend) -> None:
    tensors = [torch.randn(300, 40, device=backend.device), torch.randn(300, 40, device=backend.device)]
    weight, up = torch.randn(40, device=backend.device), torch.randn(300, 40, device=backend.device)

    def once() -> tuple:
        leaves = [t.detach().requires_grad_() for t in (*tensors, weight)]
        y = backend.ops.gated_memory(*leaves, normalize=True)
        return y.detach(), torch.autograd.grad(y, leaves, up)

    (y, gradients), (again, repeated) = once(), once()
    assert numerics.bitwise_equal(y, again)
    assert all(numerics.bitwise_equal(a, b) for a, b in zip(gradients, repeated, strict=True))
    tensors[1][7, 3] = torch.inf
    spoilt, _ = once()
    spoilt[7] = y[7]
    assert numerics.bitwise_equal(spoilt, y)


def test_bad_input(backend: Backend) -> None:
    ops, x = backend.ops, torch.ones(4, 12, device=backend.device)
    for match, call in {
        "gate": lambda: ops.gated_memory(x[:, :8], x),
        "gate.dtype": lambda: ops.gated_memory(x.half(), x),
        "groups": lambda: ops.gated_memory(x, x, normalize=True, groups=5),
        "normalize": lambda: ops.gated_memory(x, x, x[0]),
        "weight": lambda: ops.gated_memory(x, x, x[0, :4], normalize=True),
        "eps": lambda: ops.gated_memory(x, x, normalize=True, eps=-1.0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
