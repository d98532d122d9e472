"""YOCOConfig: presets against the paper, validation, JSON, other code bases' files."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config

from yoco_ext import YOCOConfig, YOCOForCausalLM

PRESETS = {
    "160m": 0.16e9,
    "400m": 0.4e9,
    "830m": 0.83e9,
    "1.4b": 1.4e9,
    "2.7b": 2.7e9,
    "6.8b": 6.8e9,
    "13b": 13e9,
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_size_of_its_name(name: str) -> None:
    config = YOCOConfig.preset(name)
    total = config.num_parameters + config.vocab_size * config.hidden_size
    assert 1.0 < total / PRESETS[name] < 1.08
    assert config.self_head_dim == 256 and config.intermediate_size == 3 * config.hidden_size


def test_3b_is_the_papers() -> None:
    config = YOCOConfig.preset("3B")
    assert config == YOCOConfig(num_kv_heads=8)
    assert (config.num_self_layers, config.num_cross_layers) == (13, 13)
    assert (config.head_dim, config.self_head_dim) == (128, 128)
    assert config.num_parameters == pytest.approx(2.83e9, rel=2e-3)


@pytest.mark.parametrize("overrides", [{}, {"self_decoder": "sliding_window", "num_self_kv_heads": 1}])
def test_num_parameters_counts_the_model(overrides: dict) -> None:
    config = tiny_config(num_layers=5, num_self_layers=2, **overrides)
    with torch.device("meta"):
        model = YOCOForCausalLM(config, "reference")
    counted = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "output_p" not in name)
    assert config.num_parameters == counted


def test_sliding_window_presets_use_the_attention_heads() -> None:
    config = YOCOConfig.preset("160m", self_decoder="sliding_window", window_size=512)
    assert config.num_self_heads == 12 and config.window_size == 512


def test_json_round_trip(tmp_path) -> None:
    config = tiny_config(rope_theta=640_000.0, cross_rope="none", tie_embeddings=True)
    config.save(tmp_path / "config.json")
    assert YOCOConfig.load(tmp_path / "config.json") == config
    assert YOCOConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
        ({"hidden_size": 64.0}, "hidden_size must be of type int"),
        ({"tie_embeddings": 1}, "tie_embeddings must be of type bool"),
        ({"num_layers": True}, "num_layers must be of type int"),
        ({"num_self_layers": 4}, "at least one layer"),
        ({"num_layers": 1}, "num_self_layers must be positive"),
        ({"num_kv_heads": 3}, r"num_kv_heads \(3\) must divide num_heads \(4\)"),
        ({"num_heads": 3, "num_kv_heads": 1}, "hidden_size / num_heads must be a multiple of 8"),
        ({"num_self_heads": 16}, "hidden_size / num_self_heads must be a multiple of 8"),
        ({"hidden_size": 1024, "num_self_heads": 2}, "up to 256"),
        ({"self_decoder": "mamba"}, "self_decoder must be one of gated_retention, sliding_window"),
        ({"cross_rope": "yarn"}, "cross_rope must be one of official"),
        ({"num_self_kv_heads": 1}, "gated retention has no grouped heads"),
        ({"norm_eps": 0}, "norm_eps must be positive"),
    ],
)
def test_bad_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_unknown_names_are_listed() -> None:
    with pytest.raises(ValueError, match="unknown configuration fields: dropout, heads"):
        YOCOConfig.from_dict({"heads": 3, "dropout": 0.1})
    with pytest.raises(ValueError, match="unknown preset '7b'; there are 160m"):
        YOCOConfig.preset("7b")


def test_from_official_params() -> None:
    params = {"dim": 1024, "n_layers": 24, "hidden_dim": 3072, "n_self_heads": 4, "n_attn_heads": 8, "vocab_size": 100}
    config = YOCOConfig.from_official(params | {"rope_theta": 640_000.0})
    assert config.self_decoder == "gated_retention" and config.self_head_dim == 256 and config.num_kv_heads == 8
    assert config.rope_theta == 640_000.0 and config.self_rope == config.cross_rope == "official"
    config = YOCOConfig.from_official(params | {"sliding_window": 512, "n_attn_kv_heads": 2})
    assert config.self_decoder == "sliding_window" and config.window_size == 512 and config.num_kv_heads == 2


def test_from_fla_config() -> None:
    params = {
        "vocab_size": 100,
        "hidden_size": 512,
        "hidden_ratio": 4,
        "intermediate_size": None,
        "num_hidden_layers": 7,
        "num_self_decoder_layers": 3,
        "self_decoder_attn": {"type": "gated_retention", "num_heads": 4, "num_v_heads": 4, "rope_inv_freq": "yoco"},
        "cross_decoder_attn": {"num_heads": 8, "num_kv_heads": 2, "qk_norm": False, "rope_inv_freq": "fla"},
        "norm_eps": 1e-6,
    }
    config = YOCOConfig.from_fla(params)
    assert config.intermediate_size == 1536  # 512 * 4 * 2 / 3 = 1365, rounded up to 256
    assert (config.num_self_layers, config.num_cross_layers) == (3, 4)
    assert (config.self_rope, config.cross_rope) == ("official", "standard_interleaved")
    swa = {"type": "swa", "num_heads": 8, "num_v_heads": 4, "window_size": 64}
    config = YOCOConfig.from_fla(params | {"self_decoder_attn": swa})
    assert config.self_rope == "standard" and config.num_self_kv_heads == 4 and config.window_size == 64
    with pytest.raises(ValueError, match="got 'gated_deltanet'"):
        YOCOConfig.from_fla(params | {"self_decoder_attn": {"type": "gated_deltanet", "num_heads": 4}})
    with pytest.raises(ValueError, match="qk_norm=True is not supported"):
        YOCOConfig.from_fla(params | {"cross_decoder_attn": {"num_heads": 8, "qk_norm": True}})
