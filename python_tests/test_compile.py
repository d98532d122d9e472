"""torch.compile(fullgraph=True): forward, backward and dynamic shapes equal the eager ops."""

from __future__ import annotations

import pytest
import torch
from numerics import bitwise_equal, lengths_to_cu_seqlens

from yoco_ext import ops

pytestmark = [pytest.mark.backends("cpu", "cuda"), pytest.mark.unpoisoned]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def make(backend):
    def random(*shape, dtype=torch.float32, grad=True):
        return torch.randn(shape, device=backend.device, dtype=dtype).requires_grad_(grad)

    return random


def flat(result):
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


def check(function, *inputs, engine="aot_eager", exact=True, dynamic=None):
    """Compiled and eager give the same outputs and gradients, bit for bit where nothing but our ops is in the graph."""
    compiled = torch.compile(function, fullgraph=True, backend=engine, dynamic=dynamic)
    results = []
    for f in (function, compiled):
        torch.manual_seed(0)
        leaves = [x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in inputs]
        outputs = flat(f(*leaves))
        wanted = [x for x in leaves if torch.is_tensor(x) and x.requires_grad]
        if wanted:
            outputs += torch.autograd.grad(outputs, wanted, [torch.randn_like(o) for o in outputs])
        else:
            outputs += [x for x in leaves if torch.is_tensor(x)]  # ops that write into their arguments
        results.append([x.detach() for x in outputs])
    for eager, mine in zip(*results, strict=True):
        assert eager.dtype == mine.dtype
        if exact:
            assert bitwise_equal(eager, mine)
        else:
            torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-5)
    return compiled


ENGINES = pytest.mark.parametrize("engine", ["aot_eager", "inductor"])


@ENGINES
def test_attention(make, engine):
    inputs = make(2, 9, 4, 16), make(2, 11, 2, 16), make(2, 11, 2, 8)
    check(lambda q, k, v: ops.attention(q, k, v, window=(5, 0), return_lse=True), *inputs, engine=engine)


def test_attention_with_every_option(make, backend):
    def function(q, k, v, sinks, latent_k, latent_v, used, begin):
        return ops.attention(
            q,
            k,
            v,
            sinks=sinks,
            latents=(latent_k, latent_v),
            seqused_k=used,
            latent_begin=begin,
            softcap=3.0,
            return_lse=True,
        )

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32, device=backend.device)

    check(
        function,
        make(2, 5, 4, 16),
        make(2, 7, 2, 16),
        make(2, 7, 2, 8),
        make(4),
        make(1, 3, 2, 16),
        make(1, 3, 2, 8),
        ints(7, 2),
        ints(*[[0, 1, 2, 3, 0]] * 2),
    )


def test_packed_attention(make, backend):
    cu = lengths_to_cu_seqlens([4, 0, 6], backend.device)
    check(
        lambda q, k, v, cu: ops.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu),
        *(make(1, 11, 2, 16) for _ in range(3)),
        cu,
    )


@ENGINES
def test_gated_retention(make, engine):
    def function(q, k, v, x, state):
        return ops.gated_retention(q, k, v, -x.square(), initial_state=state, return_final_state=True)

    inputs = make(2, 9, 3, 16), make(2, 9, 3, 16), make(2, 9, 3, 8), make(2, 9, 3), make(2, 3, 16, 8)
    check(function, *inputs, engine=engine, exact=False)


@ENGINES
def test_gated_retention_with_rotary(make, engine, backend):
    inv_freq = torch.rand(8, device=backend.device)

    def function(q, k, v, x, offsets):
        return ops.gated_retention(q, k, v, -x.square(), inv_freq=inv_freq, offsets=offsets, interleaved=True)

    offsets = torch.tensor([0, 70], dtype=torch.int32, device=backend.device)
    inputs = make(2, 9, 3, 16), make(2, 9, 3, 16), make(2, 9, 3, 8), make(2, 9, 3), offsets
    check(function, *inputs, engine=engine, exact=False)


@ENGINES
def test_gated_retention_with_an_output_gate(make, engine):
    def function(q, k, v, x, gate):
        return ops.gated_retention(q, k, v, -x.square(), output_gate=gate, norm_eps=1e-3)

    inputs = make(2, 9, 3, 16), make(2, 9, 3, 16), make(2, 9, 3, 8), make(2, 9, 3), make(2, 9, 3, 8)
    check(function, *inputs, engine=engine, exact=False)


@pytest.mark.parametrize("grad", [False, True])
def test_o_is_kept_only_for_a_backward(make, grad):
    """What the traced graph says: keep_o is its last argument."""
    graphs = []

    def engine(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *x: ops.gated_retention(*x[:4], output_gate=x[4]), fullgraph=True, backend=engine)
    inputs = [make(1, 5, 2, 8, grad=grad) for _ in range(3)]
    inputs += [-torch.rand_like(inputs[0][..., 0]), make(1, 5, 2, 8, grad=False)]
    compiled(*inputs)
    with torch.no_grad():
        compiled(*inputs)
    kept = [node.args[-1] for graph in graphs for node in graph.graph.nodes if "gated_retention" in str(node.target)]
    assert kept == [grad, False]


@pytest.mark.parametrize("rotary", [False, True])
def test_step_updates_the_state(make, backend, rotary):
    inv_freq = torch.rand(8, device=backend.device)
    options = {"inv_freq": inv_freq, "offsets": 5} if rotary else {"norm_eps": 1e-6}

    def function(q, k, v, g, state):
        gate = {} if rotary else {"output_gate": v}
        return ops.gated_retention_step(q, k, v, g, state, **options, **gate)

    inputs = [make(2, 3, 2, 16, grad=False) for _ in range(3)]
    check(function, *inputs, -torch.rand_like(inputs[0][..., 0]), make(2, 2, 16, 16, grad=False))


def test_append_and_decode(make, backend):
    def function(q, k, v, k_cache, v_cache, used):
        ops.append_kv(k, v, k_cache, v_cache, seqused_k=used)
        return ops.attention_decode(q, k_cache, v_cache, seqused_k=used + 2)

    shapes = (2, 2, 4, 16), (2, 2, 2, 16), (2, 2, 2, 16), (2, 9, 2, 16), (2, 9, 2, 16)
    used = torch.tensor([3, 0], dtype=torch.int32, device=backend.device)
    check(function, *(make(*s, grad=False) for s in shapes), used)


@ENGINES
def test_pointwise(make, engine):
    def function(x, weight, residual, gate):
        y, residual = ops.rms_norm(x, weight, residual=residual)
        y = ops.rotary(y.unflatten(-1, (2, 16)), inv_freq, interleaved=True, offsets=3)
        y = ops.retention_output(y, gate.unflatten(-1, (2, 16)))
        return ops.swiglu(y.flatten(2), gate), residual

    inv_freq = make(8, grad=False).abs()
    check(function, make(2, 5, 32), make(32), make(2, 5, 32), make(2, 5, 32), engine=engine, exact=False)


def test_dynamic_shapes(make):
    """One graph serves all lengths."""

    def function(q, k, v, g):
        return ops.attention(q, k, v) + ops.gated_retention(q, k, v, g)

    torch._dynamo.config.error_on_recompile = True
    try:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        for time in (5, 9, 130):
            inputs = [make(2, time, 2, 16) for _ in range(3)]
            g = -torch.rand(2, time, 2, device=inputs[0].device)
            expected = torch.autograd.grad(function(*inputs, g).sum(), inputs)
            found = torch.autograd.grad(compiled(*inputs, g).sum(), inputs)
            assert all(bitwise_equal(a, b) for a, b in zip(found, expected))
    finally:
        torch._dynamo.config.error_on_recompile = False


def test_export(make):
    """torch.export keeps the ops as they are."""

    class Model(torch.nn.Module):
        def forward(self, q, k, v, g):
            return ops.attention(q, k, v), ops.gated_retention(q, k, v, g)

    inputs = (*(make(1, 6, 2, 16, grad=False) for _ in range(3)), -torch.rand(1, 6, 2, device=make(1).device))
    program = torch.export.export(Model(), inputs)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"yoco_ext.attention.default", "yoco_ext.gated_retention.default"} <= names
    for a, b in zip(program.module()(*inputs), Model()(*inputs)):
        assert bitwise_equal(a, b)


def test_bad_input_fails_while_tracing(make):
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="head dimension 16"):
        compiled(make(1, 4, 2, 8), make(1, 4, 2, 16), make(1, 4, 2, 16))
