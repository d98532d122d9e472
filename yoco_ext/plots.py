"""The demo's two pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .cache import transformer_cache_bytes, yoco_cache_bytes
from .config import YOCOConfig

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9731a", "#6b6b6b"


def require_matplotlib() -> Any:
    """matplotlib's pyplot, drawing into files only."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'yoco_ext[plots]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_loss(
    path: Path, losses: list[float], *, tokens_per_step: int, held_out: dict[str, float], gzip_bits: float
) -> None:
    """Training loss (bits per byte, with its running mean) and what the held-out text costs, gzip beside it."""
    plt = require_matplotlib()
    window = max(1, len(losses) // 25)
    mean = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
    tokens = [(i + 1) * tokens_per_step / 1e6 for i in range(len(losses))]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(tokens, losses, color=_BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, mean, color=_BLUE, linewidth=1.8, label="training text (running mean)")
    axes.axhline(
        gzip_bits, color=_GREY, linestyle="--", linewidth=1.2, label=f"gzip -9 on held-out text: {gzip_bits:.2f}"
    )
    axes.plot(
        [0, tokens[-1]],
        [held_out["before"], held_out["after"]],
        "o",
        color=_ORANGE,
        label=f"held-out text: {held_out['before']:.2f} before, {held_out['after']:.2f} after",
    )
    axes.set_xlabel("training bytes (millions)")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(bottom=0)
    axes.set_title("YOCO trained on bytes")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_cache_memory(path: Path, config: YOCOConfig, dtype: torch.dtype) -> None:
    """Cache bytes of one sequence against its length: YOCO and a Transformer of the same shape."""
    plt = require_matplotlib()
    lengths = [2**i for i in range(8, 21)]
    mebibytes = {
        f"Transformer, {config.num_layers} layers": (
            [transformer_cache_bytes(config, n, dtype=dtype) / 2**20 for n in lengths],
            _ORANGE,
        ),
        "YOCO": ([yoco_cache_bytes(config, n, dtype=dtype) / 2**20 for n in lengths], _BLUE),
    }
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for label, (values, color) in mebibytes.items():
        axes.plot(lengths, values, "o-", markersize=3.5, color=color, label=label)
    (transformer, _), (yoco, _) = mebibytes.values()
    axes.annotate(
        f"{transformer[-1] / yoco[-1]:.1f}x smaller",
        (lengths[-1], yoco[-1]),
        textcoords="offset points",
        xytext=(0, -42),
        ha="right",
        color=_BLUE,
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths[::2], [_length(n) for n in lengths[::2]])
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("MiB per sequence")
    axes.set_title(f"Cache of one sequence ({str(dtype).removeprefix('torch.')})")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _length(n: int) -> str:
    return str(n) if n < 1024 else f"{n // 1024}K" if n < 2**20 else f"{n // 2**20}M"
