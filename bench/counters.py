"""Counters of the CUDA kernels on the PTX emulator: what they issue and move, over what the problem needs.

    PTXSIM_CC=80 YOCO_EXT_EMULATED_LIBRARY=... python -m bench.counters [TEXT]

prints a Markdown table (docs/cuda_counters.md holds one; PTXSIM_CC=90, the default, takes the Hopper kernels). TEXT:
only cases whose name contains it. Counters, not times: the emulator knows no clock. One SM unless PTXSIM_SMS says more,
so that nothing is split as it would be to fill an idle GPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from yoco_ext import _library, ops

BF16 = torch.bfloat16


@dataclass
class Counted:
    """A call, its useful tensor-core FLOP and the bytes it must at least read and write."""

    name: str
    flops: float
    bytes: float
    run: Callable[[], object]


def size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape).to(dtype)


def attention(dim: int, time: int = 512) -> Iterator[Counted]:
    """One head, no mask: every tile is interior."""
    q, k, v, d_out = (randn(1, time, 1, dim) for _ in range(4))
    raw = torch.ops.yoco_ext
    inputs = (q, k, v, *[None] * 10, time, time, dim**-0.5, -1, -1, 0.0)
    out, lse = raw.attention(*inputs, False)
    pairs = time * time * dim
    shape = f"T {time}, D {dim}"
    yield Counted(
        f"attention forward, {shape}", 4 * pairs, size(q, k, v, out, lse), lambda: raw.attention(*inputs, False)
    )
    for name, deterministic in (("", False), (", deterministic", True)):
        yield Counted(
            f"attention backward{name}, {shape}",
            10 * pairs,
            size(q, k, v, out, lse, d_out) + size(q, k, v),
            lambda d=deterministic: raw.attention_backward(d_out, None, out, lse, *inputs, 15, d),
        )


def masked_attention(dim: int, window: int | None, time: int = 1024) -> Iterator[Counted]:
    """One head, causal, with a window of so many keys or none: useful are the products of pairs that are seen."""
    q, k, v = (randn(1, time, 1, dim) for _ in range(3))
    left = -1 if window is None else window - 1
    pairs = sum(min(i + 1, window or time) for i in range(time))
    yield Counted(
        f"attention forward, {'causal' if window is None else f'window {window}'}, T {time}, D {dim}",
        4 * pairs * dim,
        size(q, k, v, q),
        lambda: ops.attention(q, k, v, window=(left, 0)),
    )


def retention(dim: int, time: int = 2048, rotary: bool = False) -> Iterator[Counted]:
    """One head, chunks of 64: products with the state, its update, and the lower triangles."""
    q, k, v, d_o = (randn(1, time, 1, dim) for _ in range(4))
    g = torch.nn.functional.logsigmoid(torch.randn(1, time, 1)) / 16
    raw = torch.ops.yoco_ext
    flops = time * (4 * dim * dim + 65 * 2 * dim)
    inputs = (q, k, v, g, None, None, dim**-0.5)
    shape = f"T {time}, D {dim}{', rotary' if rotary else ''}"
    rotation = (0.0, torch.rand(dim // 2), None, False) if rotary else ()
    yield Counted(
        f"retention forward, {shape}",
        flops,
        4 * size(q) + size(g),
        lambda: raw.gated_retention(*inputs, False, *rotation),
    )
    yield Counted(
        f"retention backward, {shape}",
        time * (10 * dim * dim + 5 * 65 * dim),  # two states updated, three products with them; five triangles
        7 * size(q) + 2 * size(g),
        lambda: raw.gated_retention_backward(d_o, None, *inputs, *rotation),
    )


def gated(dim: int, time: int = 2048) -> Iterator[Counted]:
    """The forward that ends with the norm and the output gate: for a backward, which wants o, and without."""
    q, k, v, gate = (randn(1, time, 1, dim) for _ in range(4))
    g = torch.nn.functional.logsigmoid(torch.randn(1, time, 1)) / 16
    inputs = (q, k, v, g, None, None, dim**-0.5, False, 0.0, None, None, False, gate, 1e-5)
    for name, keep_o in (("", False), (", o kept", True)):
        yield Counted(
            f"retention forward, T {time}, D {dim}, output gate{name}",
            time * (4 * dim * dim + 65 * 2 * dim),
            (6 if keep_o else 5) * size(q) + size(g),
            lambda keep_o=keep_o: torch.ops.yoco_ext.gated_retention(*inputs, keep_o),
        )


def step(tokens: int) -> Iterator[Counted]:
    q, k, v = (randn(1, tokens, 8, 128) for _ in range(3))
    g, state = -torch.rand(1, tokens, 8), torch.zeros(1, 8, 128, 128)
    least = 2 * size(state) + 4 * size(q) + size(g)
    yield Counted(
        f"retention step, {tokens} tokens, 8 heads of 128",
        0,
        least,
        lambda: ops.gated_retention_step(q, k, v, g, state),
    )
    yield Counted(
        f"retention step, {tokens} tokens, 8 heads of 128, output gate",
        0,
        least + size(v),
        lambda: ops.gated_retention_step(q, k, v, g, state, output_gate=v),
    )


def decode(dim: int, stored: torch.dtype, tokens: int, heads: tuple[int, int], time: int) -> Iterator[Counted]:
    narrow = stored.itemsize == 1
    q = randn(1, tokens, heads[0], dim)
    k, v = (torch.randn(1, time, heads[1], dim).mul(8 if narrow else 1).to(stored) for _ in range(2))
    scale = torch.full((heads[1],), 0.125) if narrow else None
    used = torch.tensor([time], dtype=torch.int32)
    yield Counted(
        f"decode, {str(stored).removeprefix('torch.')} cache of {time}, {tokens} x {heads[0]} over {heads[1]}, D {dim}",
        4 * tokens * heads[0] * time * dim,
        size(k, v) + 2 * size(q),
        lambda: ops.attention_decode(q, k, v, seqused_k=used, k_scale=scale, v_scale=scale),
    )


def pointwise() -> Iterator[Counted]:
    raw = torch.ops.yoco_ext
    x, r, dy = (randn(1024, 2048) for _ in range(3))
    w = randn(2048)
    _, _, rstd = raw.rms_norm(x, w, None, 1e-5)
    yield Counted("rms_norm, 1024 x 2048", 0, 2 * size(x) + size(w), lambda: raw.rms_norm(x, w, None, 1e-5))
    yield Counted("rms_norm + residual", 0, 4 * size(x) + size(w), lambda: raw.rms_norm(x, w, r, 1e-5))
    yield Counted("rms_norm backward", 0, 3 * size(x) + size(w), lambda: raw.rms_norm_backward(dy, None, x, w, rstd))
    yield Counted("swiglu", 0, 3 * size(x), lambda: raw.swiglu(x, r))
    yield Counted("swiglu backward", 0, 5 * size(x), lambda: raw.swiglu_backward(dy, x, r))
    o, gate, d = (randn(1, 256, 16, 128) for _ in range(3))
    yield Counted(
        "retention_output, 256 x 16 heads of 128", 0, 3 * size(o), lambda: raw.retention_output(o, gate, 1e-5)
    )
    yield Counted("retention_output backward", 0, 5 * size(o), lambda: raw.retention_output_backward(d, o, gate, 1e-5))
    pairs, d_pairs, lam = randn(1, 256, 32, 128), randn(1, 256, 16, 128), torch.rand(1, 256, 16)
    options = (True, False, 1e-5, 0.8)  # norm, lambda as it is, eps, scale
    yield Counted(
        "differential_combine, 256 x 16 pairs of 128",
        0,
        size(pairs, d_pairs, lam),
        lambda: raw.differential_combine(pairs, lam, w[:128], *options),
    )
    yield Counted(
        "differential_combine backward",
        0,
        2 * size(pairs, lam) + size(d_pairs),
        lambda: raw.differential_combine_backward(d_pairs, pairs, lam, w[:128], *options, 3),
    )
    yield Counted("gated_memory, 1024 x 2048", 0, 3 * size(x) + size(w), lambda: raw.gated_memory(x, r, w, 1, 1e-5))
    yield Counted(
        "gated_memory backward", 0, 5 * size(x) + size(w), lambda: raw.gated_memory_backward(dy, x, r, w, 1, 1e-5)
    )
    frequencies = torch.rand(64)
    yield Counted("rotary", 0, 2 * size(o), lambda: ops.rotary(o, frequencies))
    for stored in (BF16, torch.float8_e4m3fn, torch.int8):
        caches = [torch.zeros(1, 512, 16, 128).to(stored) for _ in range(2)]
        scale = torch.full((16,), 0.05) if stored.itemsize == 1 else None
        used = torch.tensor([100], dtype=torch.int32)
        yield Counted(
            f"append_kv with rotary, {str(stored).removeprefix('torch.')}",
            0,
            2 * size(o) + 2 * o.numel() * stored.itemsize,
            lambda c=caches, s=scale, used=used: ops.append_kv(
                o, gate, *c, seqused_k=used, k_scale=s, v_scale=s, inv_freq=frequencies
            ),
        )


def cases() -> Iterator[Counted]:
    for dim in (64, 128, 256):
        yield from attention(dim)
        for window in (128, 256, 512, None):
            yield from masked_attention(dim, window)
    for dim in (64, 128, 256):
        yield from retention(dim)
    for dim in (128, 256):
        yield from retention(dim, rotary=True)
    for dim in (64, 128):
        yield from gated(dim)
    for tokens in (1, 16):
        yield from step(tokens)
    for dim, heads in ((64, (8, 4)), (128, (24, 8)), (256, (8, 4))):
        for stored in (BF16, torch.float8_e4m3fn, torch.int8) if dim == 128 else (BF16,):
            yield from decode(dim, stored, 1, heads, 4096)
    yield from decode(128, BF16, 8, (8, 1), 4096)
    yield from pointwise()


def count(case: Counted, file: Path) -> dict[str, float]:
    """Sums of the counters of all launches of one call."""
    file.write_text("")
    case.run()
    total: dict[str, float] = {}
    for line in file.read_text().splitlines():
        for key, value in json.loads(line)["stats"].items():
            if isinstance(value, (int, float)):
                total[key] = total.get(key, 0) + value
    return total


def row(case: Counted, c: dict[str, float]) -> str:
    """tensor FLOP, bytes, sectors, shared-memory wavefronts: each over its minimum."""

    def ratio(a: float, b: float, digits: int = 2) -> str:
        return f"{a / b:.{digits}f}" if b else ""

    moved = c["global_bytes_read"] + c["global_bytes_written"] + c["tma_bytes"]

    def over_minimum(*names: str, ideal: float = 0) -> str:
        return ratio(sum(c[n] for n in names) + ideal, sum(c[n + "_min"] for n in names) + ideal)

    # TMA moves whole sectors.
    sectors = over_minimum("global_load_sectors", "global_store_sectors", ideal=c["tma_bytes"] / 32)
    wavefronts = over_minimum("shared_wavefronts", "ldmatrix_wavefronts")
    tensor = ratio(c["tensor_flops"], case.flops) if c["tensor_flops"] else ""
    return f"| {case.name} | {tensor} | {ratio(moved, case.bytes, 3)} | {sectors} | {wavefronts} |"


def main(only: str = "") -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, _library.use_backend("emulated"):
        file = Path(folder) / "counters.json"
        os.environ.setdefault("PTXSIM_SMS", "1")
        print("| call | tensor FLOP | global bytes | sectors | shared-memory wavefronts |")
        print("|---|---|---|---|---|")
        for case in cases():
            if only in case.name:
                os.environ["PTXSIM_STATS"] = str(file)
                print(row(case, count(case, file)), flush=True)
                del os.environ["PTXSIM_STATS"]


if __name__ == "__main__":
    main(*sys.argv[1:2])
