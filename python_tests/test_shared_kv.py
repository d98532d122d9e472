"""SharedKV: one accumulator for the gradients of all layers, equal to autograd's own sum wherever it is used."""

from __future__ import annotations

import functools

import pytest
import torch
from numerics import ABSOLUTE, bitwise_equal, lengths_to_cu_seqlens, rms
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from yoco_ext import SharedKV, reference
from yoco_ext import ops as fused

FUSED = pytest.mark.backends("cpu", "cuda", "emulated")


def make(backend, dtype=torch.float32, batch=2, time=9, layers=3, heads=(4, 2), dims=(16, 8)):
    """K, V and one weight per layer, all leaves."""
    device = backend.device
    x = torch.randn(batch, time, heads[0], dims[0], device=device, dtype=dtype, requires_grad=True)
    k = torch.randn(batch, time, heads[1], dims[0], device=device, dtype=dtype, requires_grad=True)
    v = torch.randn(batch, time, heads[1], dims[1], device=device, dtype=dtype, requires_grad=True)
    weights = [(torch.randn(dims[1], dims[0], device=device, dtype=dtype) / 4).requires_grad_() for _ in range(layers)]
    return x, k, v, weights


def layer(attend, x: Tensor, weight: Tensor, shared) -> Tensor:
    """A cross layer in small: the output of the attention changes the next layer's queries."""
    return x + attend(x, shared) @ weight


def decoder(attend, x, shared, weights, run=lambda f, *a: f(*a)):
    for weight in weights:
        x = run(functools.partial(layer, attend), x, weight, shared)
    return x


class Separate:
    """K and V without sharing: autograd sums the layers' gradients itself."""

    def __init__(self, k, v, **options):
        self.k, self.v, self._options = k, v, options

    def options(self):
        return self._options


def separate_attention(q, shared, **options):
    return fused.attention(q, shared.k, shared.v, **{**shared.options(), **options})


def gradients(out, leaves):
    grad_out = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape)
    return torch.autograd.grad(out, leaves, grad_out)


def exact_gradients(x, k, v, weights):
    wide = [t.detach().double().requires_grad_() for t in (x, k, v, *weights)]
    out = decoder(reference.cross_attention, wide[0], Separate(*wide[1:3]), wide[3:])
    return gradients(out, wide)


def assert_close(mine, exact, dtype):
    relative = {torch.float64: 1e-13, torch.float32: 2e-5}[dtype]
    for m, e in zip(mine, exact, strict=True):
        assert rms(m.double() - e.double()) <= relative * rms(e), (rms(m.double() - e.double()), rms(e))


@FUSED
def test_equals_autograds_sum(backend):
    dtype = torch.float64 if torch.float64 in backend.dtypes else torch.float32
    x, k, v, weights = make(backend, dtype)
    leaves = [x, k, v, *weights]
    shared = gradients(decoder(fused.cross_attention, x, SharedKV(k, v), weights), leaves)
    assert_close(shared, exact_gradients(x, k, v, weights), dtype)
    separate = gradients(decoder(separate_attention, x, Separate(k, v), weights), leaves)
    assert_close(shared, separate, dtype)


@FUSED
@pytest.mark.parametrize("dims", [(16, 8), (72, 128), (256, 192)], ids=str)  # an instance of the kernels each
def test_one_rounding_at_the_end(backend, dims):
    """bfloat16, many layers: the float32 accumulator is closer to the truth than autograd's bfloat16 sum."""
    x, k, v, _ = make(backend, torch.bfloat16, time=16, dims=dims)
    x = x.detach()
    layers = 24
    grad_out = torch.randn(layers, *x.shape[:3], v.shape[3], device=x.device).to(x.dtype)

    def total(attend, shared, x, k, v):
        outs = [attend(x * (1 + i / layers), shared) for i in range(layers)]
        return torch.autograd.grad(outs, [k, v], [g.to(o.dtype) for g, o in zip(grad_out, outs)])

    mine = total(fused.cross_attention, SharedKV(k, v), x, k, v)
    summed = total(separate_attention, Separate(k, v), x, k, v)
    wide = [t.detach().double().requires_grad_() for t in (x, k, v)]
    exact = total(reference.cross_attention, Separate(*wide[1:]), *wide)
    for m, s, e in zip(mine, summed, exact):
        assert m.dtype == torch.bfloat16
        assert rms(m.double() - e) < 0.75 * rms(s.double() - e) + ABSOLUTE


@FUSED
def test_first_layer_called_gets_the_last_gradient(backend, monkeypatch):
    """There is one accumulator: every layer's backward works on the memory the one behind it worked on."""
    x, k, v, weights = make(backend)
    seen = []
    accumulate = fused.cross_attention.__globals__["ops"].attention_backward_accumulate

    class Ops:
        def __getattr__(self, name):
            return getattr(torch.ops.yoco_ext, name)

        def attention_backward_accumulate(self, *args):
            seen.append((args[-2].data_ptr(), args[-1].data_ptr()))
            return accumulate(*args)

    monkeypatch.setitem(fused.cross_attention.__globals__, "ops", Ops())
    gradients(decoder(fused.cross_attention, x, SharedKV(k, v), weights), [k, v])
    assert len(seen) == len(weights) and len(set(seen)) == 1


@FUSED
@pytest.mark.parametrize("shared_inputs", ["closure", "arguments"])
def test_non_reentrant_checkpoint(backend, shared_inputs):
    x, k, v, weights = make(backend)
    leaves = [x, k, v, *weights]
    shared = SharedKV(k, v)

    def run(f, x, weight, shared):
        if shared_inputs == "closure":
            return checkpoint(lambda x, w: f(x, w, shared), x, weight, use_reentrant=False)
        return checkpoint(f, x, weight, shared, use_reentrant=False)

    found = gradients(decoder(fused.cross_attention, x, shared, weights, run), leaves)
    assert_close(found, exact_gradients(x, k, v, weights), torch.float32)
    # The recomputation in the backward must leave the SharedKV as it was: it is used again.
    again = gradients(decoder(fused.cross_attention, x, shared, weights, run), leaves)
    assert all(bitwise_equal(a, b) for a, b in zip(found, again))


@FUSED
def test_checkpoint_around_several_layers(backend):
    x, k, v, weights = make(backend, layers=4)
    shared = SharedKV(k, v)
    out = x
    for i in (0, 2):
        out = checkpoint(
            lambda x, *w: decoder(fused.cross_attention, x, shared, w), out, *weights[i : i + 2], use_reentrant=False
        )
    assert_close(gradients(out, [x, k, v, *weights]), exact_gradients(x, k, v, weights), torch.float32)


@FUSED
def test_reentrant_checkpoint(backend):
    """The reentrant variant sees tensor arguments only, so the SharedKV goes in and comes out as tensors."""
    x, k, v, weights = make(backend)
    shared = SharedKV(k, v)

    out = x
    tensors = shared.tensors()
    for weight in weights:
        out, *tensors = checkpoint(layer_of_tensors, out, weight, *tensors, use_reentrant=True)
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape))
    found = [t.grad for t in (x, k, v, *weights)]
    assert_close(found, exact_gradients(x, k, v, weights), torch.float32)


@FUSED
def test_second_backward(backend):
    x, k, v, weights = make(backend)
    leaves = [x, k, v, *weights]
    out = decoder(fused.cross_attention, x, SharedKV(k, v), weights)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves)
    assert all(bitwise_equal(a, b) for a, b in zip(first, second))


@FUSED
def test_another_pass_over_the_same_keys(backend):
    x, k, v, weights = make(backend)
    shared = SharedKV(k, v)
    first, second = (
        gradients(decoder(fused.cross_attention, x, shared, weights), [x, k, v, *weights]) for _ in range(2)
    )
    assert all(bitwise_equal(a, b) for a, b in zip(first, second))


@FUSED
def test_several_losses(backend):
    x, k, v, _ = make(backend)
    shared, separate = SharedKV(k, v), Separate(k, v)
    losses = [fused.cross_attention(x * i, shared).sin().sum() for i in (1, 2)]
    expected = [separate_attention(x * i, separate).sin().sum() for i in (1, 2)]
    for i, (loss, other) in enumerate(zip(losses, expected)):
        found = torch.autograd.grad(loss, [x, k, v], retain_graph=i == 0)
        assert_close(found, torch.autograd.grad(other, [x, k, v]), torch.float32)


@FUSED
def test_partial_backward(backend):
    """Only the queries' gradient is asked for; then the keys', from the same graph."""
    x, k, v, weights = make(backend)
    exact = exact_gradients(x, k, v, weights)
    out = decoder(fused.cross_attention, x, SharedKV(k, v), weights)
    grad_out = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    (dx,) = torch.autograd.grad(out, [x], grad_out, retain_graph=True)
    (dv,) = torch.autograd.grad(out, [v], grad_out, retain_graph=True)
    (dk,) = torch.autograd.grad(out, [k], grad_out)
    assert_close((dx, dk, dv), exact[:3], torch.float32)


@FUSED
def test_unused_layers(backend):
    """Outputs that do not reach the loss: at the front, in the middle, at the end of the chain."""
    x, k, v, _ = make(backend)
    for used in ((1,), (0, 2), (2,), (0,)):
        shared = SharedKV(k, v)
        outs = [fused.cross_attention(x * (i + 1), shared) for i in range(3)]
        found = gradients(sum(outs[i] for i in used), [x, k, v])
        separate = Separate(k, v)
        expected = gradients(sum(separate_attention(x * (i + 1), separate) for i in used), [x, k, v])
        assert_close(found, expected, torch.float32)


@FUSED
def test_keys_used_directly_too(backend):
    x, k, v, weights = make(backend)
    out = decoder(fused.cross_attention, x, SharedKV(k, v), weights)
    found = gradients(out * k.square().sum() + v.sum(), [k, v])
    separate = decoder(separate_attention, x, Separate(k, v), weights)
    expected = gradients(separate * k.square().sum() + v.sum(), [k, v])
    assert_close(found, expected, torch.float32)


@FUSED
def test_gradient_through_lse(backend):
    x, k, v, _ = make(backend)
    shared = SharedKV(k, v)
    total = sum(o.sum() + lse.sin().sum() for o, lse in (fused.cross_attention(x, shared, return_lse=True),) * 1)
    only_lse = fused.cross_attention(x * 2, shared, return_lse=True)[1].cos().sum()
    wide = [t.detach().double().requires_grad_() for t in (x, k, v)]
    o, lse = reference.attention(*wide, return_lse=True)
    _, lse2 = reference.attention(wide[0] * 2, *wide[1:], return_lse=True)
    exact = torch.autograd.grad(o.sum() + lse.sin().sum() + lse2.cos().sum(), wide)
    assert_close(torch.autograd.grad(total + only_lse, [x, k, v]), exact, torch.float32)


@FUSED
def test_no_gradient_needs_no_chain(backend):
    x, k, v, _ = make(backend)
    with torch.no_grad():
        shared = SharedKV(k, v)
        assert shared.tokens is None
        out = fused.cross_attention(x, shared)
    assert bitwise_equal(out, fused.attention(x, k, v).detach())
    # Frozen keys: the gradient for the queries is there all the same.
    (dx,) = torch.autograd.grad(fused.cross_attention(x, SharedKV(k.detach(), v.detach())).sum(), [x])
    assert bitwise_equal(dx, torch.autograd.grad(fused.attention(x, k.detach(), v.detach()).sum(), [x])[0])
    # Inference in the middle of training does not touch the chain.
    shared = SharedKV(k, v)
    tokens = shared.tokens
    with torch.no_grad():
        fused.cross_attention(x, shared)
    assert shared.tokens is tokens


@FUSED
@pytest.mark.parametrize("frozen", ["k", "v"])
def test_one_of_the_two_is_frozen(backend, frozen):
    x, k, v, weights = make(backend)
    exact = exact_gradients(x, k, v, weights)
    k, v = (k.detach(), v) if frozen == "k" else (k, v.detach())
    out = decoder(fused.cross_attention, x, SharedKV(k, v), weights)
    if frozen == "k":
        assert_close(gradients(out, [x, v]), (exact[0], exact[2]), torch.float32)
    else:
        assert_close(gradients(out, [x, k]), exact[:2], torch.float32)


@FUSED
def test_packed_sequences_and_padding(backend):
    x, k, v, weights = make(backend, batch=1, time=17)
    cu = lengths_to_cu_seqlens([5, 0, 9], backend.device)
    used = torch.tensor([4, 0, 9], dtype=torch.int32, device=backend.device)
    out = decoder(fused.cross_attention, x, SharedKV(k, v, cu_seqlens=cu, seqused_k=used), weights)
    wide = [t.detach().double().requires_grad_() for t in (x, k, v, *weights)]
    separate = Separate(*wide[1:3], cu_seqlens_q=cu, cu_seqlens_k=cu, seqused_k=used)
    exact = decoder(reference.cross_attention, wide[0], separate, wide[3:])
    assert_close(gradients(out, [x, k, v, *weights]), gradients(exact, wide), torch.float32)
    assert_close((decoder(reference.cross_attention, wide[0], separate, wide[3:]),), (exact,), torch.float64)


@FUSED
def test_sinks_and_latents_through_the_chain(backend):
    x, k, v, _ = make(backend)
    device = backend.device
    sinks = torch.randn(4, device=device, requires_grad=True)
    latents = tuple(torch.randn(1, 3, 2, d, device=device, requires_grad=True) for d in (16, 8))
    leaves = [x, k, v, sinks, *latents]
    shared = SharedKV(k, v)
    outs = [fused.cross_attention(x * (i + 1), shared, sinks=sinks, latents=latents) for i in range(2)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = [
        reference.attention(wide[0] * (i + 1), *wide[1:3], sinks=wide[3], latents=tuple(wide[4:])) for i in range(2)
    ]
    assert_close(gradients(sum(outs), leaves), gradients(sum(exact), wide), torch.float32)


@FUSED
def test_double_backward_is_refused(backend):
    x, k, v, weights = make(backend)
    out = decoder(fused.cross_attention, x, SharedKV(k, v), weights)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(out.sum(), [k], create_graph=True)


def test_autocast_casts_once():
    k = torch.randn(1, 4, 1, 8, requires_grad=True)
    v = torch.randn(1, 4, 1, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        shared = SharedKV(k, v)
    assert shared.k.dtype == shared.v.dtype == torch.bfloat16 and shared.k.requires_grad


@FUSED
def test_reference_takes_a_shared_kv(backend):
    x, k, v, weights = make(backend)
    out = decoder(reference.cross_attention, x, SharedKV(k, v), weights)
    assert_close(gradients(out, [x, k, v, *weights]), exact_gradients(x, k, v, weights), torch.float32)


# ---- torch.compile -------------------------------------------------------------------------------------------------
@pytest.mark.unpoisoned
@pytest.mark.backends("cpu", "cuda", "emulated")
@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compile_everything(backend, engine):
    x, k, v, weights = make(backend)
    torch._dynamo.reset()

    @functools.partial(torch.compile, fullgraph=True, backend=engine)
    def run(x, k, v, *weights):
        return decoder(fused.cross_attention, x, SharedKV(k * 1, v * 1), weights)

    found = gradients(run(x, k, v, *weights), [x, k, v, *weights])
    assert_close(found, exact_gradients(x, k, v, weights), torch.float32)


@pytest.mark.unpoisoned
@pytest.mark.backends("cpu", "cuda", "emulated")
def test_compile_one_layer_at_a_time(backend):
    """The SharedKV is made outside, every layer is its own compiled region, one layer is not compiled at all."""
    x, k, v, weights = make(backend)
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(layer, fused.cross_attention), fullgraph=True, backend="aot_eager")
    shared = SharedKV(k, v)
    out = compiled(x, weights[0], shared)
    out = layer(fused.cross_attention, out, weights[1], shared)
    out = compiled(out, weights[2], shared)
    found = gradients(out, [x, k, v, *weights])
    assert_close(found, exact_gradients(x, k, v, weights), torch.float32)


def layer_of_tensors(x, weight, *tensors):
    """A layer that takes the SharedKV apart: what reentrant and compiled checkpoints need."""
    shared = SharedKV.from_tensors(*tensors)
    return layer(fused.cross_attention, x, weight, shared), *shared.tensors()


@pytest.mark.unpoisoned
@pytest.mark.backends("cpu", "cuda", "emulated")
@pytest.mark.parametrize("style", ["tensors", "closure"])
def test_compile_with_checkpoint(backend, style):
    x, k, v, weights = make(backend)
    torch._dynamo.reset()
    keep = functools.partial(checkpoint, use_reentrant=False)

    @functools.partial(torch.compile, fullgraph=style == "tensors", backend="aot_eager")
    def run(x, k, v, *weights):
        shared = SharedKV(k * 1, v * 1)
        if style == "closure":
            return decoder(fused.cross_attention, x, shared, weights, lambda f, *a: keep(f, *a))
        tensors = shared.tensors()
        for weight in weights:
            x, *tensors = keep(layer_of_tensors, x, weight, *tensors)
        return x

    found = gradients(run(x, k, v, *weights), [x, k, v, *weights])
    assert_close(found, exact_gradients(x, k, v, weights), torch.float32)
