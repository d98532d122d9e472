"""Timing. Implementations of a case take turns, so that a noisy machine is noisy for all of them alike."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OURS = "yoco_ext"


class DeviceLost(RuntimeError):
    """A kernel ended the process's use of the GPU: nothing after it can be measured."""


@dataclasses.dataclass
class Case:
    """One line of the table: what is computed, its useful work, and who computes it. Only make allocates."""

    op: str  # "attention forward", ...
    shape: str  # "B1 T4096 H8 D64 causal"
    dtype: torch.dtype
    flops: float  # useful floating-point operations of one call
    bytes: float  # compulsory memory traffic of one call
    make: Callable[[], dict[str, Callable[[], Any]]]  # makes the inputs; implementation name -> call
    memory: float = 0  # bytes that inputs and results take together
    largest: int = 0  # elements of the largest tensor
    calls: int = 1  # calls that are timed together: many where the time of one is that of launching it

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')}"


@dataclasses.dataclass
class Result:
    op: str
    shape: str
    dtype: str
    flops: float
    bytes: float
    milliseconds: dict[str, float]  # median per implementation
    spread: dict[str, float]  # (third quartile - first quartile) / median
    rounds: int
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # peer -> why it could not run this case
    floor: float | None = None  # milliseconds that the ceilings of this run leave for the useful work

    @property
    def best_peer(self) -> str | None:
        peers = {name: t for name, t in self.milliseconds.items() if name != OURS}
        return min(peers, key=peers.get) if peers else None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the fastest peer of this run."""
        return self.milliseconds[self.best_peer] / self.milliseconds[OURS] if self.best_peer else None

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "best_peer": self.best_peer, "ratio": self.ratio}


class Timer:
    """Wall clock on the CPU; CUDA events with a flushed L2 on a GPU.

    A GPU first sleeps for about a millisecond, so that a call is queued before it starts: what is timed is the GPU's
    work, whatever Python in front of it costs. lead=False leaves that out, for cases whose time is that of launching.
    """

    LEAD = 2_000_000  # clock cycles

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], Any], lead: bool = True) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        self.flush.zero_()
        if lead:
            torch.cuda._sleep(self.LEAD)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def measure(case: Case, timer: Timer, seconds: float = 2.0, rounds: tuple[int, int] = (5, 50)) -> Result:
    """Medians over at least rounds[0] and at most rounds[1] turns, about `seconds` for all implementations together.

    A peer that cannot run the case (shape not supported, out of memory) is left out and listed in `failed`; our own
    failure is an error.
    """
    runs, failed = {}, {}
    for name, run in case.make().items():  # compile, allocate, warm up
        try:
            run()
            run()
            _synchronize(timer.device)
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            try:
                _synchronize(timer.device)  # an error of the device stays: it would be everybody's from here on
            except Exception:
                raise DeviceLost(f"{name}: {said}") from error
            if name == OURS:
                raise
            failed[name] = said
            continue
        if case.calls == 1:
            runs[name] = run
        else:
            runs[name] = lambda run=run: [run() for _ in range(case.calls)] and None
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - begin > seconds:
            break
        for name, run in runs.items():
            times[name].append(timer(run, lead=case.calls == 1) / case.calls)
    medians = {name: statistics.median(t) for name, t in times.items()}
    quartiles = {name: statistics.quantiles(t, n=4) for name, t in times.items()}
    return Result(
        case.op,
        case.shape,
        str(case.dtype).removeprefix("torch."),
        case.flops,
        case.bytes,
        {name: 1e3 * t for name, t in medians.items()},
        {name: (q[2] - q[0]) / medians[name] for name, q in quartiles.items()},
        len(next(iter(times.values()))),
        failed,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def floor(flops: float, bytes: float, dtype: str, ceilings: dict[str, float]) -> float | None:
    """Roofline: milliseconds below which the useful work cannot be done at the rates measured in the same run. None
    where they were not measured."""
    gemm = ceilings.get("gemm_float32_gflops" if dtype == "float32" else "gemm_bfloat16_gflops")
    bandwidth = max(ceilings.get("read_gbytes", 0.0), ceilings.get("copy_gbytes", 0.0))
    if not gemm or not bandwidth:
        return None
    return max(flops / gemm, bytes / bandwidth) / 1e6


def both_ways(results: list[Result]) -> list[str]:
    """Forward and backward of a shape added up, ours and every peer's that ran both."""
    found = {(r.op, r.shape, r.dtype): r for r in results}
    lines = []
    for (op, shape, dtype), forward in found.items():
        name = op.removesuffix(" forward")
        backward = found.get((f"{name} backward", shape, dtype))
        if name == op or backward is None:
            continue
        sums = {
            peer: t + backward.milliseconds[peer]
            for peer, t in forward.milliseconds.items()
            if peer in backward.milliseconds
        }
        ours = sums.pop(OURS)
        line = f"{name + ' forward+backward':<26} {shape:<34} {dtype:<9} {ours:>9.3f} ms"
        if sums:
            best = min(sums, key=sums.get)
            line += f"  {sums[best] / ours:>6.2f}x  ({', '.join(f'{n} {t:.3f}' for n, t in sums.items())} ms)"
        lines.append(line)
    return lines


def format_row(result: Result) -> str:
    gflops = result.flops / result.milliseconds.get(OURS, float("nan")) / 1e6
    cells = [f"{result.op:<26} {result.shape:<34} {result.dtype:<9} {result.milliseconds.get(OURS, 0):>9.3f} ms"]
    cells.append(f"{gflops:>8.0f} GFLOP/s" if result.flops else " " * 16)
    if result.floor:
        share = 100 * result.floor / result.milliseconds.get(OURS, float("nan"))
        cells.append(f"floor {result.floor:>8.3f} ({share:>3.0f} %)")
    if result.best_peer:
        peers = ", ".join(f"{n} {t:.3f}" for n, t in result.milliseconds.items() if n != OURS)
        cells.append(f"{result.ratio:>6.2f}x  ({peers} ms)")
    if result.failed:
        cells.append("not run: " + ", ".join(result.failed))
    return "  ".join(cells)


# Distributions whose version belongs beside a figure, where they are installed.
PEERS = ("triton", "flash-attn", "flash-attn-3", "flash-linear-attention", "fla-core")


def peer_versions(device: torch.device) -> dict[str, str]:
    """Versions of everything the cases are compared with; SDPA's and FlexAttention's is torch's."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["cuda"] = str(torch.version.cuda)
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    from yoco_ext._library import backend_variant

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "torch": torch.__version__,
        "peers": peer_versions(device),
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_kernels": backend_variant("cpu"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def save(
    path: Path,
    about: dict[str, Any],
    ceilings: dict[str, float],
    results: list[Result],
    left_out: dict[str, str] | None = None,
) -> None:
    """left_out: case -> why there is no figure of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": about,
        "ceilings": ceilings,
        "results": [r.as_dict() for r in results],
        "left_out": left_out or {},
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
