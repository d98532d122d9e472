"""Runs the suite and writes the table and a JSON file."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import cases
from .ceilings import measure_ceilings
from .harness import OURS, DeviceLost, Result, Timer, both_ways, floor, format_row, machine, measure, save
from .table import print_table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="yoco-ext bench",
        description="yoco_ext beside its peers in one run: medians and ratios.",
        epilog="example: yoco-ext bench --quick --only 'attention forward' --output bench/results/cpu/today.json",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="which suite (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="fewer lengths")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases whose name, shape or dtype contains TEXT"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on one case (default: 2)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="where to write all figures")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the figures of an earlier run and stop")
    options = parser.parse_args(argv)
    if options.table:
        try:
            print_table(options.table)
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--table {options.table}: no figures of this command ({type(error).__name__}: {error})")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU")
    suite = cases.cuda_suite if options.device == "cuda" else cases.cpu_suite
    chosen = [case for case in suite(options.quick) if options.only in str(case)]
    if not chosen:
        parser.error(f"--only {options.only}: no case's name, shape or dtype contains that")
    device = torch.device(options.device)
    torch.manual_seed(0)
    timer = Timer(device)
    ceilings = measure_ceilings(device, timer)
    about = machine(device)
    names = (
        about["device"],
        f"{about['threads']} threads",
        f"{about['cpu_kernels']} kernels",
        f"torch {about['torch']}",
    )
    print(", ".join(names) + f", commit {about['commit']}")
    print("ceilings of this run: " + ", ".join(f"{name} {value:.0f}" for name, value in ceilings.items()))
    results: list[Result] = []
    left_out: dict[str, str] = {}
    failed = 0
    limit = float("inf")
    if device.type == "cuda":
        limit = 0.9 * torch.cuda.get_device_properties(device).total_memory  # the rest: workspaces, PyTorch, peers

    def keep() -> None:  # after every case: a run that is stopped keeps its figures
        if options.output:
            save(options.output, about, ceilings, results, left_out)

    for case in chosen:
        if case.memory > limit:
            why = f"needs {case.memory / 1e9:.0f} GB, more than the {limit / 1e9:.0f} GB allowed on {about['device']}"
            left_out[str(case)] = why
            print(f"{case}: left out, {why}", flush=True)
            keep()
            continue
        torch._dynamo.reset()
        try:
            result = measure(case, timer, options.seconds)
        except Exception as error:  # ours: the other cases are worth having all the same
            failed += 1
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            left_out[str(case)] = said
            print(f"{case}: FAILED, {said}", flush=True)
            keep()
            if isinstance(error, DeviceLost):
                print("FAILED: the GPU takes no more work in this process, the cases behind are missing", flush=True)
                break
            continue
        result.floor = floor(result.flops, result.bytes, result.dtype, ceilings)
        results.append(result)
        line = format_row(result)
        if case.op == "decode":
            rate = case.bytes / result.milliseconds[OURS] / 1e6
            line += f"  {rate:.1f} GB/s = {100 * rate / ceilings['read_gbytes']:.0f} % of the read bandwidth"
        print(line, flush=True)
        keep()
    for line in both_ways(results):
        print(line)
    if options.output:
        print(f"figures: {options.output}")
    if failed:
        print(f"{failed} cases failed")
    return 1 if failed else 0
