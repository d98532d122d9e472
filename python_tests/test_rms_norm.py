"""rms_norm: values and gradients by the rule of numerics, the residual form, repeatability, bad input."""

from __future__ import annotations

import numerics
import pytest
import torch
from conftest import Backend
from hypothesis import given
from hypothesis import strategies as st

from yoco_ext import reference

SHAPES = [(1, 1), (3, 8), (2, 5, 127), (64, 768), (7, 3, 1000), (331, 64), (2, 4097)]


def inputs(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, weight: torch.dtype | None, residual: bool):
    x = torch.randn(shape, device=backend.device).mul(torch.randn(shape[:-1], device=backend.device).exp()[..., None])
    return {
        "x": x.to(dtype),
        "weight": None if weight is None else torch.randn(shape[-1], device=backend.device).to(weight),
        "residual": torch.randn(shape, device=backend.device).to(dtype) if residual else None,
    }


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weight", ["none", "same", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(backend: Backend, shape: tuple[int, ...], weight: str, residual: bool) -> None:
    # The gradient of one component cancels to eps / (x^2 + eps)^1.5: with a small eps only rounding would be compared.
    eps = 1e-5 if shape[-1] > 1 else 1.0
    for dtype in backend.dtypes:
        if backend.emulated and (dtype == torch.float32 or len(shape) == 3):
            continue  # an emulated token costs milliseconds; dtypes and shapes are covered pairwise
        if dtype == torch.float64 and weight == "float32":
            continue  # float64 stays float64 throughout
        weight_dtype = {"none": None, "same": dtype, "float32": torch.float32}[weight]
        tensors = inputs(backend, shape, dtype, weight_dtype, residual)
        wanted = [name for name, t in tensors.items() if t is not None]
        length = max(shape[-1], torch.Size(shape[:-1]).numel())
        numerics.compare(backend.ops.rms_norm, reference.rms_norm, tensors, wanted=wanted, length=length, eps=eps)


def test_weight_sums_of_48_kb(backend: Backend) -> None:
    """As much dynamic shared memory as a block gets unasked, where the static part has to fit in too."""
    tensors = inputs(backend, (2, 12287), torch.bfloat16, torch.bfloat16, False)
    wanted = ["x", "weight"]
    numerics.compare(backend.ops.rms_norm, reference.rms_norm, tensors, wanted=wanted, length=12287, eps=1e-5)


@given(data=st.data())
def test_random_shapes_and_strides(backend: Backend, data: st.DataObject) -> None:
    # Of one or two components hardly any gradient is left: all of it cancels, and with it every relative error.
    rows, dim = data.draw(st.integers(0, 33)), data.draw(st.integers(8, 300))
    dtype = data.draw(st.sampled_from(backend.dtypes))
    eps = data.draw(st.sampled_from([1e-6, 1e-5, 1e-2]))
    x = numerics.guarded(torch.randn(2, rows, dim, device=backend.device).to(dtype))
    if data.draw(st.booleans()):
        x = x.transpose(0, 1)
    tensors = {"x": x, "weight": torch.randn(dim, device=backend.device).to(dtype)}
    numerics.compare(
        backend.ops.rms_norm, reference.rms_norm, tensors, wanted=list(tensors), length=max(2 * rows, dim), eps=eps
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_is_rounded_before_it_is_normalised(backend: Backend, dtype: torch.dtype) -> None:
    tensors = inputs(backend, (37, 96), dtype, dtype, True)
    y, total = backend.ops.rms_norm(**tensors)
    assert numerics.bitwise_equal(total, tensors["x"] + tensors["residual"])
    assert numerics.bitwise_equal(y, backend.ops.rms_norm(total, tensors["weight"]))


def test_gradient_through_the_residual_output_alone(backend: Backend) -> None:
    x, residual = (torch.randn(5, 24, device=backend.device, requires_grad=True) for _ in range(2))
    _, total = backend.ops.rms_norm(x, residual=residual)
    up = torch.randn_like(total)
    dx, d_residual = torch.autograd.grad(total, (x, residual), up)
    assert torch.equal(dx, up) and torch.equal(d_residual, up)


@pytest.mark.backends("cpu", "reference")
def test_gradcheck(backend: Backend) -> None:
    x, residual = (torch.randn(3, 11, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: backend.ops.rms_norm(*a), (x, weight))
    assert torch.autograd.gradcheck(lambda a, w, r: backend.ops.rms_norm(a, w, residual=r), (x, weight, residual))
    assert torch.autograd.gradcheck(lambda a, r: backend.ops.rms_norm(a, residual=r), (x, residual))


@pytest.mark.backends("cpu")
def test_weight_gradient_does_not_depend_on_threads(backend: Backend) -> None:
    x = torch.randn(3001, 72).bfloat16()
    weight = torch.randn(72, requires_grad=True)
    up = torch.randn(3001, 72).bfloat16()
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            results.append(torch.autograd.grad(backend.ops.rms_norm(x, weight), weight, up)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(numerics.bitwise_equal(r, results[0]) for r in results)


def test_a_bad_row_stays_alone(backend: Backend) -> None:
    x = torch.randn(9, 40, device=backend.device)
    clean = backend.ops.rms_norm(x)
    x[4, 7] = torch.nan
    y = backend.ops.rms_norm(x)
    assert y[4].isnan().all()
    keep = torch.arange(9) != 4
    assert numerics.bitwise_equal(y[keep], clean[keep])


def test_zero_rows_and_a_zero_row(backend: Backend) -> None:
    weight = torch.randn(16, device=backend.device, requires_grad=True)
    x = torch.zeros(0, 16, device=backend.device, requires_grad=True)
    y = backend.ops.rms_norm(x, weight)
    assert y.shape == (0, 16)
    y.sum().backward()
    assert x.grad.shape == (0, 16) and torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(backend.ops.rms_norm(torch.zeros(2, 16, device=backend.device)), torch.zeros(2, 16).to(x.device))


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"weight": torch.ones(7)}, "weight"),
        ({"residual": torch.ones(2, 7)}, "residual"),
        ({"residual": torch.ones(2, 8, dtype=torch.float64)}, "residual"),
        ({"weight": torch.ones(8, dtype=torch.float16)}, "weight"),
    ],
)
def test_bad_input(backend: Backend, bad: dict[str, torch.Tensor], match: str) -> None:
    bad = {name: t.to(backend.device) for name, t in bad.items()}
    with pytest.raises((ValueError, RuntimeError), match=match):
        backend.ops.rms_norm(torch.ones(2, 8, device=backend.device), **bad)
