"""The suite: shapes once, for every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import yoco_ext

from . import peers
from .harness import OURS, Case

SIZE = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4, torch.float8_e4m3fn: 1, torch.int8: 1}


def _randn(*shape: int, dtype: torch.dtype, device: torch.device, grad: bool = False) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype).requires_grad_(grad)


def _backward(run, inputs: list[Tensor], d_out: list[Tensor]):
    """A call of the backward alone: the graph is made by the first call and kept, gradients are not accumulated. d_out:
    one for all implementations, made by the first of them."""
    outputs: list[Tensor] = []

    def backward():
        if not outputs:
            outputs.append(run(*inputs))
            if not d_out:
                d_out.append(torch.randn_like(outputs[0]))
        return torch.autograd.grad(outputs, inputs, d_out, retain_graph=True)

    return backward


def visible_pairs(time_q: int, time_k: int, left: int = -1) -> float:
    """Query-key pairs of causal attention (bottom-right) with `left` keys before the diagonal; time_q <= time_k."""
    first = time_k - time_q + 1  # keys that row 0 sees in front of and on its diagonal
    rising = time_q if left < 0 else min(max(left + 1 - first, 0), time_q)  # rows that see one more than the row before
    return rising * first + rising * (rising - 1) / 2 + (time_q - rising) * (left + 1)


def attention(
    device, dtype, time, heads, dim, *, batch=1, backward=False, time_k=None, heads_kv=None, flex=True
) -> Case:
    time_k, heads_kv = time_k or time, heads_kv or heads
    queries, keys = batch * time * heads * dim, batch * time_k * heads_kv * dim

    def make():
        q = _randn(batch, time, heads, dim, dtype=dtype, device=device, grad=backward)
        k, v = (_randn(batch, time_k, heads_kv, dim, dtype=dtype, device=device, grad=backward) for _ in range(2))
        runs = {OURS: lambda q, k, v: yoco_ext.attention(q, k, v)}
        low_gpu = device.type == "cuda" and dtype != torch.float32
        if time in (1, time_k):  # one query sees every key
            runs["sdpa"] = lambda q, k, v: peers.sdpa(q, k, v, causal=time > 1)
            if low_gpu:
                runs["sdpa cudnn"] = lambda q, k, v: peers.sdpa_cudnn(q, k, v, causal=time > 1)
        elif time * time_k <= 2**27:
            runs |= _with_mask(peers.window_mask(time, time_k, time_k, device), low_gpu)
        if low_gpu:
            if flex:
                runs["flex compiled"] = peers.flex_window(time, time_k, -1, device)
            runs |= peers.gpu_attention_peers((-1, -1), square=time == time_k)
        return runs, [q, k, v]

    pairs = visible_pairs(time, time_k) * batch * heads
    shape = f"B{batch} T{time}{'' if time == time_k else f'/{time_k}'} H{heads}/{heads_kv} D{dim} causal"
    bytes_ = 2 * (queries + keys) * SIZE[dtype]
    return _case("attention", shape, dtype, pairs * 4 * dim, bytes_, max(queries, keys), make, backward)


def _with_mask(mask: Tensor, cudnn: bool) -> dict[str, Callable]:
    """SDPA has no window and no bottom-right causality: a mask says it."""
    runs = {"sdpa with mask": lambda q, k, v: peers.sdpa(q, k, v, mask)}
    if cudnn:
        runs["sdpa cudnn with mask"] = lambda q, k, v: peers.sdpa_cudnn(q, k, v, mask)
    return runs


def window(device, dtype, time, heads, dim, left, *, batch=1, backward=False, flex=True) -> Case:
    elements = batch * time * heads * dim

    def make():
        q, k, v = (_randn(batch, time, heads, dim, dtype=dtype, device=device, grad=backward) for _ in range(3))
        runs = {OURS: lambda q, k, v: yoco_ext.sliding_window_attention(q, k, v, (left - 1, 0))}
        low_gpu = device.type == "cuda" and dtype != torch.float32
        if time <= 8192:
            runs |= _with_mask(peers.window_mask(time, time, left - 1, device), low_gpu)
        if flex and not (backward and device.type == "cpu"):  # FlexAttention has no backward on the CPU
            runs["flex compiled"] = peers.flex_window(time, time, left - 1, device)
        if low_gpu:
            runs |= peers.gpu_attention_peers((left - 1, 0))
        return runs, [q, k, v]

    flops = visible_pairs(time, time, left - 1) * batch * heads * 4 * dim
    shape = f"B{batch} T{time} H{heads} D{dim} window {left}"
    return _case("window", shape, dtype, flops, 4 * elements * SIZE[dtype], elements, make, backward)


def differential(device, dtype, time, heads, dim, *, batch=1, backward=False) -> Case:
    """Differential attention, `heads` pairs; the peers' way is four attention calls, difference and norm in torch."""
    elements = batch * time * 2 * heads * dim

    def make():
        q, k = (_randn(batch, time, 2 * heads, dim, dtype=dtype, device=device, grad=backward) for _ in range(2))
        v = _randn(batch, time, heads, 2 * dim, dtype=dtype, device=device, grad=backward)
        weight = _randn(2 * dim, dtype=dtype, device=device)
        runs = {OURS: lambda q, k, v: yoco_ext.differential_attention(q, k, v, 0.6, weight, lambda_init=0.2)}
        four = {
            "four calls of yoco_ext": yoco_ext.attention,
            "four calls of sdpa": lambda q, k, v: peers.sdpa(q, k, v, causal=True),
        }
        if device.type == "cuda" and dtype != torch.float32:
            four["four calls of sdpa cudnn"] = lambda q, k, v: peers.sdpa_cudnn(q, k, v, causal=True)
            four |= {f"four calls of {name}": run for name, run in peers.gpu_attention_peers((-1, -1)).items()}
        for name, attend in four.items():
            runs[name] = lambda q, k, v, attend=attend: peers.differential(attend, q, k, v, 0.6, weight, 0.2)
        return runs, [q, k, v]

    # Useful work: both softmaxes once, each over values of twice the dimension.
    flops = visible_pairs(time, time) * batch * heads * 12 * dim
    shape = f"B{batch} T{time} H{heads} D{dim}/{2 * dim} causal"
    return _case("differential", shape, dtype, flops, 4 * elements * SIZE[dtype], elements, make, backward)


def retention(
    device, dtype, batch, time, heads, dim, *, backward=False, reference=False, compiled=True, rotary=False, slow=True
) -> Case:
    """rotary: of q and k on load, against rotary before. slow: fla's slower forms too."""

    def make():
        q, k, v = (_randn(batch, time, heads, dim, dtype=dtype, device=device, grad=backward) for _ in range(3))
        g = torch.nn.functional.logsigmoid(torch.randn(batch, time, heads, device=device)).div(16)
        runs = {OURS: lambda q, k, v, g: yoco_ext.gated_retention(q, k, v, g)}
        inv_freq = 10_000.0 ** -torch.linspace(0, 1, dim // 2, device=device)
        if rotary:
            runs = {
                OURS: lambda q, k, v, g: yoco_ext.gated_retention(q, k, v, g, inv_freq=inv_freq),
                "rotary before": lambda q, k, v, g: yoco_ext.gated_retention(
                    yoco_ext.rotary(q, inv_freq), yoco_ext.rotary(k, inv_freq), v, g
                ),
            }
        # Its loop over chunks is unrolled: minutes of compiling beyond that.
        elif compiled and (device.type == "cpu" or time <= 4096):
            runs["chunkwise compiled"] = lambda q, k, v, g: peers.compiled_retention()(q, k, v, g)
        if device.type == "cuda" and not rotary:
            runs |= peers.gpu_retention_peers(slow=slow and time <= 16384)
        if reference:
            runs["reference"] = lambda q, k, v, g: yoco_ext.reference.gated_retention(q, k, v, g)
        return runs, [q, k, v, g.requires_grad_(backward)]

    op = "retention with rotary" if rotary else "retention"
    return _retention_case(op, dtype, batch, time, heads, dim, make, backward)


def retention_layer_end(device, dtype, batch, time, heads, dim, *, backward=False) -> Case:
    """The norm per head and the output gate in the retention, against retention_output behind it."""

    def make():
        q, k, v, gate = (_randn(batch, time, heads, dim, dtype=dtype, device=device, grad=backward) for _ in range(4))
        g = torch.nn.functional.logsigmoid(torch.randn(batch, time, heads, device=device)).div(16)
        runs = {
            OURS: lambda q, k, v, g, gate: yoco_ext.gated_retention(q, k, v, g, output_gate=gate),
            "norm and gate behind": lambda q, k, v, g, gate: yoco_ext.retention_output(
                yoco_ext.gated_retention(q, k, v, g), gate
            ),
        }
        return runs, [q, k, v, g.requires_grad_(backward), gate]

    return _retention_case("retention with output gate", dtype, batch, time, heads, dim, make, backward, tensors=5)


def _retention_case(op, dtype, batch, time, heads, dim, make, backward, tensors=4) -> Case:
    elements = batch * time * heads * dim
    chunk = 64  # useful work: state update and query, and the lower triangle of each chunk
    flops = batch * time * heads * (4 * dim * dim + (chunk + 1) * 2 * dim)
    bytes_ = tensors * elements * SIZE[dtype] + 4 * batch * time * heads
    return _case(op, f"B{batch} T{time} H{heads} D{dim}", dtype, flops, bytes_, elements, make, backward)


def _case(op, shape, dtype, flops, bytes_, largest, make, backward) -> Case:
    """make: () -> implementations called with the inputs, inputs. bytes_: the forward's inputs and output once."""

    def calls():
        runs, inputs = make()
        if not backward:
            return {name: (lambda run=run: run(*inputs)) for name, run in runs.items()}
        d_out: list[Tensor] = []
        return {name: _backward(run, inputs, d_out) for name, run in runs.items()}

    if not backward:
        return Case(f"{op} forward", shape, dtype, flops, bytes_, calls, bytes_, largest)
    # Gradients, and an output for every implementation.
    return Case(f"{op} backward", shape, dtype, 2.5 * flops, 2 * bytes_, calls, 3 * bytes_, largest)


def decode(device, dtype, batch, time_k, *, cache_dtype=None, heads=24, heads_kv=8, dim=128) -> Case:
    """One new token per sequence over the shared cache; the peer is memory bandwidth."""
    cache_dtype = cache_dtype or dtype
    elements = batch * time_k * heads_kv * dim

    def cache() -> Tensor:
        made = torch.empty(batch, time_k, heads_kv, dim, device=device, dtype=cache_dtype)
        for sequence in made:  # one after another: in dtype all of them may not fit
            sequence.copy_(torch.randn(sequence.shape, device=device, dtype=dtype).mul_(8))
        return made

    def make():
        q = _randn(batch, 1, heads, dim, dtype=dtype, device=device)
        k, v = cache(), cache()
        used = torch.full((batch,), time_k, dtype=torch.int32, device=device)
        scale = torch.full((heads_kv,), 0.125, device=device) if SIZE[cache_dtype] == 1 else None
        runs = {OURS: lambda: yoco_ext.attention_decode(q, k, v, seqused_k=used, k_scale=scale, v_scale=scale)}
        if cache_dtype == dtype:
            runs["sdpa"] = lambda: peers.sdpa(q, k, v)
            if device.type == "cuda":
                runs["sdpa cudnn"] = lambda: peers.sdpa_cudnn(q, k, v)
                for name, run in peers.gpu_decode_peers(batch, time_k, device).items():
                    runs[name] = lambda run=run: run(q, k, v)
        return runs

    shape = f"B{batch} Tk{time_k} H{heads}/{heads_kv} D{dim} {str(cache_dtype).removeprefix('torch.')} cache"
    bytes_ = 2 * elements * SIZE[cache_dtype]
    return Case("decode", shape, dtype, batch * heads * time_k * 4 * dim, bytes_, make, bytes_, elements)


def step(device, dtype, batch, heads, dim, *, gated=False) -> Case:
    """gated: the norm per head and the output gate in the step, against retention_output behind it."""

    def make():
        q, k, v, gate = (_randn(batch, 1, heads, dim, dtype=dtype, device=device) for _ in range(4))
        g = torch.full((batch, 1, heads), -0.01, device=device)
        state = torch.zeros(batch, heads, dim, dim, device=device)

        def plain() -> None:
            state.mul_(g[:, 0, :, None, None].exp()).add_(k[:, 0, :, :, None].float() * v[:, 0, :, None, :].float())
            torch.einsum("bhk,bhkv->bhv", q[:, 0].float(), state)

        runs = {OURS: lambda: yoco_ext.gated_retention_step(q, k, v, g, state), "eager": plain}
        if gated:
            return {
                OURS: lambda: yoco_ext.gated_retention_step(q, k, v, g, state, output_gate=gate),
                "norm and gate behind": lambda: yoco_ext.retention_output(
                    yoco_ext.gated_retention_step(q, k, v, g, state), gate
                ),
            }
        if device.type == "cuda":
            for name, run in peers.gpu_step_peers().items():
                runs[name] = lambda run=run: run(q, k, v, g, state)
        return runs

    elements = batch * heads * dim * dim  # of the float32 state, read and written
    op = f"retention step{' with output gate' if gated else ''}"
    return Case(op, f"B{batch} H{heads} D{dim}", dtype, 4 * elements, 8 * elements, make, 4 * elements)


def launch(device, dtype, time=256, heads=8, dim=64) -> Iterator[Case]:
    """A call so small that launching it is the time: 50 calls in a row, no synchronisation between them."""
    for case in (
        attention(device, dtype, time, heads, dim),
        retention(device, dtype, 1, time, heads, dim),
        step(device, dtype, 1, heads, dim),
    ):
        yield replace(case, op=f"launch: {case.op}", calls=50)


def cpu_suite(quick: bool) -> Iterator[Case]:
    device = torch.device("cpu")
    times = (1024, 4096) if quick else (1024, 4096, 16384)
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (64, 128):
            for time in times:
                yield attention(device, dtype, time, 8, dim)
            yield attention(device, dtype, 4096, 8, dim, backward=True)
            yield window(device, dtype, 4096, 8, dim, 512)
            yield window(device, dtype, 4096, 8, dim, 512, backward=True)
            for time in times:
                yield retention(device, dtype, 1, time, 8, dim, reference=time == 4096)
            yield retention(device, dtype, 1, 4096, 8, dim, backward=True)
            for backward in (False, True):
                yield retention(device, dtype, 1, 4096, 8, dim, backward=backward, rotary=True)
                yield retention_layer_end(device, dtype, 1, 4096, 8, dim, backward=backward)
    yield differential(device, torch.bfloat16, 4096, 4, 64)
    yield differential(device, torch.bfloat16, 4096, 4, 64, backward=True)
    for cache_dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        yield decode(device, torch.bfloat16, 1, 32768, cache_dtype=cache_dtype)
    yield decode(device, torch.bfloat16, 4, 16384)
    for gated in (False, True):
        yield step(device, torch.bfloat16, 8, 24, 128, gated=gated)
    yield from launch(device, torch.bfloat16)


def cuda_suite(quick: bool, device: torch.device = torch.device("cuda")) -> list[Case]:  # noqa: B008
    """quick: fewer lengths, and peers that compile (FlexAttention, retention in PyTorch) for a few of them only. Decode
    and steps, which have no such peers, come first: a run that is stopped has them. Tensors of 2^31 elements come last:
    a peer whose offsets have 32 bits may fault there, and that would end the run."""
    suite = _cuda_cases(quick, device, torch.bfloat16)
    return sorted(suite, key=lambda case: case.largest >= 2**31)


def _cuda_cases(quick: bool, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    tokens, hidden = 16384, 2048
    for batch in (1, 8, 64):
        for time_k in (4096, 131072) if quick else (4096, 32768, 131072, 1048576):
            for cache_dtype in (dtype, torch.float8_e4m3fn):
                yield decode(device, dtype, batch, time_k, cache_dtype=cache_dtype)
    for batch in (1, 8, 64):
        for gated in (False, True):
            yield step(device, dtype, batch, 24, 128, gated=gated)
    for dim in (64, 128, 256):
        for time in (1024, 16384) if quick else (512, 1024, 2048, 4096, 8192, 16384):
            for backward in (False, True):
                heads, batch = hidden // dim, tokens // time
                yield attention(device, dtype, time, heads, dim, batch=batch, backward=backward, flex=not quick)
    for left in (256, 1024) if quick else (256, 512, 1024, 4096):
        for dim in (64, 128) if quick else (64, 128, 256):
            for time in (16384,) if quick else (512, 1024, 2048, 4096, 8192, 16384):
                for backward in (False, True):
                    if left < time:
                        heads, batch, flex = hidden // dim, tokens // time, not quick or left == 1024
                        yield window(device, dtype, time, heads, dim, left, batch=batch, backward=backward, flex=flex)
    shapes = [
        (1, 8192, 96, 128),
        (2, 16384, 16, 128),
        (4, 2048, 16, 128),
        (4, 4096, 64, 128),
        (8, 2048, 32, 256),
        (8, 1024, 8, 64),
    ]
    for shape in shapes:
        compiled = not quick or shape is shapes[-1]
        for backward in (False, True):
            yield retention(device, dtype, *shape, backward=backward, compiled=compiled, slow=not quick)
            if not quick or shape is shapes[3]:
                yield retention(device, dtype, *shape, backward=backward, rotary=True)
                yield retention_layer_end(device, dtype, *shape, backward=backward)
    if not quick:
        for backward in (False, True):
            yield retention(device, dtype, 1, 2**20, 24, 128, backward=backward)
    for time in (1, 16, 1024):
        for time_k in (8192, 131072) if quick else (8192, 131072, 1048576):
            for backward in (False, True):
                yield attention(
                    device, dtype, time, 24, 128, time_k=time_k, heads_kv=8, backward=backward, flex=not quick
                )
    for dim in (64, 128):
        for backward in (False, True):
            yield differential(device, dtype, 8192, hidden // (2 * dim), dim, batch=2, backward=backward)
    yield from launch(device, dtype)
