"""Checkpoints: safetensors with the configuration beside it; the official code's and fla's names in and out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import YOCOConfig
from .model import YOCOForCausalLM

WEIGHTS, CONFIG = "model.safetensors", "config.json"
HF_MODEL_TYPE = "yoco_ext"

# Official name -> fla's name; the layers' numbers run on in fla.
_TO_FLA = [
    (r"^embed_tokens\.", "model.embeddings."),
    (r"^output_projection\.", "lm_head."),
    (r"^layer_norm\.", "model.norm."),
    (r"^self_decoder\.layers\.", "model.self_layers."),
    (r"^cross_decoder\.layers\.", "model.cross_layers."),
    (r"^cross_decoder\.kv_layer_norm\.", "model.shared_kv_builder.kv_norm."),
    (r"^cross_decoder\.(k|v)_proj\.", r"model.shared_kv_builder.\1_proj."),
    (r"\.mixer\.gt_proj\.", ".attn.gk_proj."),
    (r"\.mixer\.out_proj\.", ".attn.o_proj."),
    (r"\.mixer\.", ".attn."),
    (r"\.mixer_layer_norm\.", ".attn_norm."),
    (r"\.final_layer_norm\.", ".mlp_norm."),
    (r"\.ffn\.fc1\.", ".mlp.gate_proj."),
    (r"\.ffn\.gate\.", ".mlp.up_proj."),
    (r"\.ffn\.fc2\.", ".mlp.down_proj."),
]


def to_fla(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This model's state_dict (the official names) under the names of fla.models.yoco."""
    return {_fla_name(name): tensor for name, tensor in state_dict.items()}


def from_fla(state_dict: Mapping[str, Tensor], config: YOCOConfig) -> dict[str, Tensor]:
    """The reverse of to_fla. Only names that a model of this configuration has are known."""
    with torch.device("meta"):
        names = {_fla_name(name): name for name in YOCOForCausalLM(config, "reference").state_dict()}
    unknown = set(state_dict) - set(names)
    if unknown:
        raise ValueError(f"not parameters of this YOCO model under fla's names: {_listing(unknown)}")
    return {names[name]: tensor for name, tensor in state_dict.items()}


def _fla_name(name: str) -> str:
    for pattern, replacement in _TO_FLA:
        name = re.sub(pattern, replacement, name)
    return name


def load_state_dict(model: YOCOForCausalLM, state_dict: Mapping[str, Tensor]) -> None:
    """Loads weights under the official names (with or without a prefix) or fla's."""
    state_dict = official_names(state_dict, model.config)
    if model.config.tie_embeddings:
        state_dict = {"output_projection.weight": state_dict.get("embed_tokens.weight")} | dict(state_dict)
    check_weights(state_dict, model.state_dict())
    model.load_state_dict(state_dict)


def official_names(state_dict: Mapping[str, Tensor], config: YOCOConfig) -> dict[str, Tensor]:
    """Weights under fla's names, or under the official names with or without a prefix, under the official names."""
    if any("model.embeddings." in name for name in state_dict):
        return from_fla(state_dict, config)
    anchor = "embed_tokens.weight"
    prefix = next((name[: -len(anchor)] for name in state_dict if name.endswith(anchor)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}


def check_weights(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless names and shapes are the expected ones."""
    for kind, names in (("missing", set(expected) - set(state_dict)), ("unknown", set(state_dict) - set(expected))):
        if names:
            raise ValueError(f"{kind} in the checkpoint for this configuration: {_listing(names)}")
    for name, tensor in expected.items():
        if tensor.shape != state_dict[name].shape:
            shapes = f"{list(state_dict[name].shape)}, the configuration asks for {list(tensor.shape)}"
            raise ValueError(f"{name} has shape {shapes}")


def _listing(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def save_checkpoint(model: YOCOForCausalLM, path: str | Path) -> None:
    """Writes model.safetensors and config.json into a folder, which is made if needed."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors["output_projection.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    model.config.save(folder / CONFIG)


def load_checkpoint(
    path: str | Path,
    *,
    ops: str = "fused",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> YOCOForCausalLM:
    """Reads a folder written by save_checkpoint, by fla (config.json with model_type "yoco"), or for the official code
    (params.json). The weights are model.safetensors, or else the only .safetensors, .pt, .pth or .bin file there.

    dtype: of the parameters; default: as stored.
    """
    folder = Path(path)
    config, state_dict = read_config(folder)[0], read_weights(folder)
    if dtype is None:
        dtype = next(
            t.dtype for name, t in state_dict.items() if name.endswith(("embed_tokens.weight", "embeddings.weight"))
        )
    with torch.device("meta"):
        model = YOCOForCausalLM(config, ops)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_embeddings:
        model.output_projection.weight = model.embed_tokens.weight
    load_state_dict(model, state_dict)
    return model


def read_config(folder: Path) -> tuple[YOCOConfig, str]:
    """The configuration in a folder, and whose format it is in: "unilm", "fla", "hf" or "yoco"."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    for name in (CONFIG, "params.json"):
        if (folder / name).is_file():
            fields = json.loads((folder / name).read_text(encoding="utf-8"))
            if name == "params.json":
                return YOCOConfig.from_official(fields), "unilm"
            if fields.get("model_type") == "yoco":
                return YOCOConfig.from_fla(fields), "fla"
            if fields.get("model_type") == HF_MODEL_TYPE:
                return YOCOConfig.from_transformers(fields), "hf"
            return YOCOConfig.from_dict(fields), "yoco"
    raise ValueError(f"{folder} has no {CONFIG} (or params.json of the official code)")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """model.safetensors or its shards, or else the only .safetensors, .pt, .pth or .bin file of a folder."""
    index = folder / f"{WEIGHTS}.index.json"
    if not (folder / WEIGHTS).is_file() and index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}
    weights = _weights_file(folder)
    if weights.suffix == ".safetensors":
        return load_file(weights)
    state_dict = torch.load(weights, map_location="cpu", weights_only=True)
    return state_dict.get("model", state_dict)  # fairseq puts the weights one level down


def _weights_file(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    for pattern in ("*.safetensors", "*.pt", "*.pth", "*.bin"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{folder} has several weight files ({len(found)} {pattern}): merge them into {WEIGHTS}")
    raise ValueError(f"{folder} has no weights ({WEIGHTS})")
