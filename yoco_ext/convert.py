"""Checkpoints from one code base's files to another's, weight for weight.

| format | files | weights |
|---|---|---|
| unilm | params.json, model.pt | the official names; `torch.load(..., weights_only=True)` reads it |
| fla | config.json (model_type "yoco"), model.safetensors | fla's names |
| hf | config.json (model_type "yoco_ext"), model.safetensors | this package's transformers model |
| yoco | config.json (fields of YOCOConfig), model.safetensors | the official names |
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .checkpoint import CONFIG, WEIGHTS, check_weights, official_names, read_config, read_weights, to_fla
from .config import CHECKPOINT_FORMATS
from .model import YOCOForCausalLM

HF_PREFIX = "model."  # the transformers model holds the YOCO model as its attribute `model`


def convert_checkpoint(source: str | Path, target: str | Path, *, to: str, source_format: str | None = None) -> str:
    """Writes the checkpoint in the folder `source` into the folder `target` in the format `to`; returns the format it
    was in. Tensors keep their dtype and every bit; there and back gives the same weights and configuration.

    A field that the model does not use (window_size without windows) comes back as its default. The official files do
    not tie embeddings: a tied model gets both matrices there, and comes back untied.

    Raises ValueError when the files are not what source_format says, weights do not fit the configuration, the other
    code base has no such model, or `target` holds a checkpoint already.
    """
    source, target = Path(source), Path(target)
    for name, value, allowed in (
        ("to", to, CHECKPOINT_FORMATS),
        ("source_format", source_format, (*CHECKPOINT_FORMATS, None)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(map(str, allowed))}")
    config, found = read_config(source)
    if source_format not in (None, found):
        raise ValueError(f"{source} holds a checkpoint in the format {found}, not {source_format}")
    files = {"unilm": ("params.json", "model.pt")}.get(to, (CONFIG, WEIGHTS))
    for name in {*files, CONFIG, WEIGHTS}:
        if (target / name).exists():
            raise ValueError(f"{target / name} is there already: name another folder")
    writers = {"unilm": config.to_official, "fla": config.to_fla, "hf": config.to_transformers, "yoco": config.to_dict}
    fields = writers[to]()

    with torch.device("meta"):
        expected = YOCOForCausalLM(config, "reference").state_dict()
    weights = official_names(read_weights(source), config)
    if config.tie_embeddings:
        weights["output_projection.weight"] = weights["embed_tokens.weight"]
    check_weights(weights, expected)
    if config.tie_embeddings and to != "unilm":
        del weights["output_projection.weight"]
    if to == "fla":
        weights = to_fla(weights)
    elif to == "hf":
        weights = {HF_PREFIX + name: tensor for name, tensor in weights.items()}

    target.mkdir(parents=True, exist_ok=True)
    if to == "unilm":
        torch.save({name: tensor.clone() for name, tensor in weights.items()}, target / files[1])
    else:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, target / files[1], {"format": "pt"})
    (target / files[0]).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return found
