"""The CPU ops give the same bits with any number of threads. Attention, decode, retention and rms_norm have this test
in their own files; here are the ops that go over rows or elements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Backend
from numerics import bitwise_equal
from torch import Tensor

pytestmark = pytest.mark.backends("cpu")

ROWS = (3, 517, 4, 64)  # large enough that every op cuts it into several pieces


def append(ops, k: Tensor, v: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """The caches that append_kv leaves; as a function, so that it is run like the others."""
    caches = torch.zeros(3, 600, 4, 64, dtype=k.dtype), torch.zeros(3, 600, 4, 64, dtype=k.dtype)
    used = torch.tensor([0, 83, 7], dtype=torch.int32)
    ops.append_kv(k.detach(), v.detach(), *caches, seqused_k=used, inv_freq=torch.rand(16))
    return caches


CASES: dict[str, Callable] = {
    "append_kv": append,
    "rotary": lambda ops, x, y, w: ops.rotary(x, inv_freq=torch.linspace(1, 1e-4, 32)),
    "swiglu": lambda ops, x, y, w: ops.swiglu(x, y),
    "retention_output": lambda ops, x, y, w: ops.retention_output(x, y),
    "differential_combine": lambda ops, x, y, w: ops.differential_combine(x, y[..., :2, 0].float(), w),
    "gated_memory": lambda ops, x, y, w: ops.gated_memory(x, y, w, normalize=True),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", CASES)
def test_same_bits(backend: Backend, op: str, dtype: torch.dtype) -> None:
    inputs = [torch.randn(shape).to(dtype) for shape in (ROWS, ROWS, ROWS[-1:])]
    upstream: list[Tensor] = []

    def everything() -> list[Tensor]:
        torch.manual_seed(0)  # tables drawn inside a case
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = CASES[op](backend.ops, *leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if not outputs[0].requires_grad:
            return outputs
        upstream.extend(torch.randn_like(outputs[0]) for _ in range(not upstream))  # the same in every run
        gradients = torch.autograd.grad(outputs[0], leaves, upstream[0], allow_unused=True)
        return [*outputs, *(d for d in gradients if d is not None)]

    threads, first = torch.get_num_threads(), everything()
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            again = everything()
            assert len(again) == len(first)
            for i, (a, b) in enumerate(zip(first, again, strict=True)):
                assert bitwise_equal(a, b), f"tensor {i} with {n} threads"
    finally:
        torch.set_num_threads(threads)
