"""What the op modules share: the loaded library, autocast, and an honest answer to double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
    if not torch.is_autocast_enabled(device):
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
    """op(*arguments). An eager call that autograd does not record skips the autograd dispatch key, whose kernel is
    Python: that would be a third of what the call costs."""
    if recorded or torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def register_gradient(
    name: str,
    differentiable: tuple[int, ...],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Sequence[Tensor | None]],
) -> None:
    """The one backward of an op, behind eager, compile and export. `differentiable`: places of the inputs that have
    gradients; backward(ctx, *gradients) returns one gradient for each of them and ctx.needs_input_grad[1:] says
    which are wanted. It is torch.library.register_autograd without its search for default values, which costs 100
    microseconds for an op of 20 arguments (ours have no defaults)."""
    op = getattr(ops, name).default

    def below_autograd(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx: Any, call: tuple[Any, tuple[Any, ...]], *inputs: Tensor | None) -> Any:
        output = below_autograd(*call)
        setup_context(ctx, call[1], output)
        return output

    def apply_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *backward(ctx, *gradients))

    node = type(
        f"{name}_gradient",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(apply_backward)},
    )

    def kernel(keyset: Any, *arguments: Any) -> Any:
        inputs = [arguments[i] for i in differentiable]
        if needs_gradient(*inputs):
            return node.apply((keyset, arguments), *inputs)
        return below_autograd(keyset, arguments)

    _library_fragment.impl(name, kernel, "Autograd", with_keyset=True)


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
