"""What the op modules share: the loaded library, autocast, and an honest answer to double backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yoco_ext import _library

_library.load()

NAMESPACE = "yoco_ext"
ops = torch.ops.yoco_ext


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, what scaled_dot_product_attention does: float tensors (not float64) go to the autocast dtype."""
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


def no_second_derivative(*names: str) -> None:
    """The backward ops have no backward of their own: differentiating them says so instead of giving zeros."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.count = len(inputs)

    for name in names:

        def backward(ctx: Any, *gradients: Any, name: str = name) -> Any:
            raise RuntimeError(
                f"yoco_ext::{name} is not differentiable: yoco_ext has first derivatives only (double backward, e.g. "
                "through create_graph=True, works with yoco_ext.reference)"
            )

        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)
