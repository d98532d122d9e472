"""The YOCO language model: self-decoder, one shared K and V, cross-decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cache import Chunk, YOCOCache
from .config import YOCOConfig
from .nn import CrossAttention, FeedForward, GatedRetention, KVCache, RMSNorm, RotaryEmbedding, SlidingWindowAttention
from .nn.basic import Layer

_LOSS_CHUNK = 1 << 26  # elements of logits that the loss holds at a time


class DecoderLayer(nn.Module):
    """Mixer and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: YOCOConfig, mixer: nn.Module, ops: str) -> None:
        super().__init__()
        self.mixer = mixer
        self.mixer_layer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, ops=ops)
        self.ffn = FeedForward(config.hidden_size, config.intermediate_size, ops=ops)
        self.final_layer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, ops=ops)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.mixer(self.mixer_layer_norm(x), *args, **kwargs)
        y, x = self.final_layer_norm(y, residual=x)
        return x + self.ffn(y)


class Decoder(Layer):
    """A stack of layers; checkpoint_activations recomputes each of them in the backward."""

    def __init__(self, ops: str) -> None:
        super().__init__(ops)
        self.layers = nn.ModuleList()
        self.checkpoint_activations = False

    def recomputes(self) -> bool:
        return self.checkpoint_activations and torch.is_grad_enabled()


class SelfDecoder(Decoder):
    def __init__(self, config: YOCOConfig, ops: str) -> None:
        super().__init__(ops)
        for _ in range(config.num_self_layers):
            common = {"rope": config.self_rope, "rope_theta": config.rope_theta, "ops": ops}
            if config.self_decoder == "gated_retention":
                mixer = GatedRetention(
                    config.hidden_size,
                    config.num_self_heads,
                    gate_logit_normalizer=config.gate_logit_normalizer,
                    norm_eps=config.norm_eps,
                    **common,
                )
            else:
                mixer = SlidingWindowAttention(
                    config.hidden_size,
                    config.num_self_heads,
                    config.window_size,
                    num_kv_heads=config.num_self_kv_heads,
                    **common,
                )
            self.layers.append(DecoderLayer(config, mixer, ops))
        self.has_state = config.self_decoder == "gated_retention"

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        packed = {"cu_seqlens": cu_seqlens} if self.has_state else {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False, **packed) if self.recomputes() else layer(x, **packed)
        return x

    def extend(self, x: Tensor, cache: YOCOCache, chunk: Chunk) -> Tensor:
        """The same after what the cache holds, which then holds x too."""
        kwargs: dict[str, Any] = {"offsets": chunk.offsets, "cu_seqlens": chunk.cu_seqlens}
        if not self.has_state:
            kwargs |= {"max_seqlen": chunk.max_seqlen, "window_keys": chunk.window_keys}
        past = [{"state": state} for state in cache.states] or [{"ring": ring} for ring in cache.rings]
        for layer, own in zip(self.layers, past, strict=True):
            x = layer(x, **own, **kwargs)
        return x


class CrossDecoder(Decoder):
    def __init__(self, config: YOCOConfig, ops: str) -> None:
        super().__init__(ops)
        kv_dim = config.num_kv_heads * config.head_dim
        self.num_kv_heads = config.num_kv_heads
        self.kv_layer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, ops=ops)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        rope = {"rope": config.cross_rope, "rope_theta": config.rope_theta, "ops": ops}
        for _ in range(config.num_cross_layers):
            mixer = CrossAttention(config.hidden_size, config.num_heads, **rope)
            self.layers.append(DecoderLayer(config, mixer, ops))
        self.rotary = RotaryEmbedding(config.head_dim, style=config.cross_rope, theta=config.rope_theta, ops=ops)
        for linear in (self.k_proj, self.v_proj):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """K (not yet rotated) and V [B, T, KV heads, dim] of the self-decoder's output."""
        x = self.kv_layer_norm(x)
        shape = (*x.shape[:2], self.num_kv_heads, -1)
        return self.k_proj(x).view(shape), self.v_proj(x).view(shape)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        k, v = self.keys_values(x)
        shared_kv = self.ops.SharedKV(self.rotary(k, cu_seqlens=cu_seqlens), v)
        packed = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        if not self.recomputes():
            for layer in self.layers:
                x = layer(x, shared_kv, **packed)
            return x
        # A compiled checkpoint may not change objects from outside, so the SharedKV goes through as its tensors.
        tensors = shared_kv.tensors()
        for layer in self.layers:

            def on_tensors(x: Tensor, *tensors: Tensor | None, layer: nn.Module = layer) -> tuple[Tensor | None, ...]:
                shared_kv = self.ops.SharedKV.from_tensors(*tensors)
                return layer(x, shared_kv, **packed), *shared_kv.tensors()

            x, *tensors = checkpoint(on_tensors, x, *tensors, use_reentrant=False)
        return x

    def append(self, x: Tensor, cache: YOCOCache, chunk: Chunk) -> None:
        """Puts K and V of the self-decoder's output into the cache: all that a prompt needs of this decoder."""
        k, v = self.keys_values(x)
        self.ops.append_kv(
            k,
            v,
            cache.kv.k,
            cache.kv.v,
            seqused_k=chunk.offsets,
            cu_seqlens=chunk.cu_seqlens,
            inv_freq=self.rotary.inv_freq,
            interleaved=self.rotary.interleaved,
        )

    def attend(self, x: Tensor, kv: KVCache, **positions: Any) -> Tensor:
        """The layers for tokens whose K and V are in the cache already."""
        for layer in self.layers:
            x = layer(x, kv, **positions)
        return x


def _check_tokens(input_ids: Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        got = f"{input_ids.dtype} {list(input_ids.shape)}"
        raise ValueError(f"input_ids must be [batch, time] of int64 or int32, got {got}")


class YOCOForCausalLM(nn.Module):
    """Decoder-decoder language model. The names in the state_dict are those of the official code.

    >>> model = YOCOForCausalLM(YOCOConfig.preset("160m"), ops="fused")
    >>> loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    """

    def __init__(self, config: YOCOConfig, ops: str = "fused", *, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embed_scale = math.sqrt(config.hidden_size) if config.scale_embeddings else 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.self_decoder = SelfDecoder(config, ops)
        self.cross_decoder = CrossDecoder(config, ops)
        self.layer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, ops=ops)
        self.output_projection = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden_size**-0.5)
        if config.tie_embeddings:
            self.output_projection.weight = self.embed_tokens.weight
        self.checkpoint_activations(checkpoint_activations)

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Trades memory for a second forward of each layer in the backward."""
        self.self_decoder.checkpoint_activations = enabled
        self.cross_decoder.checkpoint_activations = enabled

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    # ---- training ----------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        *,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab] of input_ids [B, T], or with targets [B, T] the mean cross entropy (-100: ignored).

        Packed sequences: B = 1, cu_seqlens int32 [N + 1], max_seqlen at least the longest of them.
        """
        _check_tokens(input_ids)
        if targets is not None and targets.shape != input_ids.shape:
            raise ValueError(
                f"targets must have the shape of input_ids {list(input_ids.shape)}, got {list(targets.shape)}"
            )
        x = self._embed(input_ids)
        x = self.self_decoder(x, cu_seqlens, max_seqlen)
        x = self.cross_decoder(x, cu_seqlens, max_seqlen)
        return self._head(x) if targets is None else self._loss(x, targets)

    def _embed(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids) * self.embed_scale

    def _head(self, x: Tensor) -> Tensor:
        return self.output_projection(self.layer_norm(x))

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        # Chunk by chunk and recomputed in the backward, so that the logits of a large vocabulary never exist at once.
        x, targets = self.layer_norm(x).flatten(0, 1), targets.flatten()
        rows = max(1, _LOSS_CHUNK // self.config.vocab_size)
        if x.shape[0] <= rows:
            total = self._loss_sum(x, targets)
        else:
            pieces = zip(x.split(rows), targets.split(rows), strict=True)
            total = torch.stack([checkpoint(self._loss_sum, *piece, use_reentrant=False) for piece in pieces]).sum()
        return total / (targets != -100).sum()

    def _loss_sum(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.output_projection(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")

    # ---- inference ---------------------------------------------------------------------------------

    def new_cache(
        self, batch_size: int = 1, max_length: int | None = None, *, dtype: torch.dtype | None = None
    ) -> YOCOCache:
        """An empty cache for this model, in the dtype that its layers compute in."""
        if dtype is None:
            kind = self.device.type
            autocast = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if autocast else self.embed_tokens.weight.dtype
        return YOCOCache(self.config, batch_size, max_length, dtype=dtype, device=self.device)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        cache: YOCOCache,
        *,
        lengths: Sequence[int] | Tensor | None = None,
        chunk_size: int | None = None,
        logits: str = "last",
    ) -> Tensor | None:
        """Takes prompts [B, T] into the cache, behind what it holds; rows may be right-padded (lengths [B]).

        logits: "last" gives [B, vocab] for the last token of each row; only these tokens run through the
        cross-decoder and the vocabulary projection (early exit). "none" skips both, "all" gives [B, T, vocab] (zeros
        for padding). chunk_size bounds the tokens per row and pass; any choice gives the same result.
        """
        if logits not in ("last", "none", "all"):
            raise ValueError(f'logits must be "last", "none" or "all", got {logits!r}')
        batch, time = self._check_ids(input_ids, cache)
        counts = [time] * batch if lengths is None else [int(n) for n in lengths]
        if len(counts) != batch or not all(1 <= n <= time for n in counts):
            raise ValueError(f"lengths must be {batch} numbers in 1..{time}, got {counts}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        cache.reserve(max(length + n for length, n in zip(cache.lengths, counts, strict=True)))
        step = chunk_size or time
        last, everything = None, []
        for begin in range(0, max(counts), step):
            ids = input_ids[:, begin : begin + step]
            chunk = cache.chunk(ids.shape[1], [min(max(n - begin, 0), ids.shape[1]) for n in counts])
            x = self._extend(ids, cache, chunk)
            if logits == "all":
                everything.append(self._all_logits(x, cache, chunk, ids.shape))
            elif logits == "last":
                x, rows = self._last_tokens(x, cache, chunk, [begin < n <= begin + step for n in counts])
                last = x.new_zeros(batch, x.shape[-1]) if last is None else last
                last[rows] = x
            cache.advance(chunk)
        if logits == "none":
            return None
        if logits == "all":
            return F.pad(torch.cat(everything, 1), (0, 0, 0, time - max(counts)))
        x = self.cross_decoder.attend(last[:, None], cache.kv, offsets=cache.seqlens - 1, seqused_k=cache.seqlens)
        return self._head(x)[:, 0]

    @torch.no_grad()
    def decode(self, input_ids: Tensor, cache: YOCOCache) -> Tensor:
        """Logits [B, T, vocab] of the next tokens [B, T], which enter the cache. Meant for T of 1 to 16."""
        _, time = self._check_ids(input_ids, cache)
        chunk = cache.chunk(time)
        x = self._extend(input_ids, cache, chunk)
        logits = self._all_logits(x, cache, chunk, input_ids.shape)
        cache.advance(chunk)
        return logits

    def generate(self, prompts: Any, max_new_tokens: int, **options: Any) -> list[list[int]]:
        """See yoco_ext.generation.generate."""
        from .generation import generate

        return generate(self, prompts, max_new_tokens, **options)

    def _check_ids(self, input_ids: Tensor, cache: YOCOCache) -> tuple[int, int]:
        _check_tokens(input_ids)
        if input_ids.shape[1] < 1:
            raise ValueError(f"input_ids must be [batch, time] with time >= 1, got shape {list(input_ids.shape)}")
        if input_ids.shape[0] != cache.batch_size:
            raise ValueError(f"input_ids has batch size {input_ids.shape[0]}, the cache {cache.batch_size}")
        if cache.config != self.config:
            raise ValueError("the cache was made for a model of another configuration")
        return input_ids.shape[0], input_ids.shape[1]

    def _extend(self, input_ids: Tensor, cache: YOCOCache, chunk: Chunk) -> Tensor:
        """Runs the self-decoder and stores K and V; the result is packed where the chunk is."""
        ids = input_ids if chunk.pack_index is None else input_ids.flatten()[chunk.pack_index][None]
        x = self.self_decoder.extend(self._embed(ids), cache, chunk)
        self.cross_decoder.append(x, cache, chunk)
        return x

    def _all_logits(self, x: Tensor, cache: YOCOCache, chunk: Chunk, shape: torch.Size) -> Tensor:
        positions = {"offsets": chunk.offsets, "seqused_k": chunk.seqused}
        if not chunk.packed:
            return self._head(self.cross_decoder.attend(x, cache.kv, **positions))
        positions |= {"cu_seqlens": chunk.cu_seqlens, "max_seqlen": chunk.max_seqlen}
        packed = self._head(self.cross_decoder.attend(x, cache.kv, **positions))[0]
        logits = packed.new_zeros(shape.numel(), packed.shape[-1])
        logits[chunk.pack_index] = packed
        return logits.view(*shape, -1)

    def _last_tokens(self, x: Tensor, cache: YOCOCache, chunk: Chunk, ends: list[bool]) -> tuple[Tensor, Tensor]:
        """Of a chunk, the hidden vectors of those rows that end in it, and the rows."""
        rows = torch.tensor([row for row, end in enumerate(ends) if end], dtype=torch.int64, device=x.device)
        if chunk.packed:
            return x[0, chunk.cu_seqlens[rows + 1].long() - 1], rows
        return x[rows, -1], rows

    # ---- files -------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> YOCOForCausalLM:
        """See yoco_ext.checkpoint.load_checkpoint."""
        from .checkpoint import load_checkpoint

        return load_checkpoint(path, **options)

    def save(self, path: str | Path) -> None:
        """See yoco_ext.checkpoint.save_checkpoint."""
        from .checkpoint import save_checkpoint

        save_checkpoint(self, path)
