"""What the op modules share: the loaded library, autocast, and an honest answer to double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from yoco_ext import _library

_library.load()

NAMESPACE = "yoco_ext"
ops = torch.ops.yoco_ext
_library_fragment = torch.library.Library(NAMESPACE, "IMPL")  # lives as long as the registrations


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, what scaled_dot_product_attention does: float tensors (not float64) go to the autocast dtype."""
    if not isinstance(tensors[0], Tensor):
        return tensors  # the checks will say so
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 and x.dtype != dtype else x for x in tensors
    )


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """dtype of states, log-sum-exps and gradient accumulators that belong to x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def needs_gradient(*inputs: Any) -> bool:
    """Whether a call with these differentiable inputs (tensors or None) must be recorded by autograd."""
    if torch.is_grad_enabled():
        for x in inputs:
            if x is not None and x.requires_grad:
                return True
    return False


def call(op: Any, recorded: bool, *arguments: Any) -> Any:
    """op(*arguments), `recorded` by autograd or not. The autograd kernels are Python, so an eager call goes straight
    to what would run: through the dispatcher and back costs as much again as the call itself."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return op(*arguments)
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, arguments)
    if recorded:
        return _recorders[op](arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _refuse_tangents(op: Any, arguments: Sequence[Any]) -> None:
    """Forward-mode differentiation, which the ops would answer with no tangent: a silent zero."""
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments):
        _refuse_mode(op, "forward-mode differentiation (torch.func.jvp, forward_ad)")


def _refuse_mode(op: Any, what: str) -> NoReturn:
    raise RuntimeError(
        f"{op.name()}: {what} is not supported: gradients come from backward() and torch.autograd.grad; "
        "yoco_ext.reference is plain PyTorch and has the others"
    )


_recorders: dict[Any, Callable[[tuple[Any, ...]], Any]] = {}


def register_gradient(
    name: str,
    differentiable: tuple[int, ...],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Sequence[Tensor | None]],
) -> None:
    """The one backward of an op, behind eager, compile and export. `differentiable`: places of the inputs that have
    gradients; backward(ctx, *gradients) returns one gradient for each of them and ctx.needs_input_grad[1:] says
    which are wanted. It is torch.library.register_autograd without its search for default values, which costs 100
    microseconds for an op of 20 arguments."""
    op = getattr(ops, name).default

    def forward(ctx: Any, arguments: tuple[Any, ...], *inputs: Tensor | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*arguments)
        setup_context(ctx, arguments, output)
        return output

    def apply_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *backward(ctx, *gradients))

    node = type(
        f"{name}_gradient",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(apply_backward)},
    )

    # Function.apply looks for functorch first, which `call` has done; below it lies the function that does the work.
    apply = super(torch.autograd.Function, node).apply

    def record(arguments: tuple[Any, ...]) -> Any:
        return apply(arguments, *[arguments[i] for i in differentiable])

    def kernel(*arguments: Any) -> Any:
        inputs = [arguments[i] if i < len(arguments) else None for i in differentiable]  # None: left at its default
        if not torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:
                _refuse_tangents(op, inputs)
            if needs_gradient(*inputs) and torch._C._are_functorch_transforms_active():
                _refuse_mode(op, "a gradient inside torch.func.grad, vjp, jacrev or vmap")
        if needs_gradient(*inputs):
            return node.apply(arguments, *inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    _recorders[op] = record
    _library_fragment.impl(name, kernel, "Autograd")


def no_second_derivative(**differentiable: int) -> None:
    """The backward ops (name = number of leading tensor arguments) have no backward of their own: differentiating
    them says so instead of giving zeros."""
    for name, count in differentiable.items():

        def backward(ctx: Any, *gradients: Any, name: str = name) -> Any:
            raise RuntimeError(
                f"yoco_ext::{name} is not differentiable: yoco_ext has first derivatives only (double backward, e.g. "
                "through create_graph=True, works with yoco_ext.reference)"
            )

        register_gradient(name, tuple(range(count)), lambda ctx, inputs, output: None, backward)
