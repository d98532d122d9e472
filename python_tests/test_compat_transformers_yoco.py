"""YOCO as a model of transformers (compat.hf, model_type "yoco_ext") against yoco_ext's own model and weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from numerics import assert_rule, lengths_to_cu_seqlens
from torch import Tensor

from yoco_ext import YOCOConfig, YOCOForCausalLM

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers (requirements-compat.txt) is not installed",
)
VOCAB = tiny.VOCAB
KINDS = pytest.mark.parametrize("kind", tiny.SELF_DECODERS)
PROMPTS = (19, 4, 11)


@pytest.fixture(autouse=True)
def hf() -> Iterator[Any]:
    from yoco_ext.compat import hf

    hf.install()
    yield hf


def make(kind: str, **options: Any) -> Any:
    """transformers' model and, as its `.model`, ours with the same parameters."""
    from yoco_ext.compat import hf

    native = tiny.tiny_model(kind, **{k: v for k, v in options.items() if k == "tie_embeddings"})
    settings = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0} | options
    model = hf.YOCOExtForCausalLM(hf.YOCOExtConfig(**native.config.to_dict() | settings))
    model.model.load_state_dict(native.state_dict())
    return model.eval()


def prompts() -> list[list[int]]:
    return [torch.randint(1, VOCAB, (n,)).tolist() for n in PROMPTS]


def padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, **arguments: Any) -> Any:
    return model.generate(**{"max_new_tokens": 12, "do_sample": False} | arguments)


# ---- forward ---------------------------------------------------------------------------------------------------------
@KINDS
def test_logits_loss_and_gradients(kind):
    model = make(kind)
    reference = [YOCOForCausalLM(model.model.config, "reference").to(dtype) for dtype in (torch.float64, torch.float32)]
    ids = tiny.tokens(2, 33)
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    out.loss.backward()
    assert out.past_key_values is None, "no cache where gradients are recorded"
    losses, logits = [], []
    for other in reference:
        other.load_state_dict(model.model.state_dict())
        logits.append(other(ids))
        losses.append(other(ids[:, :-1], targets=labels[:, 1:]))
        losses[-1].backward()
    assert_rule("logits", out.logits.detach(), *(x.detach() for x in logits), length=33)
    assert_rule("loss", out.loss.detach(), *(x.detach() for x in losses), length=33)
    for name, parameter in model.model.named_parameters():
        others = [other.get_parameter(name).grad for other in reference]
        assert_rule(f"gradient of {name}", parameter.grad, *others, length=66)


@pytest.mark.parametrize("side", ["left", "right"])
@KINDS
def test_padding_changes_nothing(kind, side):
    """Logits, loss and gradients of a padded batch are those of its sequences alone."""
    model, rows = make(kind), prompts()
    batch = padded(rows, side)
    kept = batch["attention_mask"].bool()
    labels = batch["input_ids"].where(kept, -100)
    out = model(**batch, labels=labels)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = [model(torch.tensor([row])).logits[0] for row in rows]
    torch.testing.assert_close(out.logits[kept], torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert not out.logits[~kept].any()
    loss = sum(F.cross_entropy(x[:-1], torch.tensor(r[1:]), reduction="sum") for x, r in zip(alone, rows))
    loss = loss / (sum(PROMPTS) - len(PROMPTS))
    loss.backward()
    torch.testing.assert_close(out.loss, loss, atol=1e-6, rtol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-5, rtol=1e-4)


@KINDS
def test_packed_sequences(kind):
    model, rows = make(kind), prompts()
    ids = torch.tensor([[token for row in rows for token in row]])
    alone = torch.cat([model(torch.tensor([row])).logits for row in rows], 1)
    positions = torch.cat([torch.arange(n) for n in PROMPTS])[None]
    for packing in ({"position_ids": positions}, {"cu_seq_lens_q": lengths_to_cu_seqlens(PROMPTS)}):
        torch.testing.assert_close(model(ids, **packing).logits, alone, atol=1e-5, rtol=1e-4)
    # Two rows, each of several sequences, and positions that say nothing.
    twice = model(ids.repeat(2, 1), position_ids=positions.repeat(2, 1)).logits
    torch.testing.assert_close(twice, alone.repeat(2, 1, 1), atol=1e-5, rtol=1e-4)
    plain = torch.arange(ids.shape[1])[None]
    assert torch.equal(model(ids, position_ids=plain).logits, model(ids).logits)


def test_fused_loss_and_items_in_batch():
    model, rows = make("gated_retention"), prompts()
    batch = padded(rows, "left")
    labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    for arguments in ({"input_ids": batch["input_ids"], "labels": batch["input_ids"]}, {**batch, "labels": labels}):
        for items in ({}, {"num_items_in_batch": torch.tensor(50)}):
            results = []
            for fused in (False, True):
                model.config.fused_loss = fused
                model.zero_grad()
                out = model(**arguments, **items)
                assert (out.logits is None) == fused
                out.loss.backward()
                results.append((out.loss.detach(), [p.grad.clone() for p in model.parameters()]))
            torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


@KINDS
def test_gradient_checkpointing(kind):
    model = make(kind).train()
    ids, gradients = tiny.tokens(2, 21), []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == enabled
        assert model.model.self_decoder.checkpoint_activations == enabled
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    model.gradient_checkpointing_disable()
    assert not model.model.cross_decoder.checkpoint_activations


# ---- generation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@KINDS
def test_greedy_generation_of_padded_prompts(kind, side):
    model, rows = make(kind), prompts()
    out = generate(model, **padded(rows, side))[:, max(PROMPTS) :]
    assert out.tolist() == model.model.generate(rows, 12)


@KINDS
def test_generation_without_cache(kind):
    model, batch = make(kind), padded(prompts(), "left")
    assert torch.equal(generate(model, **batch), generate(model, **batch, use_cache=False))


@KINDS
def test_beams_follow_their_sequences(kind):
    model, batch = make(kind), padded(prompts(), "left")
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(model, **batch, **beams), generate(model, **batch, **beams, use_cache=False))


def test_sampling_several_sequences():
    model, batch = make("gated_retention"), padded(prompts(), "left")
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        options = {"do_sample": True, "top_k": 10, "num_return_sequences": 3, "use_cache": use_cache}
        results.append(generate(model, **batch, **options))
    assert torch.equal(*results) and results[0].shape[0] == 9


@KINDS
def test_a_conversation_keeps_its_cache(kind, hf):
    model = make(kind)

    def answer(ids: Tensor, **options: Any) -> Tensor:  # with a mask: generate would take tokens 0 for padding
        return generate(model, input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    cache = hf.YOCOExtCache(max_length=64)
    first = answer(tiny.tokens(2, 9), past_key_values=cache, max_new_tokens=5)
    assert cache.get_seq_length() == 13, "the last token is generated, not yet seen"
    longer = torch.cat([first, tiny.tokens(2, 20)], 1)
    assert torch.equal(answer(longer, past_key_values=cache), answer(longer))


@KINDS
def test_forward_with_a_cache_in_pieces(kind, hf):
    model, batch = make(kind), padded([torch.randint(1, VOCAB, (n,)).tolist() for n in (40, 31)], "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        whole = model(**batch, use_cache=False).logits
        for pieces in ((15, 20, 5), (20, 1, 1, 18)):  # the decode kernels take up to 16 tokens
            cache, logits, end = hf.YOCOExtCache(), [], 0
            for piece in pieces:
                begin, end = end, end + piece
                out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
                assert out.past_key_values is cache
                logits.append(out.logits)
            found = torch.cat(logits, 1)[mask.bool()]
            torch.testing.assert_close(found, whole[mask.bool()], atol=1e-4, rtol=1e-4)
        last = model(**batch, logits_to_keep=1).logits
        torch.testing.assert_close(last, whole[:, -1:], atol=1e-4, rtol=1e-4)
        some = model(ids, logits_to_keep=torch.tensor([3, 17]), use_cache=False).logits
        assert torch.equal(some, model(ids, use_cache=False).logits[:, [3, 17]])


# ---- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True])
@KINDS
def test_save_and_load(kind, tied, tmp_path, hf):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = make(kind, tie_embeddings=tied)
    ids = tiny.tokens(2, 20)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is hf.YOCOExtForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is hf.YOCOExtConfig
    assert loaded.config.to_yoco() == model.model.config == loaded.model.config
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low(ids).logits.dtype == torch.bfloat16
    frequencies = low.model.self_decoder.layers[0].mixer.rotary.inv_freq
    assert torch.equal(frequencies, model.model.self_decoder.layers[0].mixer.rotary.inv_freq)
    # yoco_ext itself reads the folder.
    native = YOCOForCausalLM.load(tmp_path)
    assert native.config == model.model.config
    assert torch.equal(native(ids), model(ids).logits)


def test_a_folder_of_yoco_ext_loads(tmp_path, hf):
    from transformers import AutoModelForCausalLM

    from yoco_ext.convert import convert_checkpoint

    native, ids = tiny.tiny_model(), tiny.tokens(2, 20)
    native.save(tmp_path / "native")
    loaded = hf.YOCOExtForCausalLM.from_pretrained(tmp_path / "native")
    assert torch.equal(loaded(ids).logits, native(ids))
    convert_checkpoint(tmp_path / "native", tmp_path / "hf", to="hf")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(converted(ids).logits, native(ids))


def test_a_new_model_is_initialised_as_yoco_ext_does_it(hf):
    from transformers import AutoModelForCausalLM

    config = tiny.tiny_config(hidden_size=128, vocab_size=500)
    model = AutoModelForCausalLM.from_config(hf.YOCOExtConfig(**config.to_dict()))
    native = YOCOForCausalLM(config)
    for name, parameter in native.named_parameters():
        ours = model.model.get_parameter(name)
        torch.testing.assert_close(ours.std(), parameter.std(), atol=1e-6, rtol=0.15, msg=name)
        torch.testing.assert_close(ours.mean(), parameter.mean(), atol=0.02, rtol=0, msg=name)


def test_configuration(hf):
    config = hf.YOCOExtConfig(num_hidden_layers=6, num_attention_heads=8, hidden_size=512, tie_word_embeddings=True)
    assert config.to_yoco() == YOCOConfig(num_layers=6, num_heads=8, hidden_size=512, tie_embeddings=True)
    assert config.num_hidden_layers == config.num_layers == 6
    preset = YOCOConfig.preset("160m", window_size=77)
    assert hf.YOCOExtConfig(**preset.to_dict()).to_yoco() == preset
    assert hf.YOCOExtConfig.from_dict(hf.YOCOExtConfig(**preset.to_dict()).to_dict()).to_yoco() == preset
    with pytest.raises(ValueError, match="num_self_layers must be below"):
        hf.YOCOExtConfig(num_layers=2, num_self_layers=2)


def test_errors(hf):
    from transformers import DynamicCache

    model, ids = make("gated_retention"), tiny.tokens(2, 9)
    with pytest.raises(ValueError, match="past_key_values: got DynamicCache; allowed: YOCOExtCache or None"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="inputs_embeds is not supported"):
        model(inputs_embeds=torch.randn(2, 9, 64))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[2, 1, 9, 9\]"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(NotImplementedError, match="cannot be shortened"):
        hf.YOCOExtCache().crop(1)
    with torch.no_grad(), pytest.raises(ValueError, match="max_length 8, 9 tokens do not fit"):
        model(ids, past_key_values=hf.YOCOExtCache(max_length=8))
