"""What the machine can do at best, measured in the same run as everything else."""

from __future__ import annotations

import statistics

import torch

from .harness import Timer


def measure_ceilings(device: torch.device, timer: Timer) -> dict[str, float]:
    """Matrix-product rate of PyTorch in GFLOP/s per dtype, and read bandwidth in GB/s."""
    n = 8192 if device.type == "cuda" else 2048
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found[f"gemm_{str(dtype).removeprefix('torch.')}_gflops"] = (
            2 * n**3 / _median(timer, lambda a=a, b=b: a @ b) / 1e9
        )
    # A copy reads and writes; a dot product of a tensor with itself only reads. The faster of two ways to read counts.
    x = torch.ones(2**28 // 4, device=device)
    read = min(_median(timer, lambda: torch.dot(x, x)), _median(timer, lambda: x.sum()))
    found["read_gbytes"] = x.numel() * 4 / read / 1e9
    y = torch.empty_like(x)
    found["copy_gbytes"] = 2 * x.numel() * 4 / _median(timer, lambda: y.copy_(x)) / 1e9
    return found


def _median(timer: Timer, run, repeats: int = 7) -> float:
    run()
    return statistics.median(timer(run) for _ in range(repeats))
