"""What only the CUDA kernels of gated retention have: segments, anchors of the gate gradient, rows that are not 16-byte
aligned, asynchronous copies. The rule of numerics for everything else: test_gated_retention*.py."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import bitwise_equal, guarded, lengths_to_cu_seqlens, rms
from test_gated_retention import check, make, run
from test_retention_output_fused import check as check_gated
from test_retention_output_fused import make_gated
from test_retention_output_fused import run as run_gated

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCE = """
#include "cuda/retention/plan.h"
using namespace yoco::cuda;
using yoco::KeyRange;
extern "C" {
long long segments(long long items, long long time, long long sms) { return retention_segments(items, time, sms); }
long long segments_of_sequence(long long chunks, long long most) { return segments_of(chunks, most); }
void chunks(long long chunks, long long segments, long long s, long long* out) {
  const KeyRange r = segment_chunks(chunks, segments, s);
  out[0] = r.begin, out[1] = r.end;
}
long long anchor(long long group, long long size, long long chunks) { return anchor_of(group, size, chunks); }
long long slot(long long n, long long begin, long long time, long long size, int packed) {
  return group_slot(n, begin, time, size, packed != 0);
}
long long instance(long long dim_k, long long dim_v, long long rows, long long sms) {
  const RetentionInstance i = retention_instance(dim_k, dim_v, rows, sms);
  return i.dim_k * 1000 + i.block_v;
}
int fuses(int dim_k, int block_v, long long dim_v) { return norm_fuses({dim_k, block_v}, dim_v); }
}
"""


# ---- plan.h, on the host -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(SOURCE)
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{CSRC}", "plan.cpp", "-o", "plan.so"]
    subprocess.run(command, check=True, cwd=folder)
    library = ctypes.CDLL(str(folder / "plan.so"))
    integer = ctypes.c_longlong
    for name, count in (("segments", 3), ("segments_of_sequence", 2), ("anchor", 3), ("slot", 4), ("instance", 4)):
        getattr(library, name).restype = integer
        getattr(library, name).argtypes = [integer] * count + ([ctypes.c_int] if name == "slot" else [])
    library.fuses.argtypes = [ctypes.c_int, ctypes.c_int, integer]
    library.chunks.restype = None
    library.chunks.argtypes = [integer] * 3 + [ctypes.POINTER(integer)]
    return library


@given(items=st.integers(1, 4096), time=st.integers(0, 1 << 21), sms=st.integers(1, 200))
def test_segments_fill_the_gpu_once_and_are_worth_a_pass(plan: ctypes.CDLL, items: int, time: int, sms: int) -> None:
    segments = plan.segments(items, time, sms)
    chunks = -(-time // 64)
    assert segments >= 1 and (segments == 1 or segments * items <= sms)
    assert segments == 1 or chunks // segments >= 16
    enough = items * (segments + 1) > sms or chunks // 16 <= segments
    assert enough, "neither the SMs nor the sequence are used up"
    ends = [0]
    for s in range(segments):
        out = (ctypes.c_longlong * 2)()
        plan.chunks(chunks, segments, s, out)
        assert out[0] == ends[-1] and out[1] >= out[0]
        ends.append(out[1])
    assert ends[-1] == chunks


def test_short_sequences_do_not_depend_on_the_batch(plan: ctypes.CDLL) -> None:
    """Below 2048 tokens there is one segment, however empty the GPU is: the same bits alone and in any batch."""
    assert all(plan.segments(1, time, 132) == 1 for time in range(0, 1985))
    assert plan.segments(1, 2048, 132) == 2


@given(lengths=st.lists(st.integers(0, 3000), max_size=20), tail=st.integers(0, 300), size=st.sampled_from([1, 2, 16]))
def test_every_group_of_chunks_has_its_own_slot(plan: ctypes.CDLL, lengths: list[int], tail: int, size: int) -> None:
    ends = lengths_to_cu_seqlens(lengths).tolist()
    time, used = ends[-1] + tail, set()
    for n, (begin, end) in enumerate(pairwise(ends)):
        chunks = -(-(end - begin) // 64)
        for group in range(-(-chunks // size)):
            slot = plan.slot(n, begin, time, size, 1) + group
            assert slot not in used
            used.add(slot)
            anchor = plan.anchor(group, size, chunks)
            assert group * size <= anchor < min((group + 1) * size, chunks)
    assert not used or max(used) < plan.slot(len(lengths), time, time, size, 1)


def test_instances(plan: ctypes.CDLL) -> None:
    for dim_k in range(8, 257, 8):
        for dim_v in range(8, 257, 8):
            for rows in (1, 40, 66, 67, 500):
                instance, block = divmod(plan.instance(dim_k, dim_v, rows, 132), 1000)
                assert dim_k <= instance and instance in (64, 128, 256) and block in (64, 128)
    assert plan.instance(128, 128, 66, 132) == 128064, "two blocks per head still fit the SMs"
    assert plan.instance(128, 128, 67, 132) == 128128, "one block covers D = 128: q, k, v are read once"


def test_which_instances_end_with_the_norm(plan: ctypes.CDLL) -> None:
    """Only where one block sees all columns of v, which the norm sums over."""
    assert plan.fuses(64, 64, 64) and plan.fuses(64, 64, 8) and plan.fuses(128, 128, 128)
    assert not plan.fuses(64, 64, 72) and not plan.fuses(128, 128, 136)
    assert not plan.fuses(128, 64, 64) and not plan.fuses(256, 128, 128)


# ---- kernels ---------------------------------------------------------------------------------------------------------
@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("decay", ["weak", "layer"])
def test_segments(backend: Any, decay: str) -> None:
    """One head of 3,100 tokens: three segments, chained states, several anchors."""
    time = 3100
    tensors = make(1, time, 1, 16, 24, torch.bfloat16, device=backend.device, decay=decay, gate_dtype=torch.float32)
    check(backend, tensors, length=time)


@pytest.mark.backends("emulated", "cuda")
def test_segments_of_packed_sequences(backend: Any) -> None:
    """Long and short sequences in one call: each is cut by its own length, and the state of none reaches another."""
    lengths = [5, 2050, 0, 70]
    tensors = make(1, sum(lengths) + 3, 1, 16, 16, torch.bfloat16, device=backend.device, sequences=4)
    check(backend, tensors, length=2050, cu_seqlens=lengths_to_cu_seqlens(lengths, backend.device))


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_that_are_not_16_byte_aligned(backend: Any, dtype: torch.dtype) -> None:
    tensors = make(2, 70, 2, 24, 40, dtype, device=backend.device)
    views = {name: guarded(x, pad=1) if name in "qkv" else x for name, x in tensors.items()}
    assert views["q"].stride(1) % 8 != 0
    # On Hopper aligned rows take another kernel: the same numbers but for roundings that fall the other way.
    for a, b in zip(run(backend, tensors), run(backend, views), strict=True):
        assert rms(a.double() - b.double()) <= 0.1 * torch.finfo(dtype).eps * rms(b)
    check(backend, views, length=70)


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("schedule", ["eager", "lazy"])
def test_a_block_of_128_columns(backend: Any, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block covers D = 128 where there are more heads and sequences than half the SMs: here most of them are empty.
    A tail, and sequences that end before their tile does."""
    if backend.emulated:
        monkeypatch.setenv("PTXSIM_MODE", schedule)
        monkeypatch.setenv("PTXSIM_RACE", "1")
    lengths = [70, *[0] * 65, 130, 2]
    tensors = make(1, 205, 1, 128, 128, torch.bfloat16, device=backend.device, sequences=len(lengths))
    check(backend, tensors, length=130, cu_seqlens=lengths_to_cu_seqlens(lengths, backend.device))


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize(("dim_k", "dim_v"), [(256, 256), (136, 200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_heads_over_many_chunks(backend: Any, dtype: torch.dtype, dim_k: int, dim_v: int) -> None:
    """Seven chunks: on Hopper a ring of two stages comes round more than three times."""
    check(backend, make(1, 400, 1, dim_k, dim_v, dtype, device=backend.device), length=400)


@pytest.mark.backends("emulated")
@pytest.mark.parametrize(
    ("dim_k", "dim_v"), [(64, 64), (128, 64), (128, 128), (256, 72)], ids=["64", "128-64", "128", "256"]
)
@pytest.mark.parametrize("schedule", ["lazy", "random-1", "random-2"])
def test_asynchronous_copies(
    backend: Any, schedule: str, dim_k: int, dim_v: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that land as late as the architecture allows, and random orders of warps and blocks, under the race
    checker: the bits of an ordinary run."""
    time = 140 if dim_k < 256 else 330  # wide heads have two stages: more than two rounds
    tensors = make(1, time, 1, dim_k, dim_v, torch.bfloat16)
    upstream = torch.randn(1, time, 1, dim_v).bfloat16()

    def everything() -> list[torch.Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        o, state = run(backend, leaves)
        return [o, state, *torch.autograd.grad([o], list(leaves.values()), [upstream])]

    want = everything()
    mode, _, seed = schedule.partition("-")
    monkeypatch.setenv("PTXSIM_MODE", mode)
    monkeypatch.setenv("PTXSIM_RACE", "1")
    if seed:
        monkeypatch.setenv("PTXSIM_SEED", seed)
    for a, b in zip(want, everything(), strict=True):
        assert bitwise_equal(a, b)


# ---- the norm and the output gate at the end ------------------------------------------------------------------------
# One sequence that is cut off, one longer than any ring of tiles, most of them empty: more heads than half the SMs, so
# that one block covers D = 128.
GATED_LENGTHS = [70, *[0] * 65, 200, 2]


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(("dim_k", "dim_v"), [(128, 128), (72, 120), (64, 64), (24, 40)])
def test_norm_and_gate_in_the_kernel(backend: Any, dim_k: int, dim_v: int, rotary: bool) -> None:
    """The rule of numerics; and y is the same whether o is kept (for a backward) or not."""
    time = sum(GATED_LENGTHS) + 3
    options: dict[str, Any] = {"cu_seqlens": lengths_to_cu_seqlens(GATED_LENGTHS, backend.device)}
    if rotary:
        options["inv_freq"] = 10_000.0 ** -torch.linspace(0, 1, dim_k // 2, device=backend.device)
    tensors = make_gated(1, time, 1, dim_k, dim_v, torch.bfloat16, device=backend.device, sequences=len(GATED_LENGTHS))
    y, state = check_gated(backend, tensors, length=200, **options)
    assert not y[:, -3:].any(), "rows after the last sequence are zero"
    without = run_gated(backend, tensors, **options)  # nothing wants a gradient: o is not stored
    assert bitwise_equal(y.detach(), without[0]) and bitwise_equal(state.detach(), without[1])


@pytest.mark.backends("emulated")
@pytest.mark.parametrize(
    ("shape", "launches"),
    [((1, 70, 2, 64, 64), 1), ((1, 70, 67, 72, 72), 1), ((1, 2050, 1, 16, 16), 2), ((1, 70, 1, 128, 128), 2)],
    ids=["64", "128", "segments", "two-blocks"],
)
def test_launches_with_norm_and_gate(
    backend: Any, shape: tuple[int, ...], launches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel does it all. Two segments have a pass for their states before it; where two blocks share the columns
    of a head, the norm is a kernel of its own behind it."""
    tensors = make_gated(*shape, torch.bfloat16)
    monkeypatch.setenv("PTXSIM_STATS", str(tmp_path / "launches"))
    run_gated(backend, tensors)
    kernels = [json.loads(line)["kernel"] for line in (tmp_path / "launches").read_text().splitlines()]
    assert len(kernels) == launches, kernels
    assert any("output" in name for name in kernels) == (shape[-1] == 128)


@pytest.mark.backends("emulated", "cuda")
def test_segments_with_norm_and_gate(backend: Any) -> None:
    """Three segments; and the states of packed ones."""
    options = {"device": backend.device, "gate_dtype": torch.float32}
    check_gated(backend, make_gated(1, 3100, 1, 16, 24, torch.bfloat16, **options), length=3100)
    lengths = [5, 2050, 0, 70]
    tensors = make_gated(1, sum(lengths) + 3, 1, 16, 16, torch.bfloat16, sequences=4, **options)
    check_gated(backend, tensors, length=2050, cu_seqlens=lengths_to_cu_seqlens(lengths, backend.device))


@pytest.mark.backends("emulated")
@pytest.mark.parametrize("dim_v", [24, 128, 200])
def test_a_gated_step_is_one_launch(backend: Any, dim_v: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper: the blocks of a head, one, four and seven here, add up their squares. Before it: two kernels, and the
    same numbers but for one rounding."""
    tensors = make_gated(2, 3, 2, 40, dim_v, torch.bfloat16)
    start = tensors.pop("initial_state")
    monkeypatch.setenv("PTXSIM_STATS", str(tmp_path / "launches"))
    state = start.clone()
    y = backend.ops.gated_retention_step(**tensors, state=state)
    launches = len((tmp_path / "launches").read_text().splitlines())
    assert launches == (1 if os.environ.get("PTXSIM_CC", "90") == "90" else 2)
    gate, other = tensors.pop("output_gate"), start.clone()
    o = backend.ops.gated_retention_step(**tensors, state=other)
    assert bitwise_equal(state, other)
    assert rms(y.double() - backend.ops.retention_output(o, gate).double()) <= 2**-8 * rms(y)
