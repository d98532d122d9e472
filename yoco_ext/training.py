"""Training: AdamW, cosine schedule with warmup, clipping, bf16 autocast, accumulation, exact resume."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import load_checkpoint, save_checkpoint
from .data import END_OF_TEXT, Batches
from .model import YOCOForCausalLM

STATE, TRAINING_CONFIG = "trainer.pt", "training.json"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingConfig:
    """The defaults of optimizer and schedule are the paper's."""

    steps: int = 1000
    batch_size: int = 8
    seq_len: int = 1024
    accumulate: int = 1  # batches per optimizer step
    lr: float = 3.2e-4
    min_lr: float = 3.2e-5
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    precision: str = "float32"  # or bfloat16: autocast, parameters stay float32
    checkpoint_activations: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulate", "lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "min_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len * self.accumulate


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warmup from 0, then half a cosine down to min_lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def default_precision(device: torch.device | str) -> str:
    """bfloat16 where the processor multiplies it natively, float32 elsewhere."""
    if torch.device(device).type == "cuda":
        return "bfloat16"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


class Trainer:
    """Trains a model on batches [batch, seq_len + 1] of tokens; `step` is also the position in the data."""

    def __init__(self, model: YOCOForCausalLM, config: TrainingConfig, batches: Batches) -> None:
        self.model, self.config, self.batches = model, config, batches
        self.step = 0
        self.losses: list[float] = []  # nats per token, one per step
        model.checkpoint_activations(config.checkpoint_activations)
        parameters = list(model.parameters())  # a tied matrix comes once
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},  # norms
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)

    def train_step(self) -> float:
        """One optimizer step; returns its mean loss."""
        config, model = self.config, self.model
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        for i in range(config.accumulate):
            tokens = self.batches[self.step * config.accumulate + i].to(model.device, non_blocking=True)
            with autocast(model.device, config.precision):
                loss = model(tokens[:, :-1], targets=tokens[:, 1:]) / config.accumulate
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        loss_value = total.item()
        if not math.isfinite(loss_value):
            raise FloatingPointError(f"the loss is {loss_value} at step {self.step}; the weights are those before it")
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss_value)
        return loss_value

    def run(
        self,
        *,
        until: int | None = None,
        progress: bool = True,
        on_step: Callable[[Trainer], None] | None = None,
    ) -> float:
        """Trains up to a step (default: the last); returns tokens per second."""
        until = self.config.steps if until is None else min(until, self.config.steps)
        first, begin = self.step, time.perf_counter()
        self.model.train()
        with tqdm(total=until, initial=first, disable=not progress, unit="step", dynamic_ncols=True) as bar:
            while self.step < until:
                loss = self.train_step()
                seconds = time.perf_counter() - begin
                rate = (self.step - first) * self.config.tokens_per_step / seconds
                bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
                bar.update()
                if on_step is not None:
                    on_step(self)
        return (self.step - first) * self.config.tokens_per_step / max(time.perf_counter() - begin, 1e-9)

    def save(self, path: str | Path) -> None:
        """Writes the model and all that resume needs into a folder."""
        folder = Path(path)
        save_checkpoint(self.model, folder)
        (folder / TRAINING_CONFIG).write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
        state = {
            "step": self.step,
            "losses": self.losses,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.model.device.type == "cuda" else [],
        }
        torch.save(state, folder / STATE)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        tokens: Tensor,
        *,
        ops: str = "fused",
        device: torch.device | str = "cpu",
        config: TrainingConfig | None = None,
    ) -> Trainer:
        """Continues from a folder that `save` wrote; on the CPU bit for bit. tokens: the same text as before."""
        folder = Path(path)
        if not (folder / STATE).is_file():
            raise ValueError(f"{folder} has no {STATE}: nothing to resume")
        if config is None:
            config = TrainingConfig(**json.loads((folder / TRAINING_CONFIG).read_text()))
        model = load_checkpoint(folder, ops=ops, device=device)
        trainer = cls(model, config, Batches(tokens, config.batch_size, config.seq_len, config.seed))
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.step, trainer.losses = state["step"], state["losses"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and model.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        return trainer


@torch.no_grad()
def bits_per_byte(
    model: YOCOForCausalLM, text: bytes, *, seq_len: int, batch_size: int = 8, precision: str = "float32"
) -> float:
    """Mean code length of a text under a byte-level model, in windows of seq_len that do not see each other."""
    stream = torch.frombuffer(bytearray([END_OF_TEXT]) + bytearray(text), dtype=torch.uint8).long()
    starts = range(0, len(text), seq_len)
    pad = len(starts) * seq_len - len(text)
    targets = torch.cat((stream[1:], stream.new_full((pad,), -100))).view(-1, seq_len)
    inputs = torch.cat((stream[:-1], stream.new_zeros(pad))).view(-1, seq_len)
    nats = 0.0
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        with autocast(model.device, precision):
            loss = model(x.to(model.device), targets=y.to(model.device))
        nats += loss.item() * (y != -100).sum().item()
    return nats / math.log(2) / len(text)
