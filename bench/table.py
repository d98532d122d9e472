"""The README's table out of a JSON file of the suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .harness import OURS, floor

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def markdown(document: dict[str, Any]) -> str:
    """Figures as saved by `yoco-ext bench --output`: machine, ceilings, one row per case."""
    about, ceilings = document["machine"], document["ceilings"]
    name = about["device"] if about["device"] != "cpu" else f"{about['cpu']}, {about['threads']} threads"
    lines = [
        f"{name}, torch {about['torch']}, {about['date'][:10]}, commit `{about['commit']}`; ceilings of the same run: "
        + ", ".join(f"{key.replace('_', ' ')} {value:.0f}" for key, value in ceilings.items())
        + ".",
        "",
        "| op | shape | dtype | yoco_ext ms | GFLOP/s | GB/s | floor ms | peers ms | times faster than the fastest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in document["results"]:
        ours = r["milliseconds"][OURS]
        peers = ", ".join(f"{peer} {t:.4g}" for peer, t in r["milliseconds"].items() if peer != OURS)
        ratio = f"{r['ratio']:.1f}" if r["ratio"] else ""
        least = floor(r["flops"], r["bytes"], r["dtype"], ceilings)
        rates = f"{r['flops'] / ours / 1e6:.0f} | {r['bytes'] / ours / 1e6:.1f} | {f'{least:.3g}' if least else ''}"
        lines.append(f"| {r['op']} | {r['shape']} | {SHORT[r['dtype']]} | {ours:.4g} | {rates} | {peers} | {ratio} |")
    lines += [f"\nLeft out: {case}: {why}" for case, why in document.get("left_out", {}).items()]
    return "\n".join(lines)


def print_table(path: Path) -> None:
    print(markdown(json.loads(path.read_text())))
