"""Runs the suite and writes the table and a JSON file."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import cases
from .ceilings import measure_ceilings
from .harness import OURS, Result, Timer, format_row, machine, measure, save
from .table import print_table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="yoco-ext bench",
        description="yoco_ext beside its peers in one run: medians and ratios.",
        epilog="example: yoco-ext bench --quick --only 'attention forward' --output bench/results/cpu/today.json",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer lengths")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases whose name, shape or dtype contains TEXT"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on one case (default: 2)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="where to write all figures")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the figures of an earlier run and stop")
    options = parser.parse_args(argv)
    if options.table:
        print_table(options.table)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU")
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
    failed = 0
    suite = cases.cuda_suite if device.type == "cuda" else cases.cpu_suite
    for case in suite(options.quick):
        if options.only not in f"{case.op} {case.shape} {case.dtype}":
            continue
        torch._dynamo.reset()
        try:
            result = measure(case, timer, options.seconds)
        except Exception as error:  # ours: the other cases are worth having all the same
            failed += 1
            said = " ".join(str(error).split())[:300]
            print(f"{case.op} {case.shape}: FAILED, {type(error).__name__}: {said}", flush=True)
            continue
        results.append(result)
        line = format_row(result)
        if case.op == "decode":
            rate = case.bytes / result.milliseconds[OURS] / 1e6
            line += f"  {rate:.1f} GB/s = {100 * rate / ceilings['read_gbytes']:.0f} % of the read bandwidth"
        print(line, flush=True)
        if options.output:  # after every case: a run that is stopped keeps its figures
            save(options.output, about, ceilings, results)
        del case  # and its tensors, before the next one is made
    if options.output:
        print(f"figures: {options.output}")
    if failed:
        print(f"{failed} cases failed")
    return 1 if failed else 0
