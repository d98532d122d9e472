"""The error message, and the checks that several ops share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CACHE_DTYPES = (*FLOATS, torch.float8_e4m3fn, torch.int8)
MAX_HEAD_DIM = 256
MAX_STEP_TOKENS = 16


def fail(argument: str, got: Any, allowed: str) -> NoReturn:
    """The one error message of this package."""
    raise ValueError(f"{argument}: got {got}; allowed: {allowed}")


def _describe(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else repr(x)


def _shape(argument: str, x: Tensor, shape: Sequence[int], text: str) -> None:
    if tuple(x.shape) != tuple(shape):
        fail(argument, f"shape {list(x.shape)}", f"{text} = {list(shape)}")


def _rank(argument: str, x: Any, rank: int, text: str) -> None:
    if not isinstance(x, Tensor):
        fail(argument, type(x).__name__, f"a tensor {text}")
    if x.dim() != rank:
        fail(argument, f"shape {list(x.shape)}", text)


def _last_contiguous(argument: str, x: Tensor) -> None:
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        fail(argument, f"strides {list(x.stride())}", "any strides with a contiguous last dimension (stride 1)")


def _same(argument: str, x: Tensor, like: Tensor, name: str = "q") -> None:
    """Same dtype and device as the leading tensor."""
    if x.dtype != like.dtype:
        fail(f"{argument}.dtype", x.dtype, f"{like.dtype}, the dtype of {name}")
    if x.device != like.device:
        fail(f"{argument}.device", x.device, f"{like.device}, the device of {name}")


def _device(argument: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        fail(f"{argument}.device", x.device, f"{like.device}")


def _float(argument: str, x: Tensor, allowed: tuple[torch.dtype, ...] = FLOATS) -> None:
    if x.dtype not in allowed:
        fail(f"{argument}.dtype", x.dtype, ", ".join(str(d).removeprefix("torch.") for d in allowed))


def _head_dim(argument: str, dim: int) -> None:
    if dim % 8 != 0 or not 8 <= dim <= MAX_HEAD_DIM:
        fail(argument, f"head dimension {dim}", f"a multiple of 8 from 8 to {MAX_HEAD_DIM}")


def _int32(argument: str, x: Any, shape: Sequence[int], text: str, like: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.int32:
        fail(argument, _describe(x), f"an int32 tensor {text}")
    _shape(argument, x, shape, text)
    _device(argument, x, like)
    if not x.is_contiguous():
        fail(argument, f"strides {list(x.stride())}", "a contiguous tensor")


def _per_head(argument: str, x: Any, heads: int, like: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        fail(argument, _describe(x), f"a floating-point tensor [{heads}]")
    _shape(argument, x, (heads,), "[heads]")
    _device(argument, x, like)


def _number(argument: str, x: Any, allowed: str = "a number or None") -> None:
    if x is not None and isinstance(x, (Tensor, str)):
        fail(argument, _describe(x), allowed)


def cu_seqlens(argument: str, x: Any, batch: int, like: Tensor) -> int:
    """Boundaries of packed sequences; returns their number."""
    if not isinstance(x, Tensor) or x.dtype != torch.int32 or x.dim() != 1 or x.shape[0] < 1:
        fail(argument, _describe(x), "an int32 tensor [sequences + 1]")
    if batch != 1:
        fail(argument, f"packed sequences with batch {batch}", "batch 1")
    _device(argument, x, like)
    if not x.is_contiguous():
        fail(argument, f"strides {list(x.stride())}", "a contiguous tensor")
    return x.shape[0] - 1


def index_range(argument: str, x: Tensor | None, low: int, high: int) -> None:
    """Contents of an index tensor, for back ends that may look (the reference; the CPU kernels check in C++)."""
    if x is not None and x.numel() and not (low <= int(x.min()) and int(x.max()) <= high):
        fail(argument, f"values from {int(x.min())} to {int(x.max())}", f"{low} to {high}")


def boundaries(argument: str, x: Tensor, time: int) -> list[int]:
    """Contents of cu_seqlens, for back ends that may look."""
    bounds = x.tolist()
    if bounds[0] != 0 or any(a > b for a, b in itertools.pairwise(bounds)) or bounds[-1] > time:
        fail(argument, bounds, f"rising from 0 to at most {time}")
    return bounds


def _no_gradient(op: str, instead: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        fail(op, "a tensor that requires a gradient", f"torch.no_grad(): it has no backward{instead}")


def _inv_freq(inv_freq: Any, dim: int, like: Tensor) -> None:
    if not isinstance(inv_freq, Tensor) or inv_freq.dtype != torch.float32 or inv_freq.dim() != 1:
        fail("inv_freq", _describe(inv_freq), "a float32 tensor [rotary_dim / 2]")
    if not 1 <= inv_freq.shape[0] <= dim // 2:
        fail("inv_freq", f"{inv_freq.shape[0]} frequencies", f"1 to {dim // 2} (half the head dimension)")
    _device("inv_freq", inv_freq, like)
    if not inv_freq.is_contiguous():
        fail("inv_freq", f"strides {list(inv_freq.stride())}", "a contiguous tensor")


def _offsets(offsets: Tensor | int | None, sequences: int, like: Tensor) -> None:
    if isinstance(offsets, Tensor):
        _int32("offsets", offsets, (sequences,), "[sequences]", like)
    elif offsets is not None and (isinstance(offsets, (bool, float, str)) or offsets < 0):
        fail("offsets", repr(offsets), "None, an integer >= 0 or an int32 tensor [sequences]")


def _weight(weight: Tensor | None, dim: int, name: str, like: Tensor) -> None:
    """A weight [dim] in the dtype of `like`, which is called `name`, or in float32."""
    if weight is None:
        return
    _rank("weight", weight, 1, "[dim]")
    _shape("weight", weight, (dim,), "[dim]")
    if weight.dtype != like.dtype and weight.dtype != torch.float32:
        fail("weight.dtype", weight.dtype, f"{like.dtype} (the dtype of {name}) or torch.float32")
    _device("weight", weight, like)


def _eps(eps: float, argument: str = "eps") -> None:
    _number(argument, eps, "a number >= 0")
    if not 0 <= eps < math.inf:
        fail(argument, eps, "a number >= 0")
