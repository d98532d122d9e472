"""CUDA graphs: a captured call runs again on other contents of its inputs, lengths included, and gives the bits of an
eager call. It does so only if no op waits for the GPU, reads lengths on the host or leaves a counter behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import bitwise_equal
from torch import Tensor

from yoco_ext import ops

pytestmark = [pytest.mark.backends("cuda"), pytest.mark.unpoisoned]

Call = Callable[[], Any]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def check(call: Call, inputs: list[Tensor], change: Call = lambda: None) -> None:
    """call() works on `inputs` and may write into them; `change` makes other lengths."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is loaded or compiled at the first call
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flat(call())
    for _ in range(2):
        with torch.no_grad():
            for x in inputs:
                x.copy_(torch.randn_like(x))
        change()
        before = [x.detach().clone() for x in inputs]
        graph.replay()
        found = [x.detach().clone() for x in (*captured, *inputs)]
        with torch.no_grad():
            for x, old in zip(inputs, before, strict=True):
                x.copy_(old)
        expected = [x.detach() for x in (*flat(call()), *inputs)]
        assert all(bitwise_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("times", [(1500, 1500), (3, 5000)], ids=["more tiles than SMs", "split keys"])
def test_attention(backend: Any, times: tuple[int, int], dim: int) -> None:
    q, k, v = randn(2, times[0], 16, dim), randn(2, times[1], 4, dim), randn(2, times[1], 4, dim)
    used = ints(times[1], times[1] - 7)
    check(lambda: ops.attention(q, k, v, seqused_k=used, return_lse=True), [q, k, v], lambda: used.sub_(ints(40, 1)))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_attention_backward(backend: Any, dim: int) -> None:
    q, k, v = (randn(1, 300, h, dim).requires_grad_() for h in (4, 2, 2))
    up = randn(1, 300, 4, dim)
    bounds = ints(0, 100, 300)

    def call() -> tuple[Tensor, ...]:
        out = ops.attention(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, deterministic=True)
        return torch.autograd.grad(out, (q, k, v), up)

    check(call, [q, k, v, up], lambda: bounds[1].add_(33))


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize("heads", [(4, 4), (24, 8), (64, 1)])
def test_decode_with_a_growing_cache(backend: Any, heads: tuple[int, int], cache_dtype: torch.dtype | None) -> None:
    """One step as in generation: append, then attend to what is there now."""
    q, k, v = randn(2, 1, heads[0], 128), randn(2, 1, heads[1], 128), randn(2, 1, heads[1], 128)
    caches = [randn(2, 4000, heads[1], 128).to(cache_dtype or torch.bfloat16) for _ in "kv"]
    used, scale = ints(2500, 10), torch.full((heads[1],), 0.03, device="cuda") if cache_dtype else None

    def call() -> tuple[Tensor, ...]:
        ops.append_kv(k, v, *caches, seqused_k=used, k_scale=scale, v_scale=scale)
        return ops.attention_decode(q, *caches, seqused_k=used + 1, k_scale=scale, v_scale=scale, return_lse=True)

    check(call, [q, k, v], lambda: used.add_(ints(700, 1)))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gated_retention(backend: Any, dim: int) -> None:
    """Packed, long enough for segments; forward and backward."""
    q, k, v = (randn(1, 3000, 2, dim).requires_grad_() for _ in range(3))
    g = randn(1, 3000, 2, dtype=torch.float32).requires_grad_()
    up, bounds = randn(1, 3000, 2, dim), ints(0, 300, 2900)

    def call() -> tuple[Tensor, ...]:
        o = ops.gated_retention(q, k, v, g, cu_seqlens=bounds, gate_logit_normalizer=16.0)
        return (o.detach(), *torch.autograd.grad(o, (q, k, v, g), up))

    check(call, [q, k, v, g, up], lambda: bounds[1].add_(111))


def test_a_step_updates_its_state(backend: Any) -> None:
    q, k, v, g = randn(2, 1, 4, 128), randn(2, 1, 4, 128), randn(2, 1, 4, 128), randn(2, 1, 4, dtype=torch.float32)
    state = randn(2, 4, 128, 128, dtype=torch.float32)
    check(lambda: ops.gated_retention_step(q, k, v, g, state, gate_logit_normalizer=16.0), [q, k, v, g, state])


def test_pointwise(backend: Any) -> None:
    x, gate, weight = (randn(*shape).requires_grad_() for shape in ((70, 512), (70, 512), (512,)))

    def call() -> tuple[Tensor, ...]:
        y = ops.swiglu(gate, ops.rms_norm(x, weight))
        return (y.detach(), *torch.autograd.grad(y.sum(), (x, gate, weight)))

    check(call, [x, gate, weight])
