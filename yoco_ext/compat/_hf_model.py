"""YOCO as a model of transformers: configuration, model with generate(), and its cache. Registered by compat.hf."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
    masking_utils,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from yoco_ext.cache import YOCOCache
from yoco_ext.config import YOCOConfig
from yoco_ext.model import YOCOForCausalLM
from yoco_ext.nn import GatedRetention, RMSNorm, RotaryEmbedding
from yoco_ext.nn.basic import DECODE_TOKENS

_FIELDS = tuple(field.name for field in dataclasses.fields(YOCOConfig))


class YOCOExtConfig(PreTrainedConfig):
    """The fields of yoco_ext.YOCOConfig under their names, and transformers' own.

    ops: "fused" or "reference". fused_loss: a forward with labels returns the loss alone, computed without ever holding
    the logits of all tokens.

    >>> YOCOExtConfig(**YOCOConfig.preset("160m").to_dict())
    """

    model_type = "yoco_ext"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "tie_embeddings": "tie_word_embeddings",
    }

    def __init__(self, *, ops: str = "fused", fused_loss: bool = False, use_cache: bool = True, **options: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias not in _FIELDS and alias in options:
                options[name] = options.pop(alias)
        tied = options.pop("tie_word_embeddings", None)
        if tied is not None:
            options["tie_embeddings"] = tied
        fields = YOCOConfig.from_dict({name: options.pop(name) for name in _FIELDS if name in options}).to_dict()
        tied = fields.pop("tie_embeddings")
        for name, value in fields.items():
            setattr(self, name, value)
        self.ops, self.fused_loss, self.use_cache = ops, fused_loss, use_cache
        super().__init__(tie_word_embeddings=tied, **options)

    def to_yoco(self) -> YOCOConfig:
        return YOCOConfig.from_dict({name: getattr(self, name) for name in _FIELDS})


class YOCOExtCache(Cache):
    """A YOCOCache for transformers. It fills itself in the first forward; max_length reserves room, and is a limit."""

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__(layers=[])
        self.max_length = max_length
        self.yoco: YOCOCache | None = None
        self.seen = 0  # columns of input_ids, padding included

    def __len__(self) -> int:
        return 0 if self.yoco is None else self.yoco.config.num_layers

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.seen} tokens)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    @property
    def batch_size(self) -> int:
        return -1 if self.yoco is None else self.yoco.batch_size

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.yoco is not None

    @property
    def is_croppable(self) -> bool:
        return False  # a retention state has no way back

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a YOCO cache cannot be shortened: its self-decoder keeps states, not tokens")

    def reset(self) -> None:
        self.yoco, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.yoco is not None:
            self.yoco.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.yoco is not None:
            rows = torch.arange(self.yoco.batch_size, device=self.yoco.device)
            self.yoco.select(rows.repeat_interleave(repeats))


class YOCOExtForCausalLM(PreTrainedModel, GenerationMixin):
    """yoco_ext.YOCOForCausalLM (`.model`) with transformers' interface."""

    config_class = YOCOExtConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _tied_weights_keys = {"model.output_projection.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: YOCOExtConfig) -> None:
        super().__init__(config)
        self.model = YOCOForCausalLM(config.to_yoco(), ops=config.ops)
        self.gradient_checkpointing = False
        self.post_init()

    # ---- what transformers asks of a model ----
    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.output_projection

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.output_projection = new_embeddings

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        self.gradient_checkpointing = enable
        self.model.checkpoint_activations(enable)

    def initialize_weights(self) -> None:
        """As transformers does it; then the layers' own rules for their linear maps. What was loaded stays."""
        super().initialize_weights()
        with torch.no_grad(), initialization.guard_torch_init_functions():
            for module in self.model.modules():
                if isinstance(module, GatedRetention):
                    module.reset_parameters()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RotaryEmbedding):
            if module.inv_freq is not None:
                module.inv_freq.copy_(module._inv_freq(module.inv_freq.device))
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    # ---- forward ----
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: YOCOExtCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """input_ids [B, T] -> logits [B, T or logits_to_keep, vocab], loss with labels [B, T], past_key_values.

        attention_mask [B, tokens so far], 0 for padding on either side; without it packed sequences are recognised by
        position_ids that start anew, or given by cu_seq_lens_q int32 [N + 1] (B = 1). With a cache there are no
        gradients: use_cache is off by default where gradients are recorded. The first token behind padding is nobody's
        target, whatever its label.
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds is not supported: pass input_ids [batch, time]")
        if past_key_values is not None and not isinstance(past_key_values, YOCOExtCache):
            raise ValueError(f"past_key_values: got {type(past_key_values).__name__}; allowed: YOCOExtCache or None")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask: got shape {list(attention_mask.shape)}; allowed: [batch, tokens so far]")
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not torch.is_grad_enabled())
        kept = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].bool()
        if kept is not None and bool(kept.all()):
            kept = None
        if kept is not None and labels is not None:  # nothing predicts the first token behind padding
            labels = labels.masked_fill(~nn.functional.pad(kept, (1, 0))[:, :-1], -100)
        loss = None
        if use_cache and labels is None:
            past_key_values = YOCOExtCache() if past_key_values is None else past_key_values
            last = isinstance(logits_to_keep, int) and logits_to_keep == 1
            logits = self._extend(input_ids, kept, past_key_values, last)
        else:
            past_key_values = None
            x, packing = self._hidden_states(input_ids, kept, attention_mask, position_ids, cu_seq_lens_q)
            if labels is not None and self.config.fused_loss:
                items = kwargs.get("num_items_in_batch")
                loss, logits = self._fused_loss(x, packing, labels, items), None
            else:
                logits = self.model._head(x)
                if packing is not None:
                    logits = logits.new_zeros(input_ids.numel(), logits.shape[-1]).index_copy(0, packing, logits[0])
                logits = logits.view(*input_ids.shape, -1)
                if labels is not None:
                    loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        if logits is not None:
            rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = logits[:, rows]
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return tuple(x for x in (loss, logits, past_key_values) if x is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _hidden_states(
        self,
        input_ids: Tensor,
        kept: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Of all tokens, with gradients: [B, T, hidden], or [1, total, hidden] of the kept tokens and their places
        [total] among the B * T."""
        lengths = None
        packing = None
        if kept is not None:
            lengths = kept.sum(1, dtype=torch.int32)
            packing = kept.flatten().nonzero()[:, 0]
            input_ids = input_ids.flatten()[packing][None]
        elif cu_seqlens is None and attention_mask is None and position_ids is not None:
            numbers = masking_utils.find_packed_sequence_indices(position_ids.expand(input_ids.shape[0], -1))
            if numbers is not None:
                ends = torch.cat([numbers.diff(dim=1) != 0, torch.ones_like(numbers[:, :1], dtype=torch.bool)], 1)
                lengths = ends.flatten().nonzero()[:, 0].diff(prepend=ends.new_full((1,), -1, dtype=torch.int64))
                input_ids = input_ids.reshape(1, -1)
        if lengths is not None:
            cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0))
        packed: tuple[Any, ...] = ()
        if cu_seqlens is not None:
            packed = (cu_seqlens.to(torch.int32), int(cu_seqlens.diff().max()))
        x = self.model.self_decoder(self.model._embed(input_ids), *packed)
        return self.model.cross_decoder(x, *packed), packing

    def _fused_loss(self, x: Tensor, packing: Tensor | None, labels: Tensor, items: Any) -> Tensor:
        targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        targets = (targets if packing is None else targets[packing]).to(x.device)
        loss = self.model._loss(x, targets.view(x.shape[:2]) if packing is None else targets[None])
        return loss if items is None else loss * (targets != -100).sum() / items

    def _extend(self, input_ids: Tensor, kept: Tensor | None, cache: YOCOExtCache, last: bool) -> Tensor:
        """Logits of new tokens behind what the cache holds: [B, T, vocab], or with `last` [B, 1, vocab]."""
        if cache.yoco is None:
            cache.yoco = self.model.new_cache(input_ids.shape[0], cache.max_length)
        cache.seen += input_ids.shape[1]
        if kept is None and input_ids.shape[1] <= DECODE_TOKENS and any(cache.yoco.lengths):
            return self.model.decode(input_ids, cache.yoco)
        order, lengths = None, None
        if kept is not None:  # the model wants padding on the right
            order = torch.argsort(~kept, dim=1, stable=True)
            input_ids, lengths = input_ids.gather(1, order), kept.sum(1)
        if last:
            return self.model.prefill(input_ids, cache.yoco, lengths=lengths)[:, None]
        logits = self.model.prefill(input_ids, cache.yoco, lengths=lengths, logits="all")
        if order is None:
            return logits
        return torch.zeros_like(logits).scatter(1, order[..., None].expand_as(logits), logits)


def register() -> None:
    AutoConfig.register(YOCOExtConfig.model_type, YOCOExtConfig, exist_ok=True)
    AutoModelForCausalLM.register(YOCOExtConfig, YOCOExtForCausalLM, exist_ok=True)
