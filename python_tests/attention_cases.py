"""Inputs for the attention tests, and attention with its second segment as plain tensor arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numerics import compare
from torch import Tensor

from yoco_ext import reference

GRADIENTS = ("q", "k", "v", "sinks", "latent_k", "latent_v")


def attend(ops: Any) -> Callable[..., Any]:
    """ops.attention with latents flattened into two arguments, lse always returned."""

    def function(q, k, v, sinks=None, latent_k=None, latent_v=None, **options):
        latents = None if latent_k is None else (latent_k, latent_v)
        return ops.attention(q, k, v, sinks=sinks, latents=latents, return_lse=True, **options)

    return function


def tensors(
    backend: Any,
    dtype: torch.dtype,
    time: tuple[int, int],
    *,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (64, 64),
    sinks: bool = False,
    latents: int | None = None,
    shared_latents: bool = False,
    size: float = 1.0,
) -> dict[str, Tensor | None]:
    """Random q, k, v and, where asked for, sinks and latents, on the device of the back end."""

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, device=backend.device) * size).to(dtype)

    found: dict[str, Tensor | None] = {
        "q": random(batch, time[0], heads[0], dims[0]),
        "k": random(batch, time[1], heads[1], dims[0]),
        "v": random(batch, time[1], heads[1], dims[1]),
    }
    if sinks:
        found["sinks"] = torch.randn(heads[0], device=backend.device)
    if latents is not None:
        rows = 1 if shared_latents else batch
        found["latent_k"] = random(rows, latents, heads[1], dims[0])
        found["latent_v"] = random(rows, latents, heads[1], dims[1])
    return found


def check(backend: Any, inputs: dict[str, Tensor | None], **options: Any) -> tuple[Tensor, ...]:
    """Every output and every gradient obeys the rule of numerics."""
    length = inputs["k"].shape[1] + inputs["q"].shape[1]
    wanted = [name for name in GRADIENTS if inputs.get(name) is not None]
    return compare(attend(backend.ops), attend(reference), inputs, wanted=wanted, length=max(length, 16), **options)


def int32(backend: Any, *values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=backend.device)


def random_int32(backend: Any, low: int, high: int, *shape: int) -> Tensor:
    """Uniform in [low, high], both ends possible."""
    return torch.randint(low, high + 1, shape, device=backend.device).to(torch.int32)
