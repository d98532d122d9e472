"""The functions of the package flash_attn (2.x signatures, FlashAttention-3 extras as keywords) on yoco_ext's kernels.

    import yoco_ext.compat.flash_attn as flash_attn      # call it directly, or
    yoco_ext.compat.flash_attn.install()                 # make `import flash_attn` find it

Layouts, alignment and conventions are flash_attn's: [batch, time, heads, dim], packed [tokens, heads, dim], causal
aligned bottom-right, window_size inclusive on both sides. Differences: any head dimension that is a multiple of 8 up to
256 with Dv != Dqk allowed, float32 works, dropout_p > 0 is refused.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import yoco_ext

__version__ = "2.8.3"  # the flash_attn release whose signatures are served

_MODULES = (
    "flash_attn",
    "flash_attn.flash_attn_interface",
    "flash_attn.bert_padding",
    "flash_attn.layers",
    "flash_attn.layers.rotary",
)


def _refuse(argument: str, got: Any, why: str) -> None:
    raise NotImplementedError(f"{argument}={got!r}: {why}")


def _common(dropout_p: float, **extras: Any) -> None:
    """Refuses what is not supported; num_splits, pack_gqa and sm_margin, which only tune, are accepted and unused."""
    if dropout_p:
        _refuse("dropout_p", dropout_p, "attention dropout is not supported; use 0.0")
    for name, value in extras.items():
        if isinstance(value, Tensor) or value:
            _refuse(name, "a tensor" if isinstance(value, Tensor) else value, "not supported")


def _slopes(alibi_slopes: Tensor | None) -> Tensor | None:
    return None if alibi_slopes is None else alibi_slopes.float().contiguous()


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    return_lse: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int = 0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Any:
    """q [B, Tq, Hq, D], k and v [B, Tk, Hkv, D] -> out [B, Tq, Hq, D]; with return_lse (out, lse [B, Hq, Tq]); with
    return_attn_probs (out, lse, None), as flash_attn without dropout."""
    _common(
        dropout_p, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk
    )
    found = yoco_ext.attention(
        q,
        k,
        v,
        scale=softmax_scale,
        causal=causal,
        window=_window(window_size),
        softcap=softcap,
        sinks=None if learnable_sink is None else learnable_sink.float(),
        alibi_slopes=_slopes(alibi_slopes),
        deterministic=deterministic,
        return_lse=return_lse or return_attn_probs,
    )
    return (*found, None) if return_attn_probs else found


def _window(window_size: tuple[int | None, int | None]) -> tuple[int, int]:
    left, right = window_size  # FlashAttention-4 writes None for unlimited
    return (-1 if left is None else left, -1 if right is None else right)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """qkv [B, T, 3, H, D]; the rest as flash_attn_func."""
    return flash_attn_func(*qkv.unbind(2), *args, **kwargs)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """q [B, Tq, Hq, D], kv [B, Tk, 2, Hkv, D]; the rest as flash_attn_func."""
    return flash_attn_func(q, *kv.unbind(2), *args, **kwargs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Any:
    """qkv [tokens, 3, H, D]; the rest as flash_attn_varlen_func."""
    return flash_attn_varlen_func(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """q [tokens_q, Hq, D], kv [tokens_k, 2, Hkv, D]; the rest as flash_attn_varlen_func."""
    return flash_attn_varlen_func(q, *kv.unbind(1), *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    return_lse: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int = 0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Any:
    """Packed sequences: q [tokens_q, Hq, D], k and v [tokens_k, Hkv, D] -> out [tokens_q, Hq, D]; with return_lse
    (out, lse [Hq, tokens_q]); with return_attn_probs (out, lse, None). s_aux and learnable_sink are two names of one
    argument. A paged cache (block_table) is read by flash_attn_with_kvcache."""
    _common(
        dropout_p,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk,
        seqused_q=seqused_q,
    )
    sinks = s_aux if learnable_sink is None else learnable_sink
    if block_table is not None:
        _refuse(
            "block_table", "a tensor", "flash_attn_varlen_func reads contiguous K and V; see flash_attn_with_kvcache"
        )
    found = yoco_ext.attention(
        q[None],
        k[None],
        v[None],
        scale=softmax_scale,
        causal=causal,
        window=_window(window_size),
        softcap=softcap,
        sinks=None if sinks is None else sinks.float(),
        alibi_slopes=_slopes(alibi_slopes),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k,
        deterministic=deterministic,
        return_lse=return_lse or return_attn_probs,
    )
    if return_attn_probs:
        return found[0][0], found[1][0], None
    return (found[0][0], found[1][0]) if return_lse else found[0]


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    s_aux: Tensor | None = None,
    page_table: Tensor | None = None,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    attention_chunk: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Any:
    """Appends k and v (rotated, when tables are given) to the cache in place, then attends to it.

    q [B, Tq, Hq, D]; caches [B, S, Hkv, D], or [pages, page_size, Hkv, D] with block_table int32 [B, max_pages];
    cache_seqlens: tokens in the cache before this call, int or int32 [B]; cache_batch_idx [B]: the cache's row of each
    sequence; page_table is another name of block_table; k_descale, v_descale [Hkv] of a quantised cache. More than 16
    query tokens go through the prefill kernel, which wants a contiguous unquantised cache. No gradients, as there.
    """
    window = _window(window_size)
    _common(0.0, qv=qv, q_descale=q_descale, attention_chunk=attention_chunk)
    block_table = page_table if block_table is None else block_table
    if cache_leftpad is not None:
        _refuse("cache_leftpad", "a tensor", "caches start at slot 0; shift them, or use a block_table")
    batch, time = q.shape[:2]
    if cache_seqlens is None:
        if block_table is not None and k is None:
            _refuse("cache_seqlens", None, "a paged cache needs the lengths of its sequences")
        cache_seqlens = k_cache.shape[1] if k is None else 0
    if cache_batch_idx is not None:
        if block_table is not None:
            _refuse("cache_batch_idx", "a tensor", "with a block_table, which says where each sequence lies")
        block_table = cache_batch_idx.to(torch.int32)[:, None].contiguous()  # every row of the cache is one page
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    used = cache_seqlens.to(torch.int32).contiguous()
    if rotary_cos is not None:
        if k is None:
            _refuse("rotary_cos", "a tensor", "rotary needs the new k and v")
        tables = {"cos": rotary_cos.contiguous(), "sin": rotary_sin.contiguous(), "interleaved": rotary_interleaved}
        k = yoco_ext.rotary(k, offsets=used, **tables)
        if causal or window != (-1, -1):
            q = yoco_ext.rotary(q, offsets=used, **tables)
        else:  # without a mask every query token stands at the first new position
            flat = yoco_ext.rotary(q.reshape(batch, 1, time * q.shape[2], q.shape[3]), offsets=used, **tables)
            q = flat.reshape(q.shape)
    if k is not None:
        yoco_ext.append_kv(
            k, v, k_cache, v_cache, seqused_k=used, block_table=block_table, k_scale=k_descale, v_scale=v_descale
        )
        used = used + k.shape[1]
    shared: dict[str, Any] = {
        "scale": softmax_scale,
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "sinks": None if s_aux is None else s_aux.float(),
        "alibi_slopes": _slopes(alibi_slopes),
        "seqused_k": used,
        "return_lse": return_softmax_lse,
    }
    if time <= 16:
        return yoco_ext.attention_decode(
            q,
            k_cache,
            v_cache,
            block_table=block_table,
            k_scale=k_descale,
            v_scale=v_descale,
            num_splits=num_splits,
            **shared,
        )
    if cache_batch_idx is not None:
        block_table, rows = None, cache_batch_idx.long()
        k_cache, v_cache = k_cache[rows], v_cache[rows]
    if block_table is not None or k_cache.dtype != q.dtype:
        _refuse("q", f"{time} tokens", "a paged or quantised cache is read by at most 16 query tokens at a time")
    return yoco_ext.attention(q, k_cache, v_cache, **shared)


# ---- flash_attn.bert_padding ----------------------------------------------------------------------------------------
def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x [rows, ...] at indices [n] -> [n, ...]."""
    return x.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """[n, ...] values at rows indices [n] of zeros -> [first_axis_dim, ...]."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None) -> tuple:
    """hidden_states [B, T, ...], attention_mask [B, T] (1 = token) -> packed [tokens, ...], indices [tokens],
    cu_seqlens int32 [B + 1], longest length, tokens used per sequence int32 [B]."""
    mask = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = mask.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(mask.flatten(), as_tuple=False).flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of unpad_input: [tokens, ...] -> [batch, seqlen, ...], zeros where there is no token."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


# ---- flash_attn.layers.rotary ---------------------------------------------------------------------------------------
def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x [B, T, H, D] (packed: [tokens, H, D] with cu_seqlens); cos and sin [positions, rotary_dim / 2]."""
    packed = cu_seqlens is not None
    if not packed and not isinstance(seqlen_offsets, Tensor) and seqlen_offsets + x.shape[1] > cos.shape[0]:
        raise ValueError(
            f"cos: got {cos.shape[0]} positions; allowed: at least {seqlen_offsets + x.shape[1]}, what x reaches"
        )
    offsets = seqlen_offsets.to(torch.int32) if isinstance(seqlen_offsets, Tensor) else int(seqlen_offsets)
    y = yoco_ext.rotary(
        x[None] if packed else x,
        cos=cos.contiguous(),
        sin=sin.contiguous(),
        interleaved=interleaved,
        offsets=offsets,
        cu_seqlens=cu_seqlens,
    )
    y = y[0] if packed else y
    return x.copy_(y) if inplace else y


# ---- standing in for the package ------------------------------------------------------------------------------------
def _build_modules() -> dict[str, types.ModuleType]:
    modules = {}
    for name in _MODULES:
        module = types.ModuleType(name, "Served by yoco_ext.compat.flash_attn")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        modules[name] = module
        if "." in name:
            parent, child = name.rsplit(".", 1)
            setattr(modules[parent], child, module)
    functions = {
        "flash_attn": (
            flash_attn_func,
            flash_attn_qkvpacked_func,
            flash_attn_kvpacked_func,
            flash_attn_varlen_func,
            flash_attn_varlen_qkvpacked_func,
            flash_attn_varlen_kvpacked_func,
            flash_attn_with_kvcache,
        ),
        "flash_attn.bert_padding": (index_first_axis, index_put_first_axis, unpad_input, pad_input),
        "flash_attn.layers.rotary": (apply_rotary_emb,),
    }
    functions["flash_attn.flash_attn_interface"] = functions["flash_attn"]
    for name, members in functions.items():
        for member in members:
            setattr(modules[name], member.__name__, member)
    modules["flash_attn"].__version__ = __version__
    return modules


_replaced: dict[str, types.ModuleType | None] | None = None


def install() -> bool:
    """Makes `import flash_attn` and its submodules resolve to this module, whether or not the package is installed.
    False when that was so already."""
    global _replaced
    if _replaced is not None:
        return False
    modules = _build_modules()
    loaded = [n for n in sys.modules if n == "flash_attn" or n.startswith("flash_attn.")]
    _replaced = {name: sys.modules.get(name) for name in {*modules, *loaded}}
    for name in loaded:
        del sys.modules[name]
    sys.modules.update(modules)
    return True


def uninstall() -> None:
    """Takes the stand-in out again; modules that were there before come back."""
    global _replaced
    if _replaced is None:
        return
    for name, module in _replaced.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module
    _replaced = None


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """`with installed(): import flash_attn` for a limited time."""
    install()
    try:
        yield
    finally:
        uninstall()
