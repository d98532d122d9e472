"""Checkpoints: exact round trips, the official code's and fla's names, clear refusals."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SELF_DECODERS, tiny_config, tiny_model, tokens

from yoco_ext import YOCOForCausalLM
from yoco_ext.checkpoint import from_fla, load_checkpoint, load_state_dict, save_checkpoint, to_fla

both_decoders = pytest.mark.parametrize("self_decoder", SELF_DECODERS)


def same_weights(a: YOCOForCausalLM, b: YOCOForCausalLM) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left)


@both_decoders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_exact(self_decoder: str, dtype: torch.dtype, tied: bool, tmp_path) -> None:
    model = tiny_model(self_decoder, "reference", dtype, tie_embeddings=tied)
    model.save(tmp_path / "a" / "b")
    loaded = YOCOForCausalLM.load(tmp_path / "a" / "b", ops="reference")
    same_weights(model, loaded)
    assert loaded.config == model.config
    assert (loaded.output_projection.weight is loaded.embed_tokens.weight) == tied
    assert torch.equal(model(tokens(1, 9) * 0 + 5), loaded(tokens(1, 9) * 0 + 5))
    assert ("output_projection.weight" in load_file(tmp_path / "a" / "b" / "model.safetensors")) != tied


def test_dtype_can_be_chosen(tmp_path) -> None:
    save_checkpoint(tiny_model(ops="reference"), tmp_path)
    model = load_checkpoint(tmp_path, ops="reference", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.cross_decoder.rotary.inv_freq.dtype == torch.float32


# ---- the official code ------------------------------------------------------------------------------

OFFICIAL_RETENTION = {
    "embed_tokens.weight",
    "output_projection.weight",
    "layer_norm.weight",
    "cross_decoder.k_proj.weight",
    "cross_decoder.v_proj.weight",
    "cross_decoder.kv_layer_norm.weight",
    *(f"self_decoder.layers.0.mixer.{p}_proj.weight" for p in ("q", "k", "v", "g", "gt", "out")),
    *(f"cross_decoder.layers.0.mixer.{p}_proj.weight" for p in ("q", "out")),
    *(
        f"{side}_decoder.layers.0.{name}.weight"
        for side in ("self", "cross")
        for name in ("mixer_layer_norm", "final_layer_norm", "ffn.fc1", "ffn.gate", "ffn.fc2")
    ),
}


def test_our_names_are_the_official_ones() -> None:
    assert set(tiny_model(ops="reference", num_layers=2).state_dict()) == OFFICIAL_RETENTION
    window = tiny_model("sliding_window", "reference", num_layers=2).state_dict()
    assert set(window) == {n for n in OFFICIAL_RETENTION if ".g_proj" not in n and ".gt_proj" not in n}


@pytest.mark.parametrize("prefix", ["", "model.", "decoder.model."])
@pytest.mark.parametrize("nested", [False, True])
def test_official_folder_loads(prefix: str, nested: bool, tmp_path) -> None:
    model = tiny_model(ops="reference", num_self_heads=2)
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": weights} if nested else weights, tmp_path / "checkpoint_last.pt")
    params = {"dim": 64, "n_layers": 4, "hidden_dim": 96, "n_self_heads": 2, "n_attn_heads": 4, "n_attn_kv_heads": 2}
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": 61, "rope_theta": 10_000.0}))
    same_weights(model, load_checkpoint(tmp_path, ops="reference"))


# ---- fla --------------------------------------------------------------------------------------------


@both_decoders
def test_fla_names(self_decoder: str) -> None:
    config = tiny_config(self_decoder, num_layers=3)
    model = YOCOForCausalLM(config, "reference")
    exported = to_fla(model.state_dict())
    pairs = {
        "model.embeddings.weight": "embed_tokens.weight",
        "model.norm.weight": "layer_norm.weight",
        "lm_head.weight": "output_projection.weight",
        "model.shared_kv_builder.kv_norm.weight": "cross_decoder.kv_layer_norm.weight",
        "model.shared_kv_builder.k_proj.weight": "cross_decoder.k_proj.weight",
        "model.shared_kv_builder.v_proj.weight": "cross_decoder.v_proj.weight",
        "model.self_layers.0.attn.q_proj.weight": "self_decoder.layers.0.mixer.q_proj.weight",
        "model.self_layers.0.attn.o_proj.weight": "self_decoder.layers.0.mixer.out_proj.weight",
        "model.self_layers.0.attn_norm.weight": "self_decoder.layers.0.mixer_layer_norm.weight",
        "model.cross_layers.1.attn.q_proj.weight": "cross_decoder.layers.1.mixer.q_proj.weight",
        "model.cross_layers.1.mlp_norm.weight": "cross_decoder.layers.1.final_layer_norm.weight",
        "model.cross_layers.1.mlp.gate_proj.weight": "cross_decoder.layers.1.ffn.fc1.weight",
        "model.cross_layers.1.mlp.up_proj.weight": "cross_decoder.layers.1.ffn.gate.weight",
        "model.cross_layers.1.mlp.down_proj.weight": "cross_decoder.layers.1.ffn.fc2.weight",
    }
    if self_decoder == "gated_retention":
        pairs["model.self_layers.0.attn.gk_proj.weight"] = "self_decoder.layers.0.mixer.gt_proj.weight"
        pairs["model.self_layers.0.attn.g_proj.weight"] = "self_decoder.layers.0.mixer.g_proj.weight"
    ours = model.state_dict()
    for fla, official in pairs.items():
        assert exported[fla] is not None and torch.equal(exported[fla], ours[official]), fla
    assert len(exported) == len(ours)
    assert {n: id(t) for n, t in from_fla(exported, config).items()}.keys() == ours.keys()
    other = YOCOForCausalLM(config, "reference")
    load_state_dict(other, exported)
    same_weights(model, other)


def test_fla_folder_loads(tmp_path) -> None:
    model = tiny_model(
        ops="reference", self_rope="official", cross_rope="standard_interleaved", norm_eps=1e-6, window_size=1024
    )
    fields = {
        "model_type": "yoco",
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_self_decoder_layers": 2,
        "self_decoder_attn": {"type": "gated_retention", "num_heads": 2, "rope_inv_freq": "yoco"},
        "cross_decoder_attn": {"num_heads": 4, "num_kv_heads": 2, "rope_inv_freq": "fla"},
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file({n: t.contiguous() for n, t in to_fla(model.state_dict()).items()}, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path, ops="reference")
    same_weights(model, loaded)
    assert loaded.config == model.config


# ---- refusals ---------------------------------------------------------------------------------------


def test_wrong_weights_are_named() -> None:
    model = tiny_model(ops="reference")
    weights = dict(model.state_dict())
    for change, message in (
        ({"layer_norm.weight": None}, "missing in the checkpoint for this configuration: layer_norm.weight"),
        ({"layer_norm.bias": torch.zeros(64)}, "unknown in the checkpoint .*: layer_norm.bias"),
        (
            {"layer_norm.weight": torch.zeros(32)},
            r"layer_norm.weight has shape \[32\], the configuration asks for \[64\]",
        ),
    ):
        changed = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            load_state_dict(model, changed)
    with pytest.raises(ValueError, match=r"not parameters of this YOCO model under fla's names: model\.x"):
        load_state_dict(model, to_fla(weights) | {"model.x": torch.zeros(1)})


def test_wrong_folders_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_checkpoint(tmp_path)
    tiny_config().save(tmp_path / "config.json")
    with pytest.raises(ValueError, match="has no weights"):
        load_checkpoint(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(ValueError, match="several weight files"):
        load_checkpoint(tmp_path)
