"""rotary: every style against the reference, long positions, tables, packed sequences, the inverse, bad input."""

from __future__ import annotations

import numerics
import pytest
import torch
from conftest import Backend
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from yoco_ext import reference


def inverse_frequencies(pairs: int, device: str, base: float = 10000.0) -> Tensor:
    return base ** (-torch.arange(pairs, device=device, dtype=torch.float32) / max(pairs, 1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(8, 8), (64, 64), (64, 32), (120, 50), (128, 128), (256, 2)])
def test_values_and_gradients(backend: Backend, dim: int, rotary_dim: int, interleaved: bool) -> None:
    for dtype in backend.dtypes:
        tensors = {
            "x": torch.randn(2, 19, 3, dim, device=backend.device).to(dtype),
        }
        numerics.compare(
            backend.ops.rotary,
            reference.rotary,
            tensors,
            wanted=["x"],
            inv_freq=inverse_frequencies(rotary_dim // 2, backend.device),
            interleaved=interleaved,
            offsets=torch.tensor([0, 1000], dtype=torch.int32, device=backend.device),
        )


@given(data=st.data())
def test_random_shapes_and_strides(backend: Backend, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(backend.dtypes))
    dim = 8 * data.draw(st.integers(1, 20))
    pairs = data.draw(st.integers(1, dim // 2))
    batch, time, heads = (data.draw(st.integers(1, n)) for n in (3, 20, 5))
    x = torch.randn(batch, time, heads, dim, device=backend.device).to(dtype)
    x = data.draw(st.sampled_from([lambda t: t, numerics.guarded, numerics.bthd_from_bhtd]))(x)
    tensors, inv_freq = {"x": x}, inverse_frequencies(pairs, backend.device)
    options = {"interleaved": data.draw(st.booleans()), "offsets": data.draw(st.sampled_from([None, 0, 77, "each"]))}
    if options["offsets"] == "each":
        options["offsets"] = torch.randint(0, 5000, (batch,), dtype=torch.int32, device=backend.device)
    if data.draw(st.booleans()):  # the same positions by tables
        angles = torch.arange(6000, device=backend.device)[:, None].double() * inv_freq.double()
        table = dtype if data.draw(st.booleans()) or dtype == torch.float64 else torch.float32
        tensors |= {"cos": angles.cos().to(table), "sin": angles.sin().to(table)}
    else:
        options["inv_freq"] = inv_freq
    numerics.compare(backend.ops.rotary, reference.rotary, tensors, wanted=["x"], **options)


@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_sequences(backend: Backend, interleaved: bool) -> None:
    lengths = [0, 1, 7, 0, 12, 0]
    x = torch.randn(1, sum(lengths) + 3, 2, 32, device=backend.device)
    inv_freq = inverse_frequencies(16, backend.device)
    offsets = torch.tensor([9, 8, 0, 6, 500, 4], dtype=torch.int32, device=backend.device)
    cu_seqlens = numerics.lengths_to_cu_seqlens(lengths, backend.device)
    for dtype in backend.dtypes:
        packed = numerics.compare(
            backend.ops.rotary,
            reference.rotary,
            {"x": x.to(dtype)},
            wanted=["x"],
            inv_freq=inv_freq,
            interleaved=interleaved,
            offsets=offsets,
            cu_seqlens=cu_seqlens,
        )[0]
        assert (packed[:, sum(lengths) :] == 0).all()
        begin = 0
        for n, length in enumerate(lengths):
            alone = backend.ops.rotary(
                x[:, begin : begin + length].to(dtype),
                inv_freq,
                interleaved=interleaved,
                offsets=int(offsets[n]),
            )
            assert numerics.bitwise_equal(packed[:, begin : begin + length], alone)
            begin += length


@pytest.mark.parametrize("offset", [0, 65_537, 1_048_575, 10_000_019])
def test_long_positions(backend: Backend, offset: int) -> None:
    """A float32 angle would be wrong by 0.03 rad at position 1M: float32 results must not notice."""
    tensors = {
        "x": torch.randn(1, 5, 2, 64, device=backend.device),
        "inv_freq": inverse_frequencies(32, backend.device, base=500_000.0),
    }
    y = backend.ops.rotary(**tensors, offsets=offset)
    exact = reference.rotary(tensors["x"].double(), tensors["inv_freq"], offsets=offset)
    assert (y.double() - exact).abs().max() < 2e-6


def test_inverse_undoes_it(backend: Backend) -> None:
    """The gradient of a rotation is the rotation by the negative angle."""
    x = torch.randn(2, 11, 3, 40, device=backend.device, requires_grad=True)
    inv_freq = inverse_frequencies(12, backend.device)
    y = backend.ops.rotary(x, inv_freq, offsets=321, interleaved=True)
    (back,) = torch.autograd.grad(y, x, y.detach())
    assert (back - x).abs().max() < 2e-6


def test_relative_positions(backend: Backend) -> None:
    """Scores depend on the distance only."""
    q, k = (torch.randn(1, 1, 1, 64, device=backend.device) for _ in range(2))
    inv_freq = inverse_frequencies(32, backend.device)
    for interleaved in (False, True):
        scores = [
            (
                backend.ops.rotary(q, inv_freq, offsets=p + 13, interleaved=interleaved)
                * backend.ops.rotary(k, inv_freq, offsets=p, interleaved=interleaved)
            ).sum()
            for p in (0, 100, 123_456)
        ]
        assert max(scores) - min(scores) < 2e-5


@pytest.mark.backends("cpu", "reference")
def test_gradcheck(backend: Backend) -> None:
    x = torch.randn(2, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    inv_freq = inverse_frequencies(4, "cpu")
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(
            lambda t, style=interleaved: backend.ops.rotary(t, inv_freq, interleaved=style, offsets=3), x
        )


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({}, "inv_freq"),
        ({"inv_freq": torch.ones(9)}, "rotated|rotary|inv_freq"),
        ({"inv_freq": torch.ones(4), "cos": torch.ones(4, 4), "sin": torch.ones(4, 4)}, "inv_freq"),
        ({"cos": torch.ones(8, 4)}, "sin"),
        ({"cos": torch.ones(3, 4), "sin": torch.ones(3, 4)}, "positions"),
        ({"cos": torch.ones(8, 4), "sin": torch.ones(8, 3)}, "sin"),
        ({"inv_freq": torch.ones(4), "offsets": torch.zeros(3, dtype=torch.int32)}, "offsets"),
        ({"inv_freq": torch.ones(4), "offsets": torch.zeros(2)}, "offsets"),
        ({"inv_freq": torch.ones(4), "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "cu_seqlens|batch"),
    ],
)
def test_bad_input(backend: Backend, bad: dict[str, Tensor], match: str) -> None:
    if backend.device == "cuda" and match == "positions":
        pytest.skip("positions on the GPU are not read by the host")
    bad = {name: t.to(backend.device) for name, t in bad.items()}
    with pytest.raises((ValueError, RuntimeError), match=match):
        backend.ops.rotary(torch.ones(2, 4, 1, 16, device=backend.device), **bad)
