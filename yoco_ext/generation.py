"""Text generation: sampling from logits, and the prefill/decode loop around a YOCOCache."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .cache import YOCOCache
from .model import YOCOForCausalLM


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [B, vocab] with -inf outside the top_k best and outside the smallest set of mass top_p."""
    _check_sampling(0.0, top_k, top_p)
    if 0 < top_k < logits.shape[-1]:
        # By index, not by value: ties must not let more than top_k through.
        values, index = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, values)
    if top_p < 1.0:
        values, index = logits.sort(descending=True, stable=True)
        probabilities = values.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p  # the mass before a token: the best always stays
        logits = torch.empty_like(logits).scatter(-1, index, values.masked_fill(outside, -torch.inf))
    return logits


def _check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    if not temperature >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or positive, got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def _rows(prompts: Tensor | Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """The prompts as lists, checked: on a GPU a token outside the vocabulary would end the process's use of it."""
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.is_floating_point():
            raise ValueError(f"prompts must be integers [batch, time], got {prompts.dtype} {list(prompts.shape)}")
        prompts = prompts.tolist()
    try:
        rows = [[operator.index(token) for token in row] for row in prompts]
    except TypeError as error:
        raise ValueError("prompts must be sequences of integer tokens ([tokens] for a single one)") from error
    if not rows or not all(rows):
        raise ValueError("prompts must be one or more sequences of at least one token")
    for token in (token for row in rows for token in row):
        if not 0 <= token < vocab_size:
            raise ValueError(f"prompts hold {token}; allowed: tokens 0 to {vocab_size - 1}")
    return rows


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row of logits [B, vocab]; temperature 0 takes the best (greedy)."""
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    logits = filter_logits(logits.float() / temperature, top_k=top_k, top_p=top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    model: YOCOForCausalLM,
    prompts: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Iterable[int] = (),
    seed: int | None = None,
    callback: Callable[[list[int | None]], None] | None = None,
    cache: YOCOCache | None = None,
    chunk_size: int | None = None,
) -> list[list[int]]:
    """Continues a batch of prompts (lists of tokens of any lengths, or a tensor [B, T]); returns the new tokens.

    A sequence ends after max_new_tokens or with one of stop_tokens (which is part of the result). callback gets every
    step's tokens, None for a sequence that has ended. A cache given here may already hold earlier turns; the last
    token generated is not in it yet.

    >>> model.generate([tokens], 100, temperature=0.8, top_p=0.95, seed=0)
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    _check_sampling(temperature, top_k, top_p)  # all of it before a given cache is touched
    if isinstance(stop_tokens, (int, str)):
        raise ValueError(f"stop_tokens must be a collection of tokens, got {stop_tokens!r}")
    rows = _rows(prompts, model.config.vocab_size)
    lengths, device = [len(row) for row in rows], model.device
    padded = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    if cache is None:
        cache = model.new_cache(len(rows), max(lengths) + max_new_tokens)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    stop = torch.tensor(sorted(set(stop_tokens)), dtype=torch.int64, device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    logits = model.prefill(padded.to(device), cache, lengths=lengths, chunk_size=chunk_size)
    steps, live = [], []
    for step in range(max_new_tokens):
        if step:
            logits = model.decode(steps[-1][:, None], cache)[:, 0]
        steps.append(sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator))
        live.append(~ended)
        if callback is not None:
            columns = zip(steps[-1].tolist(), live[-1].tolist(), strict=True)
            callback([token if alive else None for token, alive in columns])
        if stop.numel():  # without stop tokens or callback the host never waits for the device
            ended = ended | torch.isin(steps[-1], stop)
            if ended.all():
                break
    tokens, alive = torch.stack(steps, 1).tolist(), torch.stack(live, 1).sum(1).tolist()
    return [row[:count] for row, count in zip(tokens, alive, strict=True)]
