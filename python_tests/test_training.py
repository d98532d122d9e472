"""Training: schedule, data, exact resume, accumulation; measuring in bits per byte."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny import SELF_DECODERS, tiny_model

from yoco_ext import YOCOForCausalLM
from yoco_ext.data import Batches, load_corpus
from yoco_ext.training import Trainer, TrainingConfig, bits_per_byte, learning_rate

TEXT = b"".join(b"line %d: the quick brown fox jumps over the lazy dog\n" % i for i in range(200))
BYTES = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)


def byte_model(self_decoder: str = "gated_retention", ops: str = "fused", **overrides) -> YOCOForCausalLM:
    torch.manual_seed(0)
    return tiny_model(self_decoder, ops, vocab_size=256, **overrides)


def make_trainer(model: YOCOForCausalLM, **overrides) -> Trainer:
    fields = {"steps": 8, "batch_size": 2, "seq_len": 32, "lr": 1e-3, "warmup_steps": 3, "seed": 5}
    config = TrainingConfig(**(fields | overrides))
    return Trainer(model, config, Batches(BYTES, config.batch_size, config.seq_len, config.seed))


# ---- schedule and data ------------------------------------------------------------------------------


def test_schedule() -> None:
    config = TrainingConfig(steps=110, warmup_steps=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(config, step) for step in range(112)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.55) and rates[110] == rates[111] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_every_window_comes_once_an_epoch() -> None:
    batches = Batches(torch.arange(1000), batch_size=1, seq_len=40, seed=1)
    assert batches.windows == 23
    for epoch in range(3):
        firsts = [int(batches[epoch * 23 + i][0, 0]) for i in range(23)]
        shift = min(firsts)
        assert sorted(firsts) == [shift + 40 * i for i in range(23)] and firsts != sorted(firsts)
    row = batches[7][0]
    assert torch.equal(row, torch.arange(int(row[0]), int(row[0]) + 41))
    again = Batches(torch.arange(1000), batch_size=1, seq_len=40, seed=1)
    assert torch.equal(again[50], batches[50]) and torch.equal(again[7][0], row)  # in any order
    assert not torch.equal(Batches(torch.arange(1000), 1, 40, seed=2)[7][0], row)
    with pytest.raises(ValueError, match="must be longer than two windows"):
        Batches(torch.arange(1000), 1, 500)


def test_corpus_holds_files_out_by_name(tmp_path) -> None:
    for i in range(60):
        (tmp_path / f"{i}.txt").write_bytes(b"text %d " % i * 20)
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "picture.png").write_bytes(b"png" * 100)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.py").write_bytes(b"cached " * 100)
    corpus = load_corpus(tmp_path)
    train = bytes(corpus.train.tolist())
    assert 0 < len(corpus.held_out) < 10
    for i in range(60):
        assert (b"text %d " % i in train) != (f"{i}.txt" in corpus.held_out)
    assert b"png" not in train and b"cached" not in train and b"a\0b" not in train
    again = load_corpus(tmp_path)
    assert torch.equal(again.train, corpus.train) and again.held_out == corpus.held_out


def test_corpus_of_one_file_and_of_nothing(tmp_path) -> None:
    (tmp_path / "book.txt").write_bytes(TEXT)
    corpus = load_corpus(tmp_path / "book.txt")
    assert bytes(corpus.train.tolist()) + corpus.held_out_bytes == TEXT
    assert len(corpus.held_out_bytes) == len(TEXT) // 25
    for path, message in (
        (tmp_path / "missing", "neither a file nor a folder"),
        (tmp_path / "empty", "too little text"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            load_corpus(path)


def test_the_standard_library_is_a_corpus() -> None:
    corpus = load_corpus()
    assert corpus.train.numel() > 3_000_000 and len(corpus.held_out) > 5
    assert all(name.endswith(".py") and "test" not in name.split("/") for name in corpus.held_out)


# ---- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns(self_decoder: str, precision: str) -> None:
    model = byte_model(self_decoder)
    before = bits_per_byte(model, TEXT[-2000:], seq_len=100)
    trainer = make_trainer(model, steps=60, seq_len=64, batch_size=4, lr=1e-2, precision=precision)
    trainer.run(progress=False)
    after = bits_per_byte(model, TEXT[-2000:], seq_len=100)
    assert after < 0.5 * before and trainer.losses[-1] < 0.5 * trainer.losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("self_decoder", SELF_DECODERS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resume_continues_bit_for_bit(self_decoder: str, precision: str, tmp_path) -> None:
    through = make_trainer(byte_model(self_decoder), precision=precision, accumulate=2)
    through.run(progress=False)
    first = make_trainer(byte_model(self_decoder), precision=precision, accumulate=2)
    first.run(until=5, progress=False)
    first.save(tmp_path)
    torch.manual_seed(99)  # whatever happened in between
    second = Trainer.resume(tmp_path, BYTES)
    assert second.step == 5 and second.config == first.config
    second.run(progress=False)
    assert second.losses == through.losses
    for a, b in zip(through.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulated_batches_are_one_big_batch() -> None:
    results = []
    for batch_size, accumulate in ((4, 1), (1, 4)):
        model = byte_model(ops="reference").double()
        trainer = make_trainer(model, steps=3, batch_size=batch_size, accumulate=accumulate)
        trainer.run(progress=False)
        results.append((trainer.losses, list(model.parameters())))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-9)


def test_checkpointing_and_decay_are_wired_up() -> None:
    model = byte_model(tie_embeddings=True)
    trainer = make_trainer(model, checkpoint_activations=True, weight_decay=0.3)
    assert model.cross_decoder.checkpoint_activations and model.self_decoder.checkpoint_activations
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if "norm" in name else 0.3)
    assert [group["betas"] for group in trainer.optimizer.param_groups] == [(0.9, 0.95)] * 2


def test_the_gradient_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(byte_model(), clip_norm=1e-3)
    norms = []

    def spy(*args: object) -> None:
        gradients = [p.grad.flatten() for p in trainer.model.parameters()]
        norms.append(torch.cat(gradients).norm().item())

    trainer.optimizer.register_step_pre_hook(spy)
    trainer.train_step()
    assert norms == pytest.approx([1e-3], rel=1e-3)


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights() -> None:
    model = byte_model()
    trainer = make_trainer(model)
    trainer.train_step()
    with torch.no_grad():
        model.layer_norm.weight[3] = torch.inf
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        trainer.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be positive"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16"),
    ],
)
def test_bad_settings_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**fields)


def test_resuming_nothing_says_so(tmp_path) -> None:
    with pytest.raises(ValueError, match="nothing to resume"):
        Trainer.resume(tmp_path, BYTES)


# ---- measuring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 39, 40, 41, 200])
def test_bits_per_byte_counts_every_byte_once(length: int) -> None:
    model = byte_model(ops="reference")
    text = TEXT[:length]
    bits = 0.0
    for start in range(0, length, 40):
        window = text[max(0, start - 1) : start + 40]
        window = b"\0" + window if start == 0 else window
        ids = torch.tensor([list(window)])
        logs = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])
        bits -= logs.sum().item() / math.log(2)
    assert bits_per_byte(model, text, seq_len=40, batch_size=2) == pytest.approx(bits / length, rel=1e-5)
