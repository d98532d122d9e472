"""The rule that judges all the others: what is wrong is found, and luck in a few entries is not."""

from __future__ import annotations

import pytest
import torch
from numerics import NormTooLarge, assert_rule, compare
from torch import Tensor


class Scaled(torch.autograd.Function):
    """x * w summed over rows; the gradient of w is off by a relative `error`, in the calls that `wrong` names."""

    calls = 0

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, error: float, wrong: range) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.error = error if Scaled.calls in wrong else 0.0
        Scaled.calls += 1
        return x * w

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        d_w = (dy.float() * x.float()).sum(0)
        return dy * w, (d_w + ctx.error * d_w.abs().mean()).to(w.dtype), None, None


def judge(entries: int, error: float, wrong: range) -> None:
    Scaled.calls = 0
    compare(
        lambda x, w: Scaled.apply(x, w, error, wrong),
        lambda x, w: x * w,
        {"x": torch.randn(500, entries).bfloat16(), "w": torch.randn(entries).bfloat16()},
        wanted=["x", "w"],
    )


@pytest.mark.parametrize("entries", [2, 40, 1000])
def test_gradients(entries: int) -> None:
    judge(entries, 0.0, range(0))
    with pytest.raises(AssertionError, match="dw"):
        judge(entries, 0.05, range(1000))  # always off by 25 roundings
    with pytest.raises(AssertionError, match="dw"):
        judge(entries, 1.0, range(1))  # wrong in the first call alone, as a race would be


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_entry(bad: float) -> None:
    exact = torch.randn(10000, dtype=torch.float64)
    ours = exact.bfloat16()
    assert_rule("y", ours, exact, ours)
    ours = ours.clone()
    ours[17] = bad
    with pytest.raises(AssertionError, match="y"):
        assert_rule("y", ours, exact, exact.bfloat16())


def test_a_row_hidden_in_a_norm() -> None:
    exact = torch.randn(100000, 16, dtype=torch.float64)
    ours = exact.bfloat16()
    ours[5] += 0.3
    with pytest.raises(AssertionError, match=r"at \(5,"):
        assert_rule("y", ours, exact, exact.bfloat16())


def test_three_times_the_error_is_too_much() -> None:
    exact = torch.randn(100, 100, dtype=torch.float64)
    plain = exact.bfloat16()
    ours = exact + 3 * (plain.double() - exact)
    with pytest.raises(NormTooLarge):
        assert_rule("y", ours.float(), exact, plain)
    assert_rule("y", (exact + 1.9 * (plain.double() - exact)).float(), exact, plain)
