"""The main job: train a byte-level YOCO on real text, then read a prompt and continue it."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import plots
from .cache import transformer_cache_bytes, yoco_cache_bytes
from .config import YOCOConfig
from .data import END_OF_TEXT, VOCAB_SIZE, Batches, Corpus, load_corpus
from .generation import generate
from .model import YOCOForCausalLM
from .training import Trainer, TrainingConfig, autocast, bits_per_byte, default_precision

HELD_OUT_BYTES = 1 << 17  # of the held-out text, how much is measured


@dataclass(frozen=True)
class DemoOptions:
    """What `yoco-ext demo` can be told."""

    text: Path | None = None  # default: the source of Python's standard library
    output: Path = Path("demo_output")
    seconds: float = 150.0  # of training; the number of steps follows from the speed of the first ones
    steps: int | None = None  # or given outright
    batch_size: int = 4
    seq_len: int = 512
    hidden_size: int = 192
    num_layers: int = 6
    prompt_bytes: int = 2048
    new_bytes: int = 256
    ops: str = "fused"
    device: str = "cpu"
    precision: str | None = None
    seed: int = 0


def demo_config(options: DemoOptions) -> YOCOConfig:
    heads = max(1, options.hidden_size // 64)
    return YOCOConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 8 // 3 // 32 * 32,
        num_layers=options.num_layers,
        num_heads=heads,
        num_kv_heads=1,
        num_self_heads=heads,
    )


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Runs the demo, prints what it does and returns (and writes) all figures."""
    plots.require_matplotlib()  # before the work, not after it
    begin = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    corpus = load_corpus(options.text)
    config = demo_config(options)
    precision = options.precision or default_precision(options.device)
    model = YOCOForCausalLM(config, options.ops).to(options.device)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"text        {corpus.name}: {corpus.train.numel():,} bytes to train on, {len(corpus.held_out)} files held out"
    )
    print(
        f"model       {size / 1e6:.1f} M parameters, {config.num_self_layers} gated-retention + "
        f"{config.num_cross_layers} cross layers, {options.ops} ops on {options.device}, {precision}"
    )
    held_out = corpus.held_out_bytes[:HELD_OUT_BYTES]
    figures: dict[str, Any] = {
        "text": corpus.name,
        "parameters": size,
        "precision": precision,
        "device": options.device,
    }
    figures["gzip_bits_per_byte"] = 8 * len(gzip.compress(held_out, 9, mtime=0)) / len(held_out)
    before = _held_out_bits(model, held_out, options, precision)
    trainer = _train(model, corpus, options, precision, figures)
    after = _held_out_bits(model, held_out, options, precision)
    figures["held_out"] = {"bytes": len(held_out), "before": before, "after": after}
    print(
        f"held out    {before:.2f} -> {after:.2f} bits per byte on {len(held_out):,} bytes never trained on "
        f"(gzip -9: {figures['gzip_bits_per_byte']:.2f})"
    )
    trainer.save(options.output / "checkpoint")
    figures["agreement"] = _fused_against_reference(model, held_out[: options.seq_len])
    if figures["agreement"] is not None:
        print(f"agreement   fused and reference logits differ by {figures['agreement']:.1e} (relative norm, float32)")
    figures["generation"] = _continue_prompt(model, corpus, options, precision)
    _write(options.output, trainer, figures)
    figures["seconds"] = time.perf_counter() - begin
    (options.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"output      {options.output}: checkpoint/, figures.json, loss.png, cache_memory.png")
    print(f"time        {figures['seconds']:.0f} s")
    return figures


def _held_out_bits(model: YOCOForCausalLM, text: bytes, options: DemoOptions, precision: str) -> float:
    model.eval()
    return bits_per_byte(model, text, seq_len=options.seq_len, batch_size=options.batch_size, precision=precision)


def _train(
    model: YOCOForCausalLM, corpus: Corpus, options: DemoOptions, precision: str, figures: dict[str, Any]
) -> Trainer:
    config = TrainingConfig(
        steps=options.steps or 1 << 20,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        lr=4e-3,
        min_lr=2e-4,
        warmup_steps=min(30, options.steps or 30),
        precision=precision,
        seed=options.seed,
    )
    trainer = Trainer(model, config, Batches(corpus.train, config.batch_size, config.seq_len, config.seed))
    begin = time.perf_counter()
    if options.steps is None:
        # The first steps belong to the warmup, whose learning rate does not depend on the number of steps.
        times = []
        for _ in range(8):
            start = time.perf_counter()
            trainer.train_step()
            times.append(time.perf_counter() - start)
        left = options.seconds - (time.perf_counter() - begin)
        steps = max(2 * config.warmup_steps, trainer.step + int(left / statistics.median(times)))
        trainer.config = dataclasses.replace(config, steps=steps)
    rate = trainer.run()
    figures["training"] = {
        **dataclasses.asdict(trainer.config),
        "tokens": trainer.step * config.tokens_per_step,
        "tokens_per_second": rate,
        "seconds": time.perf_counter() - begin,
        "losses_bits_per_byte": [loss / math.log(2) for loss in trainer.losses],
    }
    print(
        f"training    {trainer.step} steps, {figures['training']['tokens'] / 1e6:.2f} M bytes in "
        f"{figures['training']['seconds']:.0f} s, {rate:,.0f} tokens/s"
    )
    return trainer


@torch.no_grad()
def _fused_against_reference(model: YOCOForCausalLM, text: bytes) -> float | None:
    """||fused - reference|| / ||reference|| of the logits of a passage, both in float32."""
    tokens = torch.tensor([list(text)], device=model.device)
    logits = []
    for ops in ("fused", "reference"):
        try:
            twin = YOCOForCausalLM(model.config, ops).to(model.device)
        except ImportError as error:  # --ops reference works without the compiled ops; there is nothing to compare then
            print(f"agreement   not measured: {error}")
            return None
        twin.load_state_dict(model.state_dict())
        logits.append(twin(tokens).double())
    return ((logits[0] - logits[1]).norm() / logits[1].norm()).item()


def _continue_prompt(model: YOCOForCausalLM, corpus: Corpus, options: DemoOptions, precision: str) -> dict[str, Any]:
    """Prefills the beginning of a held-out file with early exit and generates what might follow."""
    name, text = max(corpus.held_out.items(), key=lambda item: len(item[1]))
    prompt = list(text[: min(options.prompt_bytes, max(1, len(text) // 2))])
    length = len(prompt) + options.new_bytes
    tokens = torch.tensor([prompt], device=model.device)
    marks: list[float] = []
    with autocast(model.device, precision):
        dtype = model.new_cache().dtype
        seconds = {kind: _prefill_seconds(model, tokens, length, kind) for kind in ("all", "last")}
        cache = model.new_cache(1, length)
        new = generate(
            model,
            [prompt],
            options.new_bytes,
            temperature=0.8,
            top_p=0.95,
            stop_tokens=[END_OF_TEXT],
            seed=options.seed,
            callback=lambda _: marks.append(time.perf_counter()),
            cache=cache,
        )[0]
    decode_rate = (len(marks) - 1) / (marks[-1] - marks[0]) if len(marks) > 1 else 0.0
    yoco = yoco_cache_bytes(model.config, length, dtype=dtype)
    transformer = transformer_cache_bytes(model.config, length, dtype=dtype)
    shown = bytes(prompt[-160:]).decode(errors="replace"), bytes(new).decode(errors="replace")
    print(f"prompt      {name}, {len(prompt)} bytes; its end and the model's continuation:")
    print(_indented(shown[0] + " ▶ " + shown[1]))
    print(
        f"prefill     {len(prompt) / seconds['last']:,.0f} tokens/s with early exit "
        f"({seconds['all'] / seconds['last']:.2f}x the speed of running all layers); decode {decode_rate:,.0f} tokens/s"
    )
    print(
        f"cache       {cache.nbytes:,} bytes at {length:,} tokens; a Transformer of the same shape {transformer:,} "
        f"({transformer / yoco:.1f}x); at 64K tokens {_cache_ratio(model.config, 1 << 16, dtype):.1f}x"
    )
    return {
        "prompt_file": name,
        "prompt_bytes": len(prompt),
        "continuation": shown[1],
        "prefill_tokens_per_second": len(prompt) / seconds["last"],
        "prefill_tokens_per_second_all_layers": len(prompt) / seconds["all"],
        "decode_tokens_per_second": decode_rate,
        "cache_dtype": str(dtype).removeprefix("torch."),
        "cache_tokens": length,
        "cache_bytes": cache.nbytes,
        "transformer_cache_bytes": transformer,
    }


def _prefill_seconds(model: YOCOForCausalLM, tokens: Tensor, length: int, logits: str) -> float:
    """Best of three."""
    times = []
    for _ in range(3):
        cache = model.new_cache(1, length)
        start = time.perf_counter()
        result = model.prefill(tokens, cache, logits=logits)
        result[..., 0].sum().item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    return min(times)


def _cache_ratio(config: YOCOConfig, length: int, dtype: torch.dtype) -> float:
    return transformer_cache_bytes(config, length, dtype=dtype) / yoco_cache_bytes(config, length, dtype=dtype)


def _indented(text: str) -> str:
    return "\n".join("    | " + line for line in text.splitlines())


def _write(output: Path, trainer: Trainer, figures: dict[str, Any]) -> None:
    plots.plot_loss(
        output / "loss.png",
        figures["training"]["losses_bits_per_byte"],
        tokens_per_step=trainer.config.tokens_per_step,
        held_out=figures["held_out"],
        gzip_bits=figures["gzip_bits_per_byte"],
    )
    dtype = getattr(torch, figures["generation"]["cache_dtype"])
    plots.plot_cache_memory(output / "cache_memory.png", trainer.model.config, dtype)
