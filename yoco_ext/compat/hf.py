"""transformers on yoco_ext's kernels: attn_implementation="yoco_ext" for its models, and YOCO as one of its models.

    from yoco_ext.compat import hf
    hf.install()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="yoco_ext")

Served: grouped-query heads, sliding windows, shared K and V, softcap, attention sinks, left and right padding, packed
sequences, dynamic and static caches. Masks stay what the kernels want, one interval of keys per row; the [time, time]
mask of other implementations is made only for a pattern that is no such interval (or for padding under torch.compile).
Such calls, and those with dropout, a position bias or an odd head dimension, go to PyTorch's own attention, and one
line of the logger "yoco_ext.compat.hf" says so.

`YOCOExtConfig`, `YOCOExtForCausalLM` and `YOCOExtCache` (model_type "yoco_ext") are in yoco_ext.compat._hf_model and
registered with AutoConfig and AutoModelForCausalLM by `install`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import yoco_ext

try:
    import transformers
    from transformers import masking_utils
except ImportError as error:
    raise ImportError("compat.hf needs transformers 5, which did not import: pip install 'yoco_ext[hf]'") from error

logger = logging.getLogger(__name__)

NAME = "yoco_ext"
_DECODE_TOKENS = 16  # attention_decode takes up to this many

_logged: set[str] = set()

# What this module's mask function hands to its attention function. All have four dimensions, which transformers takes
# for a finished mask and passes on untouched:
#   None                    causal (or, in a module that is not causal, everything), nothing cut
#   int32 [1, 1, 0, window] causal with a sliding window; the size says it all
#   int32 [2, 1, B, Tq]     row i of sequence b sees keys [0, 0, b, i] .. [1, 0, b, i] - 1
#   bool [B, 1, Tq, Tk]     anything else


# ---- masks -----------------------------------------------------------------------------------------------------------
@dataclass
class _Pattern:
    """A mask function of transformers that was understood."""

    causal: bool = False
    window: int | None = None  # keys, the query's own included
    packed: Tensor | None = None  # [B, time], the number of each token's sequence


def _understand(function: Callable) -> _Pattern | None:
    """Reads causal, window and packed patterns out of transformers' mask functions, which are closures."""
    if function is masking_utils.causal_mask_function:
        return _Pattern(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return _Pattern()
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    cells = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))
    kind = function.__qualname__.split(".")[0]
    if kind == "sliding_window_overlay":
        return _Pattern(window=cells["sliding_window"])
    if kind == "packed_sequence_mask_function":
        return _Pattern(packed=cells["packed_sequence_mask"])
    if kind != "and_masks":
        return None
    whole = _Pattern()
    for part in map(_understand, cells["mask_functions"]):
        if part is None or (part.packed is not None and whole.packed is not None):
            return None
        windows = [w for w in (part.window, whole.window) if w is not None]
        packed = part.packed if part.packed is not None else whole.packed
        whole = _Pattern(part.causal or whole.causal, min(windows, default=None), packed)
    return whole


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """The entry of transformers' AttentionMaskInterface; see the list at the top for what it returns.

    attention_mask: bool [B, tokens so far], False for padding. q_offset, kv_offset: positions of the first query and
    of the first key that is still in the cache.
    """
    # A compiler cannot read what is in a padding mask.
    readable = attention_mask is None or not torch.compiler.is_compiling()
    pattern = _understand(mask_function) if readable else None
    kept = None
    if pattern is not None and attention_mask is not None:
        padded = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        kept = padded[:, kv_offset : kv_offset + kv_length].bool()
        if bool(kept.all()):
            kept = None
    needs_tensor = not allow_is_causal_skip and isinstance(q_offset, int) and getattr(pattern, "packed", None) is None
    if pattern is not None and not needs_tensor:
        mask = _interval_mask(pattern, kept, batch_size, q_length, kv_length, q_offset, kv_offset, device)
        if mask is not None or (pattern.causal and allow_is_causal_skip) or allow_is_bidirectional_skip:
            return mask
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        device=device,
        **options,
    )


def _interval_mask(
    pattern: _Pattern,
    kept: Tensor | None,
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> Tensor | None:
    window = pattern.window
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if kept is None and pattern.packed is None and (aligned if pattern.causal else window is None):
        if window is None or window >= kv_length:
            return None
        return torch.empty((1, 1, 0, window), dtype=torch.int32, device=device)
    position = torch.arange(q_length, device=device) + (q_offset - kv_offset)  # among the keys
    begin = torch.zeros_like(position) if window is None else position - window + 1
    end = position + 1 if pattern.causal else torch.full_like(position, kv_length)
    if pattern.packed is not None:
        # A token's sequence begins where its number first appears.
        first = pattern.packed.diff(dim=-1, prepend=pattern.packed[:, :1] - 1) != 0
        begin = torch.maximum(begin, (position * first).cummax(-1).values)
        if not pattern.causal:
            end = torch.minimum(end, begin + kv_length)
    if kept is not None:
        first, count = kept.int().argmax(-1, keepdim=True), kept.sum(-1, keepdim=True)
        key = torch.arange(kv_length, device=device)
        if not bool((kept == ((key >= first) & (key < first + count))).all()):
            return _with_holes(kept, begin, end, batch)
        begin, end = torch.maximum(begin, first), torch.minimum(end, first + count)
    rows = torch.stack([x.clamp(0, kv_length).expand(batch, q_length) for x in (begin, end)])
    return rows.to(torch.int32)[:, None].contiguous()


def _with_holes(kept: Tensor, begin: Tensor, end: Tensor, batch: int) -> Tensor:
    """Padding in the middle of a sequence is no interval: the mask itself, bool [B, 1, Tq, Tk]."""
    key = torch.arange(kept.shape[1], device=kept.device)
    visible = (key >= begin[..., None]) & (key < end[..., None])
    return (visible.expand(batch, -1, -1) & kept[:, None]).unsqueeze(1)


# ---- attention -------------------------------------------------------------------------------------------------------
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The entry of transformers' AttentionInterface: query [B, Hq, Tq, D], key and value [B, Hkv, Tk, D] ->
    [B, Tq, Hq, Dv]. s_aux [Hq]: attention sinks. attention_mask: what this module's mask function made, or a mask of
    the user's own."""
    if kwargs.get("cache") is not None:
        raise NotImplementedError('attn_implementation="yoco_ext" has no paged cache for continuous batching')
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = sliding_window if attention_mask is None else None
    interval = None
    if attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.dim() == 4:
        if attention_mask.shape[2] == 0:
            causal, window = True, attention_mask.shape[3]
        else:
            interval = attention_mask
    reason = _reason_against(query, value, dropout, kwargs)
    if reason is None and attention_mask is not None and interval is None and window is None:
        reason = "the mask is no interval of keys per row"
    if reason is not None:
        _log(reason)
        mask = attention_mask if interval is None and window is None else _dense_mask(interval, window, query, key)
        if mask is None and causal:
            mask = _dense_mask(None, None, query, key)
        out = _plain(query, key, value, mask, scaling, softcap, s_aux, dropout, kwargs.get("position_bias"))
        return out.transpose(1, 2).contiguous(), None

    q, k, v = (_last_contiguous(x.transpose(1, 2)) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    if interval is not None:
        # The kernels' second segment has a range of keys per row; the first one stays empty.
        begin, end = interval[:, 0]
        return yoco_ext.attention(
            q, k[:, :0], v[:, :0], causal=False, latents=(k, v), latent_begin=begin, latent_end=end, **options
        ), None
    options["window"] = (-1, -1) if not window else (window - 1, 0 if causal else window - 1)
    boundaries = kwargs.get("cu_seq_lens_q")
    if boundaries is not None:
        return yoco_ext.attention(
            q,
            k,
            v,
            causal=causal,
            cu_seqlens_q=boundaries.to(torch.int32),
            cu_seqlens_k=kwargs.get("cu_seq_lens_k", boundaries).to(torch.int32),
            **options,
        ), None
    if causal and 1 <= q.shape[1] <= _DECODE_TOKENS and not _needs_gradient(q, k, v, s_aux):
        used = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
        return yoco_ext.attention_decode(q, k, v, seqused_k=used, **options), None
    return yoco_ext.attention(q, k, v, causal=causal, **options), None


def _reason_against(query: Tensor, value: Tensor, dropout: float, options: dict[str, Any]) -> str | None:
    if dropout:
        return f"dropout={dropout}"
    if options.get("position_bias") is not None:
        return "position_bias is given"
    for dim in (query.shape[-1], value.shape[-1]):
        if dim % 8 or not 8 <= dim <= 256:
            return f"head dimension {dim} is not a multiple of 8 up to 256"
    return None


def _log(reason: str) -> None:
    if not torch.compiler.is_compiling() and reason not in _logged:  # a logger would break the graph
        _logged.add(reason)
        logger.warning('attn_implementation="yoco_ext": left to PyTorch, because %s', reason)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _dense_mask(interval: Tensor | None, window: int | None, query: Tensor, key: Tensor) -> Tensor:
    """bool, broadcast to [B, 1, Tq, Tk]; without an interval causal, aligned bottom-right."""
    index = torch.arange(key.shape[2], device=query.device)
    if interval is not None:
        begin, end = interval[:, 0, :, :, None]
    else:
        end = torch.arange(query.shape[2], device=query.device)[:, None] + (1 + key.shape[2] - query.shape[2])
        begin = end - (window or key.shape[2])
    visible = (index >= begin) & (index < end)
    return visible[:, None] if interval is not None else visible[None, None]


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
    bias: Tensor | None,
) -> Tensor:
    """PyTorch's attention in the layout [B, H, T, D], written out where its own function has no argument."""
    if bias is not None:
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
        mask = bias
    if not softcap and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    width = scores.shape[-1]
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., :width].nan_to_num()  # a row that sees nothing gives 0
    return F.dropout(weights, dropout).to(value.dtype) @ value


# ---- registration ----------------------------------------------------------------------------------------------------
def install() -> None:
    """Registers attn_implementation="yoco_ext" and the model type "yoco_ext". Calling it again changes nothing."""
    from yoco_ext.compat import _hf_model

    transformers.AttentionInterface.register(NAME, attention)
    transformers.AttentionMaskInterface.register(NAME, attention_mask)
    _hf_model.register()


def __getattr__(name: str) -> Any:
    if name in ("YOCOExtConfig", "YOCOExtForCausalLM", "YOCOExtCache"):
        from yoco_ext.compat import _hf_model

        return getattr(_hf_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
