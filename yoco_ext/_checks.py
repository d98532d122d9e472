"""Argument checks shared by the fused ops, the reference and the fake (Meta) implementations.

Every failure is a ValueError that names the argument, what was got and what is allowed. Checks look at shapes, dtypes
and devices only (no host synchronisation); the contents of index tensors are the back end's to check or clamp.
They run on every call, so the common path is comparisons of tuples and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CACHE_DTYPES = (*FLOATS, torch.float8_e4m3fn, torch.int8)
MAX_HEAD_DIM = 256
MAX_STEP_TOKENS = 16


def fail(argument: str, got: Any, allowed: str) -> NoReturn:
    """The one error message of this package."""
    raise ValueError(f"{argument}: got {got}; allowed: {allowed}")


def _describe(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else repr(x)


def _shape(argument: str, x: Tensor, shape: Sequence[int], text: str) -> None:
    if tuple(x.shape) != tuple(shape):
        fail(argument, f"shape {list(x.shape)}", f"{text} = {list(shape)}")


def _rank(argument: str, x: Any, rank: int, text: str) -> None:
    if not isinstance(x, Tensor):
        fail(argument, type(x).__name__, f"a tensor {text}")
    if x.dim() != rank:
        fail(argument, f"shape {list(x.shape)}", text)


def _last_contiguous(argument: str, x: Tensor) -> None:
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        fail(argument, f"strides {list(x.stride())}", "any strides with a contiguous last dimension (stride 1)")


def _same(argument: str, x: Tensor, like: Tensor, name: str = "q") -> None:
    """Same dtype and device as the leading tensor."""
    if x.dtype != like.dtype:
        fail(f"{argument}.dtype", x.dtype, f"{like.dtype}, the dtype of {name}")
    if x.device != like.device:
        fail(f"{argument}.device", x.device, f"{like.device}, the device of {name}")


def _device(argument: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        fail(f"{argument}.device", x.device, f"{like.device}")


def _float(argument: str, x: Tensor, allowed: tuple[torch.dtype, ...] = FLOATS) -> None:
    if x.dtype not in allowed:
        fail(f"{argument}.dtype", x.dtype, ", ".join(str(d).removeprefix("torch.") for d in allowed))


def _head_dim(argument: str, dim: int) -> None:
    if dim % 8 != 0 or not 8 <= dim <= MAX_HEAD_DIM:
        fail(argument, f"head dimension {dim}", f"a multiple of 8 from 8 to {MAX_HEAD_DIM}")


def _int32(argument: str, x: Any, shape: Sequence[int], text: str, like: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.int32:
        fail(argument, _describe(x), f"an int32 tensor {text}")
    _shape(argument, x, shape, text)
    _device(argument, x, like)
    if not x.is_contiguous():
        fail(argument, f"strides {list(x.stride())}", "a contiguous tensor")


def _per_head(argument: str, x: Any, heads: int, like: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        fail(argument, _describe(x), f"a floating-point tensor [{heads}]")
    _shape(argument, x, (heads,), "[heads]")
    _device(argument, x, like)


def _number(argument: str, x: Any, allowed: str = "a number or None") -> None:
    if x is not None and isinstance(x, (Tensor, str)):
        fail(argument, _describe(x), allowed)


def cu_seqlens(argument: str, x: Any, batch: int, like: Tensor) -> int:
    """Boundaries of packed sequences; returns their number."""
    if not isinstance(x, Tensor) or x.dtype != torch.int32 or x.dim() != 1 or x.shape[0] < 1:
        fail(argument, _describe(x), "an int32 tensor [sequences + 1]")
    if batch != 1:
        fail(argument, f"packed sequences with batch {batch}", "batch 1")
    _device(argument, x, like)
    if not x.is_contiguous():
        fail(argument, f"strides {list(x.stride())}", "a contiguous tensor")
    return x.shape[0] - 1


def index_range(argument: str, x: Tensor | None, low: int, high: int) -> None:
    """Contents of an index tensor, for back ends that may look (the reference; the CPU kernels check in C++)."""
    if x is not None and x.numel() and not (low <= int(x.min()) and int(x.max()) <= high):
        fail(argument, f"values from {int(x.min())} to {int(x.max())}", f"{low} to {high}")


def boundaries(argument: str, x: Tensor, time: int) -> list[int]:
    """Contents of cu_seqlens, for back ends that may look."""
    bounds = x.tolist()
    if bounds[0] != 0 or any(a > b for a, b in itertools.pairwise(bounds)) or bounds[-1] > time:
        fail(argument, bounds, f"rising from 0 to at most {time}")
    return bounds


def _no_gradient(op: str, instead: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        fail(op, "a tensor that requires a gradient", f"torch.no_grad(): it has no backward{instead}")


# ---- gated retention -----------------------------------------------------------------------------------------------
def _retention_tensors(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, normalizer: float | None
) -> tuple[int, int, int, int, int]:
    _rank("q", q, 4, "[batch, time, heads, dim_k]")
    _rank("k", k, 4, "[batch, time, heads, dim_k]")
    _rank("v", v, 4, "[batch, time, heads, dim_v]")
    _rank("g", g, 3, "[batch, time, heads]")
    batch, time, heads, dim_k = q.shape
    dim_v = v.shape[3]
    _float("q", q)
    _same("k", k, q)
    _same("v", v, q)
    _shape("k", k, (batch, time, heads, dim_k), "the shape of q [batch, time, heads, dim_k]")
    _shape("v", v, (batch, time, heads, dim_v), "[batch, time, heads, dim_v] with q's batch, time and heads")
    _shape("g", g, (batch, time, heads), "[batch, time, heads]")
    if g.dtype != q.dtype and g.dtype != torch.float32:
        fail("g.dtype", g.dtype, f"{q.dtype} (the dtype of q) or torch.float32")
    _device("g", g, q)
    _head_dim("q", dim_k)
    _head_dim("v", dim_v)
    _last_contiguous("q", q)
    _last_contiguous("k", k)
    _last_contiguous("v", v)
    if normalizer is not None and (isinstance(normalizer, (Tensor, str, bool)) or not normalizer > 0):
        fail("gate_logit_normalizer", _describe(normalizer), "a positive number, or None (g is the log decay)")
    return batch, time, heads, dim_k, dim_v


def _state(argument: str, state: Any, shape: Sequence[int], q: Tensor) -> None:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if not isinstance(state, Tensor) or state.dtype != dtype:
        fail(argument, _describe(state), f"a {dtype} tensor [sequences, heads, dim_k, dim_v]")
    _shape(argument, state, shape, "[sequences, heads, dim_k, dim_v]")
    _device(argument, state, q)


def _rotary_on_load(inv_freq: Tensor | None, offsets: Tensor | int | None, sequences: int, dim: int, q: Tensor) -> None:
    if inv_freq is not None:
        _inv_freq(inv_freq, dim, q)
        _offsets(offsets, sequences, q)
    elif offsets is not None:
        fail("offsets", _describe(offsets), "None without inv_freq (they are the positions to rotate by)")


def gated_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu: Tensor | None,
    normalizer: float | None = None,
    inv_freq: Tensor | None = None,
    offsets: Tensor | int | None = None,
) -> int:
    """Returns the number of sequences."""
    batch, _, heads, dim_k, dim_v = _retention_tensors(q, k, v, g, normalizer)
    _number("scale", scale)
    sequences = batch if cu is None else cu_seqlens("cu_seqlens", cu, batch, q)
    _rotary_on_load(inv_freq, offsets, sequences, dim_k, q)
    if initial_state is not None:
        _state("initial_state", initial_state, (sequences, heads, dim_k, dim_v), q)
    return sequences


def gated_retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    scale: float | None,
    normalizer: float | None = None,
    inv_freq: Tensor | None = None,
    offsets: Tensor | int | None = None,
) -> None:
    batch, time, heads, dim_k, dim_v = _retention_tensors(q, k, v, g, normalizer)
    _number("scale", scale)
    _rotary_on_load(inv_freq, offsets, batch, dim_k, q)
    if not 1 <= time <= MAX_STEP_TOKENS:
        fail("q", f"{time} tokens", f"1 to {MAX_STEP_TOKENS} tokens; gated_retention takes any number")
    _state("state", state, (batch, heads, dim_k, dim_v), q)
    _no_gradient("gated_retention_step", "; gated_retention has one", q, k, v, g, state)
    if not state.is_contiguous():
        fail("state", f"strides {list(state.stride())}", "a contiguous tensor (it is updated in place)")


# ---- attention -----------------------------------------------------------------------------------------------------
def window(value: Any, argument: str = "window") -> tuple[int, int]:
    """(left, right): keys before and after the diagonal that are visible, -1 = all."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        fail(argument, repr(value), "(left, right), each -1 (unlimited) or a number of keys >= 0")
    left, right = value
    if isinstance(left, (bool, float)) or isinstance(right, (bool, float)) or left < -1 or right < -1:
        fail(argument, repr(value), "(left, right), each -1 (unlimited) or a number of keys >= 0")
    return left, right


def _latents(latents: Any, batch: int, heads_kv: int, dim_qk: int, dim_v: int, q: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(latents, (tuple, list)) or len(latents) != 2:
        fail("latents", type(latents).__name__, "a pair (k, v) of tensors")
    k, v = latents
    _rank("latents[0]", k, 4, "[batch or 1, latents, heads_kv, dim_qk]")
    _rank("latents[1]", v, 4, "[batch or 1, latents, heads_kv, dim_v]")
    _same("latents[0]", k, q)
    _same("latents[1]", v, q)
    if k.shape[0] != 1 and k.shape[0] != batch:
        fail("latents[0]", f"batch {k.shape[0]}", f"{batch} or 1")
    _shape("latents[0]", k, (k.shape[0], k.shape[1], heads_kv, dim_qk), "[batch or 1, latents, heads_kv, dim_qk]")
    _shape("latents[1]", v, (k.shape[0], k.shape[1], heads_kv, dim_v), "[batch or 1, latents, heads_kv, dim_v]")
    _last_contiguous("latents[0]", k)
    _last_contiguous("latents[1]", v)
    return k, v


def qkv(q: Tensor, k: Tensor, v: Tensor, k_name: str = "k", v_name: str = "v") -> tuple[int, int, int, int]:
    """Returns (batch, time_q, heads_q, heads_kv)."""
    _rank("q", q, 4, "[batch, time_q, heads_q, dim_qk]")
    _rank(k_name, k, 4, "[batch, time_k, heads_kv, dim_qk]")
    _rank(v_name, v, 4, "[batch, time_k, heads_kv, dim_v]")
    _float("q", q)
    batch, time_q, heads_q, dim_qk = q.shape
    batch_k, time_k, heads_kv, dim_k = k.shape
    batch_v, time_v, heads_v, dim_v = v.shape
    if dim_k != dim_qk:
        fail(k_name, f"head dimension {dim_k}", f"{dim_qk}, the head dimension of q")
    if batch_v != batch_k or time_v != time_k or heads_v != heads_kv:
        fail(v_name, f"shape {list(v.shape)}", f"{list(k.shape[:3])} + [dim_v], like {k_name}")
    if heads_kv < 1 or heads_q < 1 or heads_q % heads_kv != 0:
        fail("q", f"{heads_q} heads over {heads_kv} heads of {k_name}", f"a multiple of the heads of {k_name}")
    _head_dim("q", dim_qk)
    _head_dim(v_name, dim_v)
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        _last_contiguous("q", q)
        _last_contiguous(k_name, k)
        _last_contiguous(v_name, v)
    return batch, time_q, heads_q, heads_kv


def _logit_options(
    q: Tensor, heads: int, sequences: int, scale: Any, softcap: Any, sinks: Tensor | None, alibi_slopes: Tensor | None
) -> None:
    _number("scale", scale)
    _number("softcap", softcap, "a number >= 0 (0: none)")
    if not softcap >= 0:
        fail("softcap", softcap, "a number >= 0 (0: none)")
    if sinks is not None:
        _per_head("sinks", sinks, heads, q)
    if alibi_slopes is not None:
        if not isinstance(alibi_slopes, Tensor) or not alibi_slopes.is_floating_point():
            fail("alibi_slopes", _describe(alibi_slopes), "a floating-point tensor [heads_q] or [sequences, heads_q]")
        if tuple(alibi_slopes.shape) not in ((heads,), (sequences, heads)):
            fail("alibi_slopes", f"shape {list(alibi_slopes.shape)}", f"[{heads}] or [{sequences}, {heads}]")
        if alibi_slopes.requires_grad:
            fail("alibi_slopes", "a tensor that requires a gradient", "a constant (pass alibi_slopes.detach())")
        _device("alibi_slopes", alibi_slopes, q)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_k: Tensor | None,
    prefix_len: Tensor | None,
    latents: Any,
    latent_begin: Tensor | None,
    latent_end: Tensor | None,
) -> tuple[int, int]:
    """Returns (window_left, window_right) with causal folded in; -1 = unlimited."""
    batch, time_q, heads_q, heads_kv = qkv(q, k, v)
    _same("k", k, q)
    _same("v", v, q)
    if k.shape[0] != batch:
        fail("k", f"batch {k.shape[0]}", f"{batch}, the batch of q")
    sequences = batch
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
            fail(missing, None, "both cu_seqlens_q and cu_seqlens_k, or neither")
        sequences = cu_seqlens("cu_seqlens_q", cu_seqlens_q, batch, q)
        if cu_seqlens("cu_seqlens_k", cu_seqlens_k, batch, q) != sequences:
            fail("cu_seqlens_k", f"{cu_seqlens_k.shape[0]} entries", f"{sequences + 1}, as in cu_seqlens_q")
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if bound is not None and (isinstance(bound, (Tensor, float, str)) or bound < 0):
            fail(name, _describe(bound), "an integer >= 0 or None")
    if seqused_k is not None:
        _int32("seqused_k", seqused_k, (sequences,), "[sequences]", q)
    left, right = window(window_size)
    if causal:
        right = 0
    if prefix_len is not None:
        _int32("prefix_len", prefix_len, (batch, time_q), "[batch, time_q]", q)
        if tuple(window_size) != (-1, -1):
            fail("window", tuple(window_size), "(-1, -1) together with prefix_len, which replaces causal and window")
        left, right = -1, -1
    _logit_options(q, heads_q, sequences, scale, softcap, sinks, alibi_slopes)
    if latents is not None:
        _latents(latents, batch, heads_kv, q.shape[3], v.shape[3], q)
    for name, bound in (("latent_begin", latent_begin), ("latent_end", latent_end)):
        if bound is not None:
            if latents is None:
                fail(name, "a tensor without latents", "None, or latents=(k, v) as well")
            _int32(name, bound, (batch, time_q), "[batch, time_q]", q)
    return left, right


# ---- decode --------------------------------------------------------------------------------------------------------
def _cache(x: Tensor, k_cache: Tensor, v_cache: Tensor, sequences: int, block_table: Tensor | None, ring: bool) -> None:
    """Contiguous [sequences, capacity, heads, dim] or paged [num_pages, page_size, heads, dim]."""
    if k_cache.dtype not in (x.dtype, torch.float8_e4m3fn, torch.int8):
        fail("k_cache.dtype", k_cache.dtype, f"{x.dtype} (that of the tokens), torch.float8_e4m3fn or torch.int8")
    if v_cache.dtype != k_cache.dtype:
        fail("v_cache.dtype", v_cache.dtype, f"{k_cache.dtype}, the dtype of k_cache")
    _device("k_cache", k_cache, x)
    _device("v_cache", v_cache, x)
    if block_table is None:
        if k_cache.shape[0] != sequences:
            fail("k_cache", f"batch {k_cache.shape[0]}", f"{sequences}, one row per sequence (or pass block_table)")
        return
    if not isinstance(block_table, Tensor) or block_table.dtype != torch.int32 or block_table.dim() != 2:
        fail("block_table", _describe(block_table), "an int32 tensor [sequences, max_pages]")
    _shape("block_table", block_table, (sequences, block_table.shape[1]), "[sequences, max_pages]")
    _device("block_table", block_table, x)
    if not block_table.is_contiguous():
        fail("block_table", f"strides {list(block_table.stride())}", "a contiguous tensor")
    if ring:
        fail("ring", True, "False with block_table: a ring buffer is contiguous")


def _cache_scales(k_scale: Tensor | None, v_scale: Tensor | None, k_cache: Tensor) -> None:
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            _per_head(name, scale, k_cache.shape[2], k_cache)
            if scale.dtype != torch.float32:
                fail(f"{name}.dtype", scale.dtype, "torch.float32")
            if not scale.is_contiguous():
                fail(name, f"strides {list(scale.stride())}", "a contiguous tensor")


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqused_k: Tensor,
    block_table: Tensor | None,
    causal: bool,
    window_size: Any,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    latents: Any,
    latent_len: Tensor | None,
    ring: bool,
    num_splits: int,
) -> tuple[int, int]:
    """Returns (window_left, window_right) with causal folded in; -1 = unlimited."""
    batch, time_q, heads_q, _ = qkv(q, k_cache, v_cache, "k_cache", "v_cache")
    if not 1 <= time_q <= MAX_STEP_TOKENS:
        fail("q", f"{time_q} tokens", f"1 to {MAX_STEP_TOKENS} tokens; attention takes any number")
    _no_gradient("attention_decode", "; attention has one", q, k_cache, v_cache)
    _cache(q, k_cache, v_cache, batch, block_table, ring)
    _int32("seqused_k", seqused_k, (batch,), "[batch]", q)
    left, right = window(window_size)
    if causal:
        right = 0
    _logit_options(q, heads_q, batch, scale, softcap, sinks, alibi_slopes)
    _cache_scales(k_scale, v_scale, k_cache)
    if latents is not None:
        _latents(latents, batch, k_cache.shape[2], q.shape[3], v_cache.shape[3], q)
    if latent_len is not None:
        if latents is None:
            fail("latent_len", "a tensor without latents", "None, or latents=(k, v) as well")
        _int32("latent_len", latent_len, (batch,), "[batch]", q)
    if isinstance(num_splits, (Tensor, float)) or num_splits < 0:
        fail("num_splits", num_splits, "an integer >= 0 (0: chosen by the back end)")
    return left, right


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqused_k: Tensor,
    block_table: Tensor | None,
    cu: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    inv_freq: Tensor | None,
    ring: bool,
) -> None:
    _rank("k", k, 4, "[batch, time, heads, dim_k]")
    _rank("v", v, 4, "[batch, time, heads, dim_v]")
    _rank("k_cache", k_cache, 4, "[batch, capacity, heads, dim_k] or [pages, page_size, heads, dim_k]")
    _rank("v_cache", v_cache, 4, "[batch, capacity, heads, dim_v] or [pages, page_size, heads, dim_v]")
    _float("k", k)
    _same("v", v, k, "k")
    batch, _, heads, dim_k = k.shape
    _shape("v", v, (*k.shape[:3], v.shape[3]), "[batch, time, heads, dim_v] with k's batch, time and heads")
    _shape("k_cache", k_cache, (*k_cache.shape[:2], heads, dim_k), "[..., ..., heads, dim_k]")
    _shape("v_cache", v_cache, (*k_cache.shape[:2], heads, v.shape[3]), "[..., ..., heads, dim_v] like k_cache")
    _head_dim("k", dim_k)
    _head_dim("v", v.shape[3])
    for name, x in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _last_contiguous(name, x)
    sequences = batch if cu is None else cu_seqlens("cu_seqlens", cu, batch, k)
    _no_gradient("append_kv", "", k, v, k_cache, v_cache)
    _cache(k, k_cache, v_cache, sequences, block_table, ring)
    _int32("seqused_k", seqused_k, (sequences,), "[sequences]", k)
    _cache_scales(k_scale, v_scale, k_cache)
    if inv_freq is not None:
        _inv_freq(inv_freq, dim_k, k)


# ---- pointwise -----------------------------------------------------------------------------------------------------
def _inv_freq(inv_freq: Any, dim: int, like: Tensor) -> None:
    if not isinstance(inv_freq, Tensor) or inv_freq.dtype != torch.float32 or inv_freq.dim() != 1:
        fail("inv_freq", _describe(inv_freq), "a float32 tensor [rotary_dim / 2]")
    if not 1 <= inv_freq.shape[0] <= dim // 2:
        fail("inv_freq", f"{inv_freq.shape[0]} frequencies", f"1 to {dim // 2} (half the head dimension)")
    _device("inv_freq", inv_freq, like)
    if not inv_freq.is_contiguous():
        fail("inv_freq", f"strides {list(inv_freq.stride())}", "a contiguous tensor")


def _offsets(offsets: Tensor | int | None, sequences: int, like: Tensor) -> None:
    if isinstance(offsets, Tensor):
        _int32("offsets", offsets, (sequences,), "[sequences]", like)
    elif offsets is not None and (isinstance(offsets, (bool, float, str)) or offsets < 0):
        fail("offsets", repr(offsets), "None, an integer >= 0 or an int32 tensor [sequences]")


def _weight(weight: Tensor | None, dim: int, name: str, like: Tensor) -> None:
    """A weight [dim] in the dtype of `like`, which is called `name`, or in float32."""
    if weight is None:
        return
    _rank("weight", weight, 1, "[dim]")
    _shape("weight", weight, (dim,), "[dim]")
    if weight.dtype != like.dtype and weight.dtype != torch.float32:
        fail("weight.dtype", weight.dtype, f"{like.dtype} (the dtype of {name}) or torch.float32")
    _device("weight", weight, like)


def _eps(eps: float) -> None:
    _number("eps", eps, "a number >= 0")
    if not eps >= 0:
        fail("eps", eps, "a number >= 0")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None) -> None:
    if not isinstance(x, Tensor) or x.dim() < 1:
        fail("x", _describe(x), "a tensor [..., dim]")
    _float("x", x)
    if x.shape[-1] < 1:
        fail("x", f"shape {list(x.shape)}", "a last dimension of at least 1")
    _weight(weight, x.shape[-1], "x", x)
    if residual is not None:
        if not isinstance(residual, Tensor):
            fail("residual", _describe(residual), "a tensor like x")
        _same("residual", residual, x, "x")
        _shape("residual", residual, x.shape, "the shape of x")
    _eps(eps)


def rotary(
    x: Tensor,
    inv_freq: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    offsets: Tensor | int | None,
    cu: Tensor | None,
) -> int:
    """Returns the number of sequences."""
    _rank("x", x, 4, "[batch, time, heads, dim]")
    _float("x", x)
    _last_contiguous("x", x)
    _head_dim("x", x.shape[3])
    if (inv_freq is None) == (cos is None) or (cos is None) != (sin is None):
        given = [n for n, t in (("inv_freq", inv_freq), ("cos", cos), ("sin", sin)) if t is not None]
        fail("inv_freq", f"{given or None}", "either inv_freq, or both cos and sin")
    if inv_freq is not None:
        _inv_freq(inv_freq, x.shape[3], x)
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and cos is not None:
            _rank(name, table, 2, "[positions, rotary_dim / 2]")
            _shape(name, table, cos.shape, "[positions, rotary_dim / 2], the same for cos and sin")
            if table.dtype != cos.dtype or (table.dtype != x.dtype and table.dtype != torch.float32):
                fail(f"{name}.dtype", table.dtype, f"{x.dtype} (the dtype of x) or torch.float32, the same for both")
            if not 1 <= table.shape[1] <= x.shape[3] // 2:
                fail(name, f"{table.shape[1]} frequencies", f"1 to {x.shape[3] // 2} (half the head dimension)")
            _device(name, table, x)
    sequences = x.shape[0] if cu is None else cu_seqlens("cu_seqlens", cu, x.shape[0], x)
    _offsets(offsets, sequences, x)
    return sequences


def swiglu(gate: Tensor, up: Tensor) -> None:
    if not isinstance(gate, Tensor) or not isinstance(up, Tensor):
        fail("gate, up", f"{_describe(gate)}, {_describe(up)}", "two tensors")
    _float("gate", gate)
    _same("up", up, gate, "gate")
    _shape("up", up, gate.shape, "the shape of gate")


def retention_output(o: Tensor, gate: Tensor, eps: float) -> None:
    _rank("o", o, 4, "[batch, time, heads, dim]")
    _rank("gate", gate, 4, "[batch, time, heads, dim]")
    _float("o", o)
    _same("gate", gate, o, "o")
    _shape("gate", gate, o.shape, "the shape of o")
    _head_dim("o", o.shape[3])
    _last_contiguous("o", o)
    _last_contiguous("gate", gate)
    _eps(eps)


# ---- differential attention, gated memory --------------------------------------------------------------------------
def paired(argument: str, x: Any) -> None:
    """Heads 2h and 2h + 1 belong together."""
    _rank(argument, x, 4, "[batch, time, 2 * heads, dim]")
    if x.shape[2] % 2 != 0:
        fail(argument, f"{x.shape[2]} heads", "an even number (heads 2h and 2h + 1 are a pair)")


def differential_combine(a: Tensor, lam: Any, weight: Tensor | None, eps: float, scale: float) -> None:
    paired("a", a)
    _float("a", a)
    _head_dim("a", a.shape[3])
    _last_contiguous("a", a)
    if isinstance(lam, Tensor):
        shape = (a.shape[0], a.shape[1], a.shape[2] // 2)
        padded = (1,) * (3 - lam.dim()) + tuple(lam.shape)
        if not lam.is_floating_point() or len(padded) != 3 or any(n not in (1, m) for n, m in zip(padded, shape)):
            fail("lam", _describe(lam), f"a number, or a floating-point tensor that broadcasts to {list(shape)}")
        _device("lam", lam, a)
    elif lam is None:
        fail("lam", lam, "a number or a tensor")
    else:
        _number("lam", lam)
    _weight(weight, a.shape[3], "a", a)
    _eps(eps)
    _number("scale", scale, "a number")


def _differential_options(options: Mapping[str, Any]) -> None:
    if options.get("return_lse"):
        fail("return_lse", True, "False: differential attention has two softmaxes and no one log-sum-exp")


def differential_attention(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> None:
    for name, x in (("q", q), ("k", k)):
        paired(name, x)
    _rank("v", v, 4, "[batch, time, heads, 2 * dim]")
    _differential_options(options)
    dim, heads = q.shape[3], k.shape[2] // 2
    if k.shape[3] != dim:
        fail("k", f"head dimension {k.shape[3]}", f"{dim}, that of q")
    if dim % 8 != 0 or not 8 <= dim <= MAX_HEAD_DIM // 2:
        fail("q", f"head dimension {dim}", f"a multiple of 8 from 8 to {MAX_HEAD_DIM // 2}")
    if (v.shape[2], v.shape[3]) not in ((heads, 2 * dim), (2 * heads, dim)):
        fail("v", f"shape {list(v.shape)}", f"[batch, time, {heads}, {2 * dim}] or [batch, time, {2 * heads}, {dim}]")


def differential_queries(q: Tensor, keys: Any, name: str, options: Mapping[str, Any]) -> None:
    """Queries against keys whose heads are paired already."""
    paired("q", q)
    _differential_options(options)
    _rank(name, keys, 4, "[batch, time, heads, 2 * dim]")
    if keys.shape[3] != 2 * q.shape[3]:
        fail(name, f"head dimension {keys.shape[3]}", f"{2 * q.shape[3]}, twice that of q (see pair_heads)")


def differential_v2(q: Tensor, k: Tensor, options: Mapping[str, Any]) -> None:
    paired("q", q)
    _rank("k", k, 4, "[batch, time, heads, dim]")
    _differential_options(options)
    if k.shape[2] == 0 or (q.shape[2] // 2) % k.shape[2] != 0:
        fail(
            "q",
            f"{q.shape[2]} heads",
            f"a multiple of {2 * k.shape[2]}: pairs that share one of the {k.shape[2]} K/V heads",
        )


def gated_memory(gate: Tensor, memory: Tensor, weight: Tensor | None, normalize: bool, groups: int, eps: float) -> None:
    for name, x in (("gate", gate), ("memory", memory)):
        if not isinstance(x, Tensor) or x.dim() < 1:
            fail(name, _describe(x), "a tensor [..., dim]")
    _float("memory", memory)
    _same("gate", gate, memory, "memory")
    _shape("gate", gate, memory.shape, "the shape of memory")
    _eps(eps)
    if not normalize:
        if weight is not None or groups != 1:
            fail("normalize", normalize, "True where weight or groups are given")
        return
    dim = memory.shape[-1]
    if not isinstance(groups, int) or groups < 1 or dim < 1 or dim % groups != 0:
        fail("groups", groups, f"a divisor of the last dimension, {dim}")
    _weight(weight, dim, "memory", memory)
