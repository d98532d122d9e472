"""What YOCO keeps of the past: constant-size state per self-decoder layer, and K and V once for the whole model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import YOCOConfig
from .nn.attention import KVCache, KVRing, WindowKeys
from .nn.basic import DECODE_TOKENS

_GROWTH = 256  # capacities are multiples of this


@dataclass
class Chunk:
    """The tokens of one call and where they stand in their sequences; every layer reads the same one."""

    counts: list[int]  # new tokens of each sequence
    offsets: Tensor  # int32 [B]: tokens before
    seqused: Tensor  # int32 [B]: tokens before and new ones
    # Packed chunks only ([1, total] tokens instead of [B, time]):
    pack_index: Tensor | None = None  # int64 [total]: the tokens kept of the flattened [B * time]
    cu_seqlens: Tensor | None = None  # int32 [B + 1]
    max_seqlen: int | None = None
    window_keys: WindowKeys | None = None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None


class YOCOCache:
    """The past of a batch of sequences, which may differ in length.

    Per self-decoder layer: the retention state (float32) or a ring buffer of the window. Once for all cross-decoder
    layers: K and V. `max_length` reserves room for that many tokens and is then a limit; without it K and V grow.
    """

    def __init__(
        self,
        config: YOCOConfig,
        batch_size: int = 1,
        max_length: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.config = config
        self.max_length = max_length
        self.dtype = dtype
        self.lengths = [0] * batch_size  # on the host, so that no call has to ask the device
        self.seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        heads, dim, layers = config.num_self_heads, config.self_head_dim, range(config.num_self_layers)
        self.states: list[Tensor] = []
        self.rings: list[KVRing] = []
        if config.self_decoder == "gated_retention":
            state_dtype = torch.promote_types(dtype, torch.float32)
            shape = (batch_size, heads, dim, dim)
            self.states = [torch.zeros(shape, dtype=state_dtype, device=device) for _ in layers]
        else:
            shape = (batch_size, config.window_size + DECODE_TOKENS - 1, config.num_self_kv_heads, dim)
            self.rings = [KVRing(*torch.zeros((2, *shape), dtype=dtype, device=device)) for _ in layers]
        self._allocate(max_length or 0)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.seqlens.device

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""
        tensors = [self.kv.k, self.kv.v, *self.states, *(t for ring in self.rings for t in (ring.k, ring.v))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def reset(self) -> None:
        """Forgets the sequences and keeps the memory."""
        self.lengths = [0] * self.batch_size
        self.seqlens.zero_()
        for state in self.states:
            state.zero_()

    def select(self, rows: Tensor) -> None:
        """Keeps these sequences, int64 [new batch size], in this order; one may be named several times."""
        rows = rows.to(self.device)
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.seqlens = self.seqlens[rows]
        self.states = [state[rows] for state in self.states]
        self.rings = [KVRing(ring.k[rows], ring.v[rows]) for ring in self.rings]
        self.kv = KVCache(self.kv.k[rows], self.kv.v[rows], self._sequence_starts(self.kv.capacity))

    def reserve(self, length: int) -> None:
        """Makes room for sequences of this length."""
        if length <= self.kv.capacity:
            return
        if self.max_length is not None:
            raise ValueError(f"the cache has max_length {self.max_length}, {length} tokens do not fit")
        capacity = max(length, self.kv.capacity * 3 // 2)
        old, used = self.kv, max(self.lengths)
        self._allocate(-(-capacity // _GROWTH) * _GROWTH)
        self.kv.k[:, :used] = old.k[:, :used]
        self.kv.v[:, :used] = old.v[:, :used]

    def _allocate(self, capacity: int) -> None:
        shape = (self.batch_size, capacity, self.config.num_kv_heads, self.config.head_dim)
        k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        self.kv = KVCache(k, v, self._sequence_starts(capacity))

    def _sequence_starts(self, capacity: int) -> Tensor:
        return torch.arange(self.batch_size + 1, dtype=torch.int32, device=self.device) * capacity

    def chunk(self, time: int, counts: Sequence[int] | None = None) -> Chunk:
        """Describes new tokens [B, time], of which the first counts[b] of each row are real."""
        counts = [time] * self.batch_size if counts is None else list(counts)
        self.reserve(max(length + count for length, count in zip(self.lengths, counts, strict=True)))
        ragged = any(count != time for count in counts)
        if not ragged and (time <= DECODE_TOKENS or not self.rings or not any(self.lengths)):
            return Chunk(counts, self.seqlens, self.seqlens + time)
        # Rows of different lengths are packed: no kernel then computes padding, and no padding enters a state.
        index = torch.cat([torch.arange(count) + row * time for row, count in enumerate(counts)])
        cu_seqlens = _boundaries(counts)
        chunk = Chunk(
            counts,
            self.seqlens,
            self.seqlens + self._to_device(torch.tensor(counts, dtype=torch.int32)),
            pack_index=self._to_device(index),
            cu_seqlens=self._to_device(cu_seqlens),
            max_seqlen=max(counts),
        )
        if self.rings and any(self.lengths):
            chunk.window_keys = self._window_keys(counts, cu_seqlens.tolist())
        return chunk

    def _window_keys(self, counts: list[int], starts: list[int]) -> WindowKeys:
        capacity = self.rings[0].k.shape[1]
        pieces, lengths = [], []
        for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            before = min(length, self.config.window_size - 1) if count else 0
            pieces.append(torch.arange(length - before, length) % capacity + row * capacity)
            pieces.append(torch.arange(count) + self.batch_size * capacity + starts[row])
            lengths.append(before + count)
        index, cu_seqlens = torch.cat(pieces), _boundaries(lengths)
        return WindowKeys(self._to_device(index), self._to_device(cu_seqlens), max(lengths))

    def advance(self, chunk: Chunk) -> None:
        """The tokens of the chunk are now in the cache."""
        self.lengths = [length + count for length, count in zip(self.lengths, chunk.counts, strict=True)]
        self.seqlens.copy_(chunk.seqused)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def save(self, path: str | Path) -> None:
        """Writes the cache, without its unused room, as safetensors."""
        used = max(self.lengths)
        tensors = {"seqlens": self.seqlens, "k": self.kv.k[:, :used], "v": self.kv.v[:, :used]}
        tensors |= {f"states.{i}": state for i, state in enumerate(self.states)}
        for i, ring in enumerate(self.rings):
            tensors |= {f"rings.{i}.k": ring.k, f"rings.{i}.v": ring.v}
        metadata = {
            "format": "yoco_ext.cache.1",
            "config": json.dumps(self.config.to_dict()),
            "max_length": json.dumps(self.max_length),
        }
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> YOCOCache:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "yoco_ext.cache.1":
                raise ValueError(f"{path} is not a saved YOCOCache")
            seqlens, k = file.get_tensor("seqlens"), file.get_tensor("k")
            config = YOCOConfig.from_dict(json.loads(metadata["config"]))
            max_length = json.loads(metadata["max_length"])
            cache = cls(config, seqlens.shape[0], max_length, dtype=k.dtype, device=device)
            cache.lengths = seqlens.tolist()
            cache.seqlens.copy_(seqlens)
            cache.reserve(k.shape[1])
            cache.kv.k[:, : k.shape[1]] = k
            cache.kv.v[:, : k.shape[1]] = file.get_tensor("v")
            for i, state in enumerate(cache.states):
                state.copy_(file.get_tensor(f"states.{i}"))
            for i, ring in enumerate(cache.rings):
                ring.k.copy_(file.get_tensor(f"rings.{i}.k"))
                ring.v.copy_(file.get_tensor(f"rings.{i}.v"))
        return cache


def _boundaries(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def yoco_cache_bytes(config: YOCOConfig, length: int, *, batch_size: int = 1, dtype: torch.dtype) -> int:
    """Bytes a YOCOCache needs for sequences of a length."""
    size, layers = dtype.itemsize, config.num_self_layers
    if config.self_decoder == "gated_retention":
        state_size = torch.promote_types(dtype, torch.float32).itemsize
        per_layer = config.num_self_heads * config.self_head_dim**2 * state_size
    else:
        slots = config.window_size + DECODE_TOKENS - 1
        per_layer = 2 * slots * config.num_self_kv_heads * config.self_head_dim * size
    shared = 2 * length * config.num_kv_heads * config.head_dim * size
    return batch_size * (layers * per_layer + shared)


def transformer_cache_bytes(config: YOCOConfig, length: int, *, batch_size: int = 1, dtype: torch.dtype) -> int:
    """Bytes of the K/V cache of a Transformer with as many layers and the same heads as the cross-decoder's."""
    per_layer = 2 * length * config.num_kv_heads * config.head_dim * dtype.itemsize
    return batch_size * config.num_layers * per_layer
