"""The one rule of numerics (DESIGN section 5), and tensors that sit between NaNs.

`exact` is the reference in float64. `plain` is the reference on the very tensors under test: PyTorch products in
their precision. The error of `ours` may be twice the error of `plain`, plus 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ABSOLUTE = 1e-5  # root mean square, as all errors here
FLOAT32_RELATIVE = 2e-6  # times sqrt(length)
FEW = 32  # entries: below, norms are taken over several draws
DRAWS = 12


class NormTooLarge(AssertionError):
    """The norm of an error is above the limit of the rule (values, shapes and NaNs are not the matter)."""


def rms(x: Tensor) -> float:
    """Root mean square in float64; 0 for a tensor with no elements."""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def _finite_difference(a: Tensor, exact: Tensor, name: str) -> Tensor:
    """a - exact where exact is finite; where it is not (lse of a row that sees nothing) both must be identical."""
    a = a.double()
    infinite = exact.isinf()
    assert torch.equal(a[infinite], exact[infinite]), f"{name}: {int(infinite.sum())} infinite entries differ"
    difference = torch.where(infinite, torch.zeros_like(exact), a - torch.where(infinite, 0.0, exact))
    bad = difference.isnan()
    assert not bad.any(), f"{name}: {int(bad.sum())} of {bad.numel()} entries are NaN"
    return difference


def assert_rule(name: str, ours: Tensor, exact: Tensor, plain: Tensor, *, length: int = 1) -> None:
    """Fails unless `ours` obeys the rule of its dtype. `length`: terms in the longest sum, used in float32 only."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    dtype, exact = ours.dtype, exact.double().to(ours.device)
    ours_error = _finite_difference(ours, exact, name)
    plain_error = _finite_difference(plain.to(ours.device), exact, f"{name} (plain PyTorch)")
    size = rms(torch.where(exact.isinf(), 0.0, exact))
    # The rule says 2x. Over n entries a norm of rounding errors fluctuates by 1 / sqrt(2n), the ratio of two by
    # 1 / sqrt(n). Three standard deviations; 3 % at 10,000 entries.
    factor = 2 * (1 + 3 / math.sqrt(max(ours.numel(), FEW)))
    plain_size = rms(plain_error)
    if ours.numel() < FEW and dtype in (torch.bfloat16, torch.float16):
        # A few roundings of plain PyTorch may all be lucky; what rounding the exact result costs on average is no luck.
        plain_size = max(plain_size, 0.2 * torch.finfo(dtype).eps * size)
    limit = factor * plain_size + ABSOLUTE
    if dtype == torch.float64:
        limit = 1e-11 * math.sqrt(max(length, 1)) * max(size, 1e-3)
    elif dtype == torch.float32 and plain.dtype == torch.float32:
        # A sum that cancels has no meaningful relative error; plain float32 PyTorch shows what is possible there.
        relative = FLOAT32_RELATIVE * math.sqrt(max(length, 1)) * size
        limit = max(relative, factor * plain_size) + 1e-7
    error = rms(ours_error)
    if error > limit:
        raise NormTooLarge(
            f"{name} ({dtype}): error {error:.3e}, allowed {limit:.3e}, plain PyTorch {rms(plain_error):.3e}, "
            f"size {size:.3e}"
        )
    # The norm of a large tensor hides one wrong row, so no single entry may stand out either.
    if ours.numel():
        worst, plain_worst = ours_error.abs().max().item(), plain_error.abs().max().item()
        peak = torch.where(exact.isinf(), 0.0, exact).abs().max().item()
        ulp = torch.finfo(dtype).eps * peak
        allowed = 4 * plain_worst + 2 * ulp + 10 * limit
        index = tuple(int(i) for i in torch.unravel_index(ours_error.abs().argmax(), ours.shape))
        assert worst <= allowed, f"{name} ({dtype}): error {worst:.3e} at {index}, allowed {allowed:.3e}"


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def run_with_gradients(
    function: Callable[..., Any],
    tensors: Mapping[str, Tensor | None],
    options: Mapping[str, Any],
    upstream: Sequence[Tensor | None] | Callable[[tuple[Tensor, ...]], Sequence[Tensor | None]] | None,
    wanted: Iterable[str],
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs of function(**tensors, **options), and the gradients of `wanted` under the `upstream` gradients (or what
    that makes of the outputs)."""
    wanted = list(wanted)
    leaves = {
        name: t.detach().requires_grad_() if t is not None and name in wanted else t for name, t in tensors.items()
    }
    outputs = _as_tuple(function(**leaves, **options))
    if not wanted or upstream is None:
        return outputs, {}
    upstream = upstream(outputs) if callable(upstream) else upstream
    pairs = [(o, u.to(o.dtype)) for o, u in zip(outputs, upstream, strict=True) if u is not None and o.requires_grad]
    inputs = [leaves[name] for name in wanted]
    gradients = torch.autograd.grad([o for o, _ in pairs], inputs, [u for _, u in pairs], allow_unused=True)
    found = {name: g for name, g in zip(wanted, gradients, strict=True) if g is not None}
    return outputs, found


def compare(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: Mapping[str, Tensor | None],
    *,
    wanted: Iterable[str] = (),
    length: int = 1,
    upstream: Iterable[Tensor | None] | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Runs ours(**tensors, **options), the reference in float64 and the reference in the same precision; checks every
    output and the gradient of every name in `wanted` by the rule. Random upstream gradients unless given (None in the
    sequence: that output gets no gradient). `length`: terms in the longest sum. Returns our outputs."""
    wanted = list(wanted)
    wide = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
    dtype = next(t.dtype for t in tensors.values() if t is not None and t.is_floating_point())
    chosen = None if upstream is None else list(upstream)

    def choose(outputs: tuple[Tensor, ...]) -> list[Tensor | None]:
        nonlocal chosen
        if chosen is None:
            chosen = [torch.randn_like(o).to(dtype) for o in outputs]
        return chosen

    exact, exact_gradients = run_with_gradients(reference, wide, options, choose, wanted)
    plain, plain_gradients = run_with_gradients(reference, tensors, options, choose, wanted)
    mine, my_gradients = run_with_gradients(ours, tensors, options, choose, wanted)
    assert len(mine) == len(exact), f"{len(mine)} outputs, expected {len(exact)}"
    for i, (m, e, p) in enumerate(zip(mine, exact, plain, strict=True)):
        assert m.dtype == p.dtype, f"output {i}: {m.dtype}, expected {p.dtype}"
        assert_rule(f"output {i}", m.detach(), e.detach(), p.detach(), length=length)
    again: list[str] = []
    for name in my_gradients.keys() | exact_gradients.keys():
        tensor = tensors[name]
        assert tensor is not None
        gradient, exact_gradient, plain_gradient = (
            _gradient(g, name, tensor) for g in (my_gradients, exact_gradients, plain_gradients)
        )
        assert gradient.dtype == tensor.dtype
        few = 0 < gradient.numel() < FEW and dtype in (torch.bfloat16, torch.float16)
        try:
            if not few or upstream is not None:
                assert_rule(f"d{name}", gradient, exact_gradient, plain_gradient, length=length)
                continue
        except NormTooLarge:
            if upstream is not None:
                raise
        again.append(name)
    if again:
        draws = [(my_gradients, exact_gradients, plain_gradients)]
        for _ in range(DRAWS - 1):
            chosen = None
            runs = ((ours, tensors), (reference, wide), (reference, tensors))
            draws.append(tuple(run_with_gradients(f, inputs, options, choose, wanted)[1] for f, inputs in runs))
        _assert_over_draws(draws, again, tensors, length)
    return mine


def _gradient(gradients: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """No gradient at all is a zero gradient (v, when only lse is differentiated)."""
    return gradients[name] if name in gradients else torch.zeros_like(like)


def _assert_over_draws(
    draws: Sequence[Sequence[Mapping[str, Tensor]]],
    names: Iterable[str],
    tensors: Mapping[str, Tensor | None],
    length: int,
) -> None:
    """The rule for gradients whose error has few degrees of freedom: a handful of entries (two sinks), or many that
    share one (the gradient of a log decay sums over all later tokens, so one rounding moves a whole sequence of
    them). In one draw of a hundred plain PyTorch is ten times better there by luck, and as often ten times worse, so
    the ratio of two such errors has no useful bound. The ratio of their norms over several upstream gradients has one;
    the draw that asked for this is among them, so that what is wrong once, and large, is not forgiven."""
    for name in names:
        like = tensors[name]
        assert like is not None
        mine, exact, plain = (torch.stack([_gradient(draw[i], name, like) for draw in draws]) for i in range(3))
        assert_rule(f"d{name}", mine, exact, plain, length=length)


def guarded(x: Tensor, *, pad: int = 8) -> Tensor:
    """The same values as a view inside a larger buffer of NaN: rows before and after, heads beside, columns behind.
    A kernel that reads what it should not shows NaN; the strides are not those of a contiguous tensor. The last
    dimension is padded by `pad` columns (8 keeps 16-byte rows for two-byte types)."""
    shape = [n + 2 for n in x.shape[:-1]] + [x.shape[-1] + pad]
    buffer = torch.full(shape, math.nan, dtype=x.dtype, device=x.device)
    view = buffer[(*(slice(1, -1) for _ in x.shape[:-1]), slice(0, x.shape[-1]))]
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad) if x.is_leaf else view


def bthd_from_bhtd(x: Tensor) -> Tensor:
    """The same values as a transposed view of a [B, H, T, D] tensor."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit (NaN equals the same NaN, -0 differs from 0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def lengths_to_cu_seqlens(lengths: Iterable[int], device: str | torch.device = "cpu") -> Tensor:
    """int32 [N + 1] with the boundaries of packed sequences."""
    total = [0]
    for n in lengths:
        total.append(total[-1] + n)
    return torch.tensor(total, dtype=torch.int32, device=device)
