"""Single-process stand-ins for what microsoft/unilm's YOCO files import from fairseq, fairscale and omegaconf.

Served by `yoco_ext.compat.unilm.install(stub_parallel=True)` where those packages are not installed. What computes
(linears, embedding, activation checkpoints) does what the real classes do in a model-parallel group of one; what only
registers a model with fairseq's command line is there to be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.utils.checkpoint


class ParallelLinear(nn.Linear):
    """fairseq's Column-/RowParallelLinear with a model-parallel size of one."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, init_method: Callable | None = None, **_: Any
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if init_method is not None:
            init_method(self.weight)


class VocabParallelEmbedding(nn.Embedding):
    """fairseq's embedding with a model-parallel size of one; a padding_idx of -1 means none, as there."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, init_method: Any = None, **_: Any
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, None if padding_idx in (None, -1) else padding_idx)
        if init_method is not None:
            init_method(self.weight)


def checkpoint_wrapper(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
    """fairscale's checkpoint_wrapper: the module's activations are recomputed in the backward."""
    forward = module.forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)

    module.forward = checkpointed
    return module


class _Language(nn.Module):
    """FairseqLanguageModel and FairseqIncrementalDecoder: a module around a decoder."""

    def __init__(self, decoder: Any = None) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.decoder(*args, **kwargs)


def _register(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda registered: registered


MODULES: dict[str, dict[str, Any]] = {
    "fairseq": {"utils": None, "distributed_utils": None},
    "fairseq.dataclass": {"FairseqDataclass": object},
    "fairseq.models": {
        "FairseqIncrementalDecoder": _Language,
        "FairseqLanguageModel": _Language,
        "register_model": _register,
        "register_model_architecture": _register,
    },
    "fairseq.model_parallel": {},
    "fairseq.model_parallel.megatron": {},
    "fairseq.model_parallel.megatron.mpu": {
        "ColumnParallelLinear": ParallelLinear,
        "RowParallelLinear": ParallelLinear,
        "VocabParallelEmbedding": VocabParallelEmbedding,
        "copy_to_model_parallel_region": lambda x: x,
        "gather_from_model_parallel_region": lambda x: x,
        "initialize_model_parallel": lambda size=1: None,
        "model_parallel_is_initialized": lambda: True,
        "get_model_parallel_rank": lambda: 0,
        "get_model_parallel_world_size": lambda: 1,
    },
    "fairscale": {},
    "fairscale.nn": {"checkpoint_wrapper": checkpoint_wrapper},
    "omegaconf": {"II": lambda name: "${" + name + "}"},
}
