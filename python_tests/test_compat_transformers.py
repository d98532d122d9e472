"""compat.hf: transformers' own models with attn_implementation="yoco_ext" against their eager attention.

Random weights. "Exact" is the eager model in float64, one sequence after the other without padding; "plain" the eager
model in float32 on the same input as ours (numerics.assert_rule).
YOCO as a model of transformers is tested in test_compat_transformers_yoco.py.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_rule
from torch import Tensor

# Found, not imported: collecting this file must not cost the seconds that importing transformers takes.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers (requirements-compat.txt) is not installed",
)
VOCAB = 61
TIME = 37
WINDOW = 8
MODELS = ("llama", "mistral", "gemma2", "gemma3n", "gpt_oss")


@pytest.fixture(autouse=True)
def hf() -> Iterator[Any]:
    from yoco_ext.compat import hf

    hf.install()
    hf._logged.clear()
    yield hf


def make_model(name: str) -> Any:
    """Two to six layers with the attention of the model that gives its name."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    sliding = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    if name == "llama":
        config = transformers.LlamaConfig(**common)
        model = transformers.LlamaForCausalLM(config)
    elif name == "mistral":
        config = transformers.MistralConfig(**common, sliding_window=WINDOW)
        model = transformers.MistralForCausalLM(config)
    elif name == "gemma2":
        config = transformers.Gemma2Config(
            **common, **sliding, attn_logit_softcapping=2.0, final_logit_softcapping=None, query_pre_attn_scalar=16
        )
        model = transformers.Gemma2ForCausalLM(config)
    elif name == "gpt_oss":
        config = transformers.GptOssConfig(**common, **sliding, num_local_experts=2, num_experts_per_tok=1)
        config._experts_implementation = "eager"  # the others know no float64
        model = transformers.GptOssForCausalLM(config)
    else:  # layers 3 and 4 use the K and V of layers 1 and 2
        config = transformers.Gemma3nTextConfig(
            **{**common, "num_hidden_layers": 4},
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            laurel_rank=4,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0] * 4,
        )
        model = transformers.Gemma3nForCausalLM(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "proj" in parameter_name and parameter.dim() == 2:
                parameter.normal_(std=0.25)  # sharp enough attention that a wrong mask is far outside the tolerance
            elif "sinks" in parameter_name:
                parameter.normal_()
    return model.eval()


def with_implementation(model: Any, name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(name)
    return model


def padding_mask(side: str, *lengths: int) -> Tensor | None:
    if side == "none":
        return None
    rows = [[0] * (TIME - n) + [1] * n if side == "left" else [1] * n + [0] * (TIME - n) for n in lengths]
    return torch.tensor(rows)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, side, monkeypatch):
    model = make_model(name)
    ids, mask = torch.randint(1, VOCAB, (3, TIME)), padding_mask(side, TIME, 5, 20)
    kept = torch.ones(3, TIME, dtype=torch.bool) if mask is None else mask.bool()
    upstream = torch.randn(3, TIME, VOCAB) * kept[..., None]
    found = []
    for implementation, dtype in (("yoco_ext", torch.float32), ("eager", torch.float64), ("eager", torch.float32)):
        judged = with_implementation(model, implementation, dtype)
        if implementation == "yoco_ext":  # what follows must not come from the fallback
            monkeypatch.setattr("yoco_ext.compat.hf._plain", None)
        if dtype == torch.float64:
            logits = torch.cat([judged(row[k][None], use_cache=False).logits[0] for row, k in zip(ids, kept)])
        else:
            logits = judged(ids, attention_mask=mask, use_cache=False).logits[kept]
        logits.backward(upstream[kept].to(dtype))
        gradients = {n: p.grad for n, p in judged.named_parameters() if p.grad is not None}
        found.append((logits.detach(), gradients))
    (ours, our_gradients), (exact, exact_gradients), (plain, plain_gradients) = found
    assert_rule("logits", ours, exact, plain, length=TIME)
    assert our_gradients.keys() == exact_gradients.keys()
    for parameter in our_gradients:
        gradients = (our_gradients[parameter], exact_gradients[parameter], plain_gradients[parameter])
        assert_rule(f"gradient of {parameter}", *gradients, length=3 * TIME)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation(name, cache, side):
    model = make_model(name)
    ids, mask = torch.randint(1, VOCAB, (3, TIME)), padding_mask(side, TIME, 5, 20)
    tokens, scores = [], []
    for implementation in ("eager", "yoco_ext"):
        judged = with_implementation(model, implementation)
        out = judged.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens.append(out.sequences)
        scores.append(torch.stack(out.logits))
    assert torch.equal(*tokens)
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_pieces(name):
    """Several new tokens behind a cache, more and fewer than the decode kernel takes."""
    model = make_model(name)
    ids, mask = torch.randint(1, VOCAB, (2, TIME)), padding_mask("left", TIME, 30)
    ours = with_implementation(model, "yoco_ext")
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        for piece in (6, 20):
            past, logits = None, []
            for begin in range(0, TIME, piece):
                end = min(begin + piece, TIME)
                out = ours(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=past, use_cache=True)
                past = out.past_key_values
                logits.append(out.logits)
            pieces = torch.cat(logits, 1)[mask.bool()]
            torch.testing.assert_close(pieces, whole[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences_by_position(name):
    model = make_model(name)
    ids = torch.randint(1, VOCAB, (1, TIME))
    positions = torch.cat([torch.arange(n) for n in (11, 1, 25)])[None]
    logits = with_implementation(model, "yoco_ext")(ids, position_ids=positions, use_cache=False).logits
    expected = [model(part).logits for part in ids.split([11, 1, 25], 1)]
    torch.testing.assert_close(logits, torch.cat(expected, 1), atol=1e-5, rtol=1e-4)


def test_packed_sequences_by_boundaries():
    model = with_implementation(make_model("llama"), "yoco_ext")
    ids = torch.randint(1, VOCAB, (1, TIME))
    positions = torch.cat([torch.arange(n) for n in (11, 1, 25)])[None]
    boundaries = torch.tensor([0, 11, 12, 37])
    attention = model.model.layers[0].self_attn
    q, k, v = (torch.randn(1, heads, TIME, 16) for heads in (4, 2, 2))
    from yoco_ext.compat import hf

    packed, _ = hf.attention(attention, q, k, v, None, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries)
    parts = [
        hf.attention(attention, *(x[:, :, a:b] for x in (q, k, v)), None)[0] for a, b in ((0, 11), (11, 12), (12, 37))
    ]
    torch.testing.assert_close(packed, torch.cat(parts, 1), atol=1e-6, rtol=1e-5)
    assert model(ids, position_ids=positions, use_cache=False).logits.isfinite().all()


def test_gradient_checkpointing():
    gradients = []
    model = with_implementation(make_model("gemma2"), "yoco_ext").train()
    ids = torch.randint(1, VOCAB, (2, TIME))
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, attention_mask=padding_mask("left", TIME, 9), labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


@pytest.mark.unpoisoned
def test_one_graph_under_compile():
    model = with_implementation(make_model("mistral"), "yoco_ext")
    ids = torch.randint(1, VOCAB, (2, TIME))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mask in (None, padding_mask("left", TIME, 9)):
        kept = torch.ones(2, TIME, dtype=torch.bool) if mask is None else mask.bool()
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        logits = compiled(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(logits[kept], expected[kept], atol=1e-5, rtol=1e-4)


# ---- masks -----------------------------------------------------------------------------------------------------------
def dense(mask: Tensor | None, q_length: int, kv_length: int) -> Tensor:
    """What a mask of compat.hf means, bool [B or 1, 1, Tq, Tk]."""
    from yoco_ext.compat import hf

    query, key = torch.empty(1, 1, q_length, 8), torch.empty(1, 1, kv_length, 8)
    if mask is None:
        return hf._dense_mask(None, None, query, key)
    if mask.dtype == torch.bool:
        return mask
    return hf._dense_mask(None if mask.shape[2] == 0 else mask, mask.shape[3], query, key)


@pytest.mark.parametrize("padding", ["none", "left", "right", "both"])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("lengths", [(7, 0, 7, 0), (3, 9, 12, 0), (1, 20, 6, 15), (4, 6, 32, 0), (1, 6, 32, 0)])
def test_masks_mean_what_transformers_masks_mean(hf, monkeypatch, lengths, window, padding):
    from transformers import masking_utils

    q_length, q_offset, kv_length, kv_offset = lengths
    function = masking_utils.causal_mask_function
    if window is not None:
        function = masking_utils.sliding_window_causal_mask_function(window)
    total, batch = q_offset + q_length, 4
    mask = None
    if padding != "none":
        first = torch.randint(0, total, (batch, 1)) if padding in ("left", "both") else torch.zeros(batch, 1)
        last = (
            torch.randint(1, total + 1, (batch, 1)) if padding in ("right", "both") else torch.full((batch, 1), total)
        )
        mask = (torch.arange(total) >= first) & (torch.arange(total) < torch.maximum(last, first + 1))
    arguments: dict[str, Any] = {
        "batch_size": batch,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": mask,
        "allow_is_causal_skip": True,
    }
    expected = masking_utils.sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    monkeypatch.setattr(masking_utils, "sdpa_mask", None)  # the dense mask is never made
    ours = hf.attention_mask(**arguments, local_size=window, dtype=torch.float32, use_vmap=False)
    assert ours is None or ours.numel() <= 2 * batch * q_length
    assert torch.equal(dense(ours, q_length, kv_length).expand_as(expected), expected)


def test_unknown_masks_are_made_as_transformers_makes_them(hf):
    from transformers import masking_utils

    kept = torch.ones(2, 9, dtype=torch.bool)
    kept[1, 4] = False  # a hole
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))
    overlay = masking_utils.or_masks(masking_utils.causal_mask_function, lambda batch, head, q, k: k < 3)
    sliding = masking_utils.sliding_window_causal_mask_function(3)
    for function, mask in (
        (masking_utils.causal_mask_function, kept),
        (sliding, kept),
        (chunked, None),
        (overlay, kept),
    ):
        arguments = {"batch_size": 2, "q_length": 9, "kv_length": 9, "mask_function": function, "attention_mask": mask}
        expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
        assert torch.equal(hf.attention_mask(**arguments, allow_is_causal_skip=False), expected)
        if mask is not None:
            assert torch.equal(hf.attention_mask(**arguments), expected)
    # A model that wants the mask itself, to join it with another one, gets it.
    plain = {"batch_size": 2, "q_length": 9, "kv_length": 9}
    assert hf.attention_mask(**plain) is None
    expected = masking_utils.sdpa_mask(**plain, allow_is_causal_skip=False)
    assert torch.equal(hf.attention_mask(**plain, allow_is_causal_skip=False), expected)


# ---- what is left to PyTorch -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["holes", "own mask", "head dimension", "sinks and softcap"])
def test_fallback_agrees_with_eager_and_says_so_once(kind, caplog, hf):
    import transformers

    name = {"sinks and softcap": "gemma2"}.get(kind, "llama")
    model = make_model(name)
    if kind == "head dimension":
        config = copy.deepcopy(model.config)
        config.head_dim = 12
        model = transformers.LlamaForCausalLM(config).eval()
    ids, mask = torch.randint(1, VOCAB, (2, 15)), None
    if kind in ("holes", "sinks and softcap"):
        mask = torch.ones(2, 15, dtype=torch.long)
        mask[0, 4:6] = mask[1, 9] = 0
    elif kind == "own mask":
        mask = (torch.rand(2, 1, 15, 15) < 0.7) | torch.eye(15, dtype=torch.bool)
    ours = with_implementation(model, "yoco_ext")
    with caplog.at_level(logging.WARNING, logger="yoco_ext.compat.hf"):
        logits = [ours(ids, attention_mask=mask).logits for _ in range(2)][1]
    if kind == "own mask":  # eager adds its masks
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    kept = slice(None) if mask is None or mask.dim() == 4 else mask.bool()
    torch.testing.assert_close(logits[kept], model(ids, attention_mask=mask).logits[kept], atol=1e-5, rtol=1e-4)
    assert len(caplog.records) == 1, caplog.text


def test_dropout_and_sinks_in_the_fallback(hf, caplog):
    module = torch.nn.Module()
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    sinks = torch.randn(4)
    exact, _ = hf.attention(module, q, k, v, None, s_aux=sinks, softcap=3.0)
    dense = hf._dense_mask(None, None, q, k)
    plain = hf._plain(q, k, v, dense, None, 3.0, sinks, 0.0, None).transpose(1, 2)
    torch.testing.assert_close(exact, plain, atol=1e-6, rtol=1e-5)
    with caplog.at_level(logging.WARNING, logger="yoco_ext.compat.hf"):
        torch.manual_seed(5)
        ours, _ = hf.attention(module, q, k, v, None, dropout=0.3)
    torch.manual_seed(5)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert [r.getMessage() for r in caplog.records] == [
        'attn_implementation="yoco_ext": left to PyTorch, because dropout=0.3'
    ]


def test_errors(hf):
    with pytest.raises(NotImplementedError, match="no paged cache"):
        hf.attention(torch.nn.Module(), *torch.randn(3, 1, 2, 4, 8), None, cache=object())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf.nothing
