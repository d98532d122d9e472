"""torch.func and forward mode: what the fused ops do not have is refused in words, never answered with zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import yoco_ext
from yoco_ext import reference

CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "attention": lambda ops, x: ops.attention(x, x, x),
    "gated_retention": lambda ops, x: ops.gated_retention(x, x, x, -torch.ones(x.shape[:3])),
    "retention_output": lambda ops, x: ops.retention_output(x, x),
    "rms_norm": lambda ops, x: ops.rms_norm(x, None),
    "rotary": lambda ops, x: ops.rotary(x, torch.ones(4)),
    "swiglu": lambda ops, x: ops.swiglu(x, x),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused(name: str) -> None:
    """It was answered with a tangent of zero."""
    x = torch.randn(2, 5, 2, 16)
    call = CALLS[name]
    with pytest.raises(RuntimeError, match=f"yoco_ext::{name}: forward-mode .* yoco_ext.reference"):
        torch.func.jvp(lambda x: call(yoco_ext, x), (x,), (x,))
    for leaf in (x.clone(), x.clone().requires_grad_()):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
            call(yoco_ext, forward_ad.make_dual(leaf, x))
    with forward_ad.dual_level():  # nothing to differentiate
        torch.testing.assert_close(call(yoco_ext, x), call(reference, x), atol=1e-4, rtol=1e-4)
    assert torch.func.jvp(lambda x: call(reference, x), (x,), (x,))[1].abs().max() > 0


@pytest.mark.parametrize("name", CALLS)
def test_functional_gradients_are_refused(name: str) -> None:
    x = torch.randn(2, 5, 2, 16)
    call = CALLS[name]
    for function in (
        torch.func.grad(lambda x: call(yoco_ext, x).sum()),
        torch.func.jacrev(lambda x: call(yoco_ext, x).sum()),
        torch.vmap(torch.func.grad(lambda x: call(yoco_ext, x[None]).sum())),
    ):
        with pytest.raises(RuntimeError, match=f"yoco_ext::{name}: a gradient inside torch.func"):
            function(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop() -> None:
    x = torch.randn(3, 2, 5, 2, 16)
    found = torch.vmap(lambda x: yoco_ext.attention(x, x, x))(x)
    torch.testing.assert_close(found, torch.stack([yoco_ext.attention(y, y, y) for y in x]))


@pytest.mark.parametrize("name", CALLS)
def test_shapes_on_the_meta_device(name: str) -> None:
    x = torch.randn(2, 5, 2, 16)
    with torch.device("meta"):
        found = CALLS[name](yoco_ext, x.to("meta"))
    assert found.is_meta and found.shape == CALLS[name](yoco_ext, x).shape


@pytest.mark.parametrize("ops", [yoco_ext, reference])
def test_cross_attention_wants_a_shared_kv(ops: Any) -> None:
    q = torch.randn(1, 3, 2, 16)
    with pytest.raises(ValueError, match=r"shared_kv: got tuple; allowed: a SharedKV\(k, v\)"):
        ops.cross_attention(q, (q, q))


def test_layers_check_their_heads() -> None:
    for make in (
        lambda: yoco_ext.nn.GatedRetention(100, 3),
        lambda: yoco_ext.nn.SlidingWindowAttention(96, 2, 16, num_kv_heads=3),
        lambda: yoco_ext.nn.SlidingWindowAttention(36, 3, 16),
        lambda: yoco_ext.nn.CrossAttention(1024, 2),
    ):
        with pytest.raises(ValueError, match="num_heads"):
            make()
