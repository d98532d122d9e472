"""torch.library.opcheck for every op: schema (what is mutated and aliased), autograd registration, fake
implementation, and ahead-of-time dispatch with symbolic shapes."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

pytestmark = [pytest.mark.backends("cpu", "cuda"), pytest.mark.unpoisoned]

ATTENTION_DEFAULTS = (-1, -1, 0.25, -1, 0, 0.0)  # max_seqlen_q, max_seqlen_k, scale, window, softcap


@pytest.fixture
def make(backend):
    """make(shape, ...) -> a random leaf on the device of the back end."""

    def random(*shape, dtype=torch.float32, grad=True):
        return torch.randn(shape, dtype=dtype, device=backend.device).requires_grad_(grad)

    return random


@pytest.fixture
def ints(backend):
    return lambda *values: torch.tensor(values, dtype=torch.int32, device=backend.device)


def attention_inputs(make, ints, case: str, grad: bool = True):
    """The arguments of the attention ops up to softcap."""
    q, k, v = (make(2, n, h, d, grad=grad) for n, h, d in ((5, 4, 16), (7, 2, 16), (7, 2, 8)))
    nothing = (None,) * 6
    if case == "plain":
        return (q, k, v, None, None, *nothing[:2], *nothing, *ATTENTION_DEFAULTS)
    if case == "views":
        q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(grad) for x in (q, k, v))
        return (q, k, v, None, None, *nothing[:2], *nothing, *ATTENTION_DEFAULTS)
    if case == "latents":
        sinks, slopes = make(4, grad=grad), make(4, grad=False).abs()
        latents = (make(1, 3, 2, 16, grad=grad), make(1, 3, 2, 8, grad=grad))
        rows = (ints(*[[0] * 5] * 2), ints(*[[3] * 5] * 2))
        prefix = ints(*[[1, 2, 3, 7, 0]] * 2)
        return (q, k, v, sinks, slopes, None, None, ints(7, 3), prefix, *latents, *rows, -1, -1, 0.25, -1, -1, 2.0)
    q, k, v = (x.detach().flatten(0, 1)[None].requires_grad_(grad) for x in (q, k, v))
    return (q, k, v, None, None, ints(0, 4, 4, 9), ints(0, 7, 9, 13), *nothing, 5, 7, 0.25, 3, 0, 0.0)


CASES = ["plain", "views", "latents", "packed"]
ops = torch.ops.yoco_ext


@pytest.mark.parametrize("case", CASES)
def test_attention(make, ints, case):
    opcheck(ops.attention, (*attention_inputs(make, ints, case), False))


@pytest.mark.parametrize("case", CASES)
def test_shared_attention(make, ints, case):
    inputs = list(attention_inputs(make, ints, case))
    k, v = inputs[1], inputs[2]
    inputs[1], inputs[2] = k.detach(), v.detach()
    tokens = (make(*k.shape), make(*v.shape))
    opcheck(ops.shared_attention, (*inputs, False, *tokens))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("grads", [15, 1, 2, 4, 8])
def test_attention_backward(make, ints, case, grads):
    inputs = attention_inputs(make, ints, case, grad=False)
    out, lse = ops.attention(*inputs, False)
    opcheck(ops.attention_backward, (torch.randn_like(out), None, out, lse, *inputs, grads, False))
    opcheck(ops.attention_backward, (torch.randn_like(out), torch.randn_like(lse), out, lse, *inputs, grads, True))


@pytest.mark.parametrize("case", CASES)
def test_attention_backward_accumulate(make, ints, case):
    inputs = attention_inputs(make, ints, case, grad=False)
    out, lse = ops.attention(*inputs, False)
    accumulators = (torch.randn_like(inputs[1]).contiguous(), torch.randn_like(inputs[2]).contiguous())
    for grads in (15, 2):
        opcheck(
            ops.attention_backward_accumulate,
            (torch.randn_like(out), None, out, lse, *inputs, grads, False, *accumulators),
        )


def retention_inputs(make, ints, case, grad=True):
    q, k, v, g = (make(2, 5, 3, 8, grad=grad), make(2, 5, 3, 8, grad=grad), make(2, 5, 3, 16, grad=grad), None)
    g = -torch.rand(2, 5, 3, device=q.device)
    if case == "packed":
        q, k, v, g = (x.detach().flatten(0, 1)[None].requires_grad_(grad) for x in (q, k, v, g))
        return q, k, v, g, make(3, 3, 8, 16, grad=grad), ints(0, 4, 4, 9), 0.3
    return q, k, v, g.requires_grad_(grad), make(2, 3, 8, 16, grad=grad) if case == "state" else None, None, 0.3


@pytest.mark.parametrize("case", ["plain", "state", "packed"])
@pytest.mark.parametrize("final", [True, False])
def test_gated_retention(make, ints, case, final):
    opcheck(ops.gated_retention, (*retention_inputs(make, ints, case), final))
    opcheck(ops.gated_retention, (*retention_inputs(make, ints, case), final, 16.0))  # gates as logits
    offsets = ints(0, 7, 9) if case == "packed" else ints(0, 7)
    for rotation in ((make(4, grad=False).abs(), offsets, True), (make(3, grad=False).abs(), None, False)):
        opcheck(ops.gated_retention, (*retention_inputs(make, ints, case), final, 0.0, *rotation))
    for keep_o in (True, False):
        inputs = retention_inputs(make, ints, case)
        gate = make(*inputs[2].shape)
        opcheck(ops.gated_retention, (*inputs, final, 0.0, None, None, False, gate, 1e-5, keep_o))
    opcheck(
        ops.gated_retention,
        (*(x.detach() if torch.is_tensor(x) else x for x in inputs), final, 16.0, None, None, False, gate, 1e-5, True),
    )  # only the gate has a gradient


@pytest.mark.parametrize("case", ["plain", "state", "packed"])
def test_gated_retention_backward(make, ints, case):
    inputs = retention_inputs(make, ints, case, grad=False)
    o, state, _ = ops.gated_retention(*inputs, True)
    opcheck(ops.gated_retention_backward, (torch.randn_like(o), torch.randn_like(state), *inputs))
    opcheck(ops.gated_retention_backward, (torch.randn_like(o), None, *inputs))
    opcheck(ops.gated_retention_backward, (torch.randn_like(o), torch.randn_like(state), *inputs, 16.0))
    rotation = make(4, grad=False).abs(), ints(0, 7, 9) if case == "packed" else ints(0, 7), False
    opcheck(ops.gated_retention_backward, (torch.randn_like(o), None, *inputs, 0.0, *rotation))


def test_gated_retention_step(make, ints):
    q, k, v, g, state, _, scale = retention_inputs(make, ints, "state", grad=False)
    opcheck(ops.gated_retention_step, (q, k, v, g, state, scale))
    opcheck(ops.gated_retention_step, (q, k, v, g, state, scale, 16.0))
    rotation = make(4, grad=False).abs(), ints(3, 9), True
    opcheck(ops.gated_retention_step, (q, k, v, g, state, scale, 0.0, *rotation))
    opcheck(ops.gated_retention_step, (q, k, v, g, state, scale, 0.0, *rotation, make(*v.shape, grad=False), 1e-5))


@pytest.mark.parametrize("paged", [True, False])
def test_attention_decode(make, ints, paged):
    q = make(2, 3, 4, 16, grad=False)
    shape = (6, 4) if paged else (2, 12)
    cache = (make(*shape, 2, 16, grad=False), make(*shape, 2, 8, grad=False))
    table = ints([0, 1, 2], [5, 4, 3]) if paged else None
    latents = (make(2, 3, 2, 16, grad=False), make(2, 3, 2, 8, grad=False), ints(3, 0))
    for extra in (latents, (None, None, None)):
        opcheck(
            ops.attention_decode,
            (q, *cache, ints(12, 5), table, None, None, None, None, *extra, 0.25, -1, 0, 0.0, False, 0),
        )


@pytest.mark.parametrize("paged", [True, False])
def test_append_kv(make, ints, paged):
    k, v = make(2, 3, 2, 16, grad=False), make(2, 3, 2, 8, grad=False)
    shape = (6, 4) if paged else (2, 12)
    cache = (make(*shape, 2, 16, grad=False), make(*shape, 2, 8, grad=False))
    table = ints([0, 1, 2], [5, 4, 3]) if paged else None
    inv_freq = make(8, grad=False).abs()
    opcheck(ops.append_kv, (k, v, *cache, ints(2, 9), table, None, None, None, inv_freq, True, False))


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_rms_norm(make, weight, residual):
    x = make(3, 5, 16)
    opcheck(ops.rms_norm, (x, make(16) if weight else None, make(3, 5, 16) if residual else None, 1e-5))


@pytest.mark.parametrize("weight", [True, False])
def test_rms_norm_backward(make, weight):
    x, dy = make(5, 16, grad=False), make(5, 16, grad=False)
    w = make(16, grad=False) if weight else None
    rstd = ops.rms_norm(x, w, None, 1e-5)[2]
    for d_residual in (None, make(5, 16, grad=False)):
        opcheck(ops.rms_norm_backward, (dy, d_residual, x, w, rstd))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary(make, ints, interleaved):
    x = make(2, 5, 3, 16)
    inv_freq, cos, sin = make(4, grad=False), make(9, 8, grad=False), make(9, 8, grad=False)
    opcheck(ops.rotary, (x, inv_freq, None, None, ints(3, 0), None, interleaved, False))
    opcheck(ops.rotary, (x, None, cos, sin, None, None, interleaved, True))
    packed = x.detach().flatten(0, 1)[None].requires_grad_()
    opcheck(ops.rotary, (packed, inv_freq, None, None, None, ints(0, 4, 4, 9), interleaved, False))


def test_swiglu(make):
    gate, up = make(3, 5, 16), make(3, 5, 16)
    opcheck(ops.swiglu, (gate, up))
    opcheck(ops.swiglu_backward, (gate.detach() + 1, gate.detach(), up.detach()))


def test_retention_output(make):
    o, gate = make(2, 5, 3, 16), make(2, 5, 3, 16)
    opcheck(ops.retention_output, (o, gate, 1e-5))
    opcheck(ops.retention_output_backward, (o.detach() + 1, o.detach(), gate.detach(), 1e-5))


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("sigmoid", [True, False])
def test_differential_combine(make, weight, sigmoid):
    a, lam, w = make(2, 5, 6, 16), make(2, 5, 3), make(16) if weight else None
    options = (not sigmoid, sigmoid, 1e-5, 0.3)
    opcheck(ops.differential_combine, (a, lam, w, *options))
    opcheck(ops.differential_combine, (a, make(3).expand(2, 5, 3), w, *options))
    inputs = [x if x is None else x.detach() for x in (a, lam, w)]
    for grads in (0, 1, 3):
        opcheck(ops.differential_combine_backward, (make(2, 5, 3, 16, grad=False), *inputs, *options, grads))


@pytest.mark.parametrize("weight", [True, False])
def test_gated_memory(make, weight):
    gate, memory, w = make(3, 5, 16), make(3, 5, 16), make(16) if weight else None
    opcheck(ops.gated_memory, (gate, memory, w, 2, 1e-5))
    inputs = [x if x is None else x.detach() for x in (gate, memory, w)]
    opcheck(ops.gated_memory_backward, (gate.detach() + 1, *inputs, 2, 1e-5))


@pytest.mark.backends("cpu")
def test_every_op_is_here(backend):
    """A new op without an opcheck fails this file."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("yoco_ext::")]
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    tested |= {"swiglu_backward", "retention_output_backward"}
    tested |= {"differential_combine_backward", "gated_memory_backward"}
    assert {s.name.removeprefix("yoco_ext::") for s in schemas} <= tested
    assert len(schemas) >= 20
