"""Samplers, and generate against one forward after another."""

from __future__ import annotations

import pytest
import torch
from tiny import SELF_DECODERS, VOCAB, tiny_model, tokens
from torch import Tensor

from yoco_ext import YOCOForCausalLM, generate
from yoco_ext.generation import filter_logits, sample

both_ops = pytest.mark.parametrize("ops", ["fused", "reference"])
both_decoders = pytest.mark.parametrize("self_decoder", SELF_DECODERS)


def greedy_by_forwards(model: YOCOForCausalLM, prompt: list[int], count: int) -> list[int]:
    row = list(prompt)
    for _ in range(count):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    return row[len(prompt) :]


# ---- samplers ---------------------------------------------------------------------------------------


def test_top_k_keeps_k_even_among_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    kept = filter_logits(logits, top_k=2)
    assert kept.isfinite().sum(1).tolist() == [2, 2]
    assert kept[1].tolist()[:2] == [5.0, 4.0]
    assert torch.equal(filter_logits(logits, top_k=5), logits) and torch.equal(filter_logits(logits), logits)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, [1]), (0.5, [1]), (0.51, [1, 3]), (0.85, [1, 3, 0]), (1.0, [1, 3, 0, 2])]
)
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(top_p: float, kept: list[int]) -> None:
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    found = filter_logits(logits, top_p=top_p)[0]
    assert sorted(found.isfinite().nonzero().flatten().tolist()) == sorted(kept)
    assert torch.equal(found[kept], logits[0, kept])


def test_top_p_counts_what_top_k_has_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the two best, 4/7 = 0.57 lie on the first.
    assert filter_logits(logits, top_k=2, top_p=0.56).isfinite().sum() == 1
    assert filter_logits(logits, top_k=2, top_p=0.58).isfinite().sum() == 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    expected = (logits / temperature).softmax(0)
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))
    draws = sample(logits.expand(40_000, -1), temperature=temperature, generator=generator)
    counts = torch.bincount(draws, minlength=4)
    deviation = (counts - 40_000 * expected) / (40_000 * expected * (1 - expected)).sqrt()
    assert deviation.abs().max() < 6  # standard deviations


def test_temperature_zero_is_the_best_token() -> None:
    logits = torch.randn(5, VOCAB)
    assert torch.equal(sample(logits, temperature=0), logits.argmax(-1))
    assert torch.equal(sample(logits, temperature=1.0, top_k=1), logits.argmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(1, 4), **options)


# ---- generate ---------------------------------------------------------------------------------------


@both_ops
@both_decoders
def test_greedy_is_one_forward_after_another(ops: str, self_decoder: str) -> None:
    """A ragged batch, prompts shorter and longer than the window, in chunks."""
    model = tiny_model(self_decoder, ops, torch.float64)
    prompts = [tokens(n).tolist() for n in (3, 1, 25)]
    found = generate(model, prompts, 12, chunk_size=10)
    assert found == [greedy_by_forwards(model, prompt, 12) for prompt in prompts]


@both_decoders
def test_batches_give_what_each_prompt_gives_alone(self_decoder: str) -> None:
    model = tiny_model(self_decoder, "reference", torch.float64)
    ids = tokens(3, 15)
    assert model.generate(ids, 8) == [model.generate([row], 8)[0] for row in ids.tolist()]


def test_seed_decides() -> None:
    model = tiny_model(ops="reference")
    prompt = [tokens(5).tolist()] * 2
    options = {"temperature": 1.0, "top_p": 0.99}
    first = model.generate(prompt, 20, seed=3, **options)
    assert first == model.generate(prompt, 20, seed=3, **options)
    assert first != model.generate(prompt, 20, seed=4, **options)
    assert first[0] != first[1]  # rows draw independently


def test_stop_tokens_end_each_sequence_by_itself() -> None:
    model = tiny_model(ops="reference", dtype=torch.float64)
    prompts = [tokens(n).tolist() for n in (4, 9, 6)]
    free = model.generate(prompts, 30)
    stop = free[0][3]
    seen: list[list[int | None]] = []
    found = model.generate(prompts, 30, stop_tokens=[stop, VOCAB - 1], callback=seen.append)
    for row, full in zip(found, free, strict=True):
        ends = [i for i, token in enumerate(full) if token in (stop, VOCAB - 1)]
        assert row == full[: ends[0] + 1 if ends else 30]
    assert len(seen) == max(map(len, found))
    for i, row in enumerate(found):
        column = [step[i] for step in seen]
        assert column == row + [None] * (len(seen) - len(row))


@both_decoders
def test_a_conversation_continues_in_its_cache(self_decoder: str) -> None:
    model = tiny_model(self_decoder, "reference", torch.float64)
    first, second = tokens(9).tolist(), tokens(5).tolist()
    cache = model.new_cache(1)
    answer = model.generate([first], 6, cache=cache)[0]
    # The last token of an answer was never fed back: the next turn begins with it.
    found = model.generate([[answer[-1], *second]], 6, cache=cache)[0]
    assert found == greedy_by_forwards(model, first + answer + second, 6)


def test_bad_prompts_are_refused() -> None:
    model = tiny_model(ops="reference")
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="prompts must be one or more sequences of at least one token"):
            model.generate(prompts, 3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        model.generate([[1]], 0)


def test_generation_leaves_no_graph() -> None:
    model = tiny_model(ops="reference")
    cache = model.new_cache(1)
    model.generate([[1, 2, 3]], 3, cache=cache)
    kept: list[Tensor] = [cache.kv.k, cache.kv.v, *cache.states]
    assert not any(tensor.requires_grad for tensor in kept)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.tensor([1, 2]), 3), {}, r"prompts must be integers \[batch, time\], got torch.int64 \[2\]"),
        ((torch.rand(1, 4), 3), {}, "prompts must be integers"),
        (([1, 2, 3], 3), {}, r"\[tokens\] for a single one"),
        (([[1, VOCAB]], 3), {}, f"prompts hold {VOCAB}; allowed: tokens 0 to {VOCAB - 1}"),
        (([[-1]], 3), {}, "prompts hold -1"),
        (([[1.5]], 3), {}, "sequences of integer tokens"),
        (([[]], 3), {}, "at least one token"),
        (([[1]], 0), {}, "max_new_tokens must be at least 1, got 0"),
        (([[1]], 3), {"stop_tokens": 5}, "stop_tokens must be a collection of tokens, got 5"),
        (([[1]], 3), {"temperature": float("nan")}, "temperature must not be negative, got nan"),
        (([[1]], 3), {"temperature": 1.0, "top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        (([[1]], 3), {"temperature": 1.0, "top_k": -1}, "top_k must be 0"),
    ],
)
def test_a_wrong_call_says_so_and_leaves_the_cache_alone(arguments: tuple, options: dict, message: str) -> None:
    model = tiny_model(ops="reference")
    cache = model.new_cache(1)
    with pytest.raises(ValueError, match=message):
        model.generate(*arguments, cache=cache, **options)
    assert cache.lengths == [0]


def test_prompts_may_be_tensors_of_any_lengths() -> None:
    model = tiny_model(ops="reference")
    lists = [[1, 2, 3], [4]]
    assert model.generate([torch.tensor(row) for row in lists], 4) == model.generate(lists, 4)
