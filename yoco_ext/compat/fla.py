"""flash-linear-attention 0.6 on yoco_ext's kernels: its YOCO model, unmodified, on a GPU and on a CPU.

    from yoco_ext.compat import fla
    fla.install()
    from fla.models.yoco import YOCOConfig, YOCOForCausalLM

Where fla has a dispatch point of its own the kernels are registered there (fla.backends): simple GLA in its recurrent,
fused-chunk and parallel forms, attention, rotary, RMSNorm, the gated RMSNorm, SwiGLU. Where it has none a module
attribute is replaced: chunk_simple_gla, attn_decoding_one_step, flash_attn in fla's sliding-window layer. The cross
entropy is plain PyTorch and serves CPU tensors only (fla's own kernels stay in charge on a GPU).

A call with arguments that these kernels do not know goes to fla's own implementation, which needs a GPU, and one line
of the logger "yoco_ext.compat.fla" says so. Not served: gated_deltanet self-decoders and attnres_block_size. A backward
belongs inside the installation its forward ran in. fla imports without a GPU, but not without the package triton.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import yoco_ext
from yoco_ext.compat import flash_attn
from yoco_ext.compat._fla_kernels import (
    Kernels,
    foreign,
    given,
    gla_problem,
    int32,
    mixed,
    rows,
    simple_gla,
    verdict,
)
from yoco_ext.compat._fla_losses import make_cross_entropy_forward

VERSION = "0.6"  # the fla release whose dispatch points and modules are known here


class _ChunkSimpleGLA:
    """Stands where fla.ops.simple_gla.chunk calls its autograd function, so that every reference to chunk_simple_gla,
    whenever it was imported, is served."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        g_gamma: Tensor | None,
        scale: float | None,
        initial_state: Tensor | None,
        output_final_state: bool,
        state_v_first: bool,
        cu_seqlens: Tensor | None,
        cu_seqlens_cpu: Tensor | None,
        chunk_size: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        arguments = (q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens)
        if verdict("chunk_simple_gla", gla_problem(q, v, g, g_gamma), mixed(q, k, v))[0]:
            return simple_gla(*arguments)
        return self.original.apply(*arguments, cu_seqlens_cpu, chunk_size)


# ---- attention of one new token per sequence -------------------------------------------------------------------------
def _decode(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, cu_seqlens: Tensor, window_size: int | None, sinks: Any
) -> Tensor:
    """q [1, B, Hq, Dk]; k, v [1, tokens, Hkv, D], packed by cu_seqlens [B + 1] -> [1, B, Hq, Dv]. No gradients."""
    q, k, v = (rows(x.detach()) for x in (q, k, v))
    if window_size == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    sequences, time = q.shape[1], k.shape[1] // max(q.shape[1], 1)
    boundaries = int32(cu_seqlens)
    options: dict[str, Any] = {
        "scale": scale,
        "window": (-1 if window_size is None else window_size - 1, 0),
        "sinks": None if sinks is None else sinks.detach(),
        "seqused_k": boundaries.diff(),
    }
    if _evenly_spaced(boundaries, time):
        # One length for all, as fla's YOCO layer has it where nothing is padded: a cache for the split-KV kernel.
        k, v = (x[0, : sequences * time].unflatten(0, (sequences, time)) for x in (k, v))
        return yoco_ext.attention_decode(q[0, :, None], k, v, **options)[None, :, 0]
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=q.device)
    return yoco_ext.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=boundaries, max_seqlen_q=1, **options)


def _evenly_spaced(boundaries: Tensor, time: int) -> bool:
    """Whether all sequences are `time` tokens long. Reading that from a GPU waits for it, so not in a CUDA graph."""
    if time == 0 or (boundaries.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return bool((boundaries.diff() == time).all())


def _make_decode(original: Any) -> Any:
    def attn_decoding_one_step(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
        do_gate_scale: bool = False,
        *,
        window_size: int | None = None,
        sink_bias: Tensor | None = None,
    ) -> Tensor:
        reason = given(g=g) or foreign(q, q.shape[-1], v.shape[-1]) or mixed(q, k, v)
        if cu_seqlens is not None and verdict("attn_decoding_one_step", reason)[0]:
            return _decode(q, k, v, scale, cu_seqlens, window_size, sink_bias)
        return original(q, k, v, g, scale, cu_seqlens, do_gate_scale, window_size=window_size, sink_bias=sink_bias)

    attn_decoding_one_step.__doc__ = original.__doc__
    return attn_decoding_one_step


def _flash_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Any:
    """flash_attn's function for fla's sliding-window layer, whose users pass int64 boundaries to all other layers."""
    return flash_attn.flash_attn_varlen_func(q, k, v, int32(cu_seqlens_q), int32(cu_seqlens_k), **options)


# ---- putting it in place ---------------------------------------------------------------------------------------------
# Functions with a dispatch point of their own, by the module they are in; attention's is the operation "attn".
_DISPATCHED = {
    "fla.ops.simple_gla.fused_recurrent": ("fused_recurrent_simple_gla",),
    "fla.ops.simple_gla.fused_chunk": ("fused_chunk_simple_gla",),
    "fla.ops.simple_gla.parallel": ("parallel_simple_gla",),
    "fla.modules.rotary.ops": ("rotary_embedding_fwdbwd",),
    "fla.modules.norm.layernorm": ("layer_norm_fwd", "layer_norm_bwd"),
    "fla.modules.norm.fused_norm_gate": ("layer_norm_gated_fwd", "layer_norm_gated_bwd"),
    "fla.modules.activations.ops": ("swiglu_fwd", "swiglu_fwdbwd", "swiglu_linear"),
    "fla.modules.fused_cross_entropy.ops": ("cross_entropy_fwd", "cross_entropy_bwd"),
    "fla.modules.fused_linear_cross_entropy.ops": ("fused_linear_cross_entropy_bwd",),
}

_registered = False
_patched: list[tuple[Any, str, Any]] = []
_ABSENT = object()


def _import_fla() -> Any:
    try:
        package = importlib.import_module("fla")
        importlib.import_module("fla.models.yoco")
    except ModuleNotFoundError as error:
        hint = "pip install 'yoco_ext[fla]'"
        if error.name == "triton":
            hint = "fla's files import triton even where no kernel of it runs: pip install triton"
        raise ImportError(f"compat.fla needs flash-linear-attention {VERSION}, which did not import: {hint}") from error
    if not package.__version__.startswith(VERSION + "."):
        raise ImportError(f"compat.fla knows flash-linear-attention {VERSION}, found {package.__version__}")
    return package


def _register() -> None:
    """Once per process: fla's registry has no way back, so the kernels are switched on and off by is_enabled."""
    global _registered
    if _registered:
        return
    backends = importlib.import_module("fla.backends")
    backend = type("YocoExtBackend", (Kernels, backends.BaseBackend), {})
    for module, functions in _DISPATCHED.items():
        for function in functions:
            backends.register(getattr(importlib.import_module(module), function))(backend)
    backends.register("attn")(backend)
    _registered = True


def _patch(owner: Any, name: str, replacement: Any) -> None:
    _patched.append((owner, name, vars(owner).get(name, _ABSENT)))
    setattr(owner, name, replacement)


def install() -> None:
    """Puts the kernels behind fla's functions, for the whole process.

    Raises ImportError if flash-linear-attention 0.6 does not import, RuntimeError if its dispatch is switched off.
    """
    if Kernels.installed:
        return
    _import_fla()
    if importlib.import_module("fla.backends")._DISPATCH_DISABLED:
        raise RuntimeError("fla's backend dispatch is switched off: unset FLA_DISABLE_BACKEND_DISPATCH")
    _register()
    chunk = importlib.import_module("fla.ops.simple_gla.chunk")
    _patch(chunk, "ChunkSimpleGLAFunction", _ChunkSimpleGLA(chunk.ChunkSimpleGLAFunction))
    original = importlib.import_module("fla.ops.attn.decoding").attn_decoding_one_step
    replacement = _make_decode(original)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "fla" and getattr(module, "attn_decoding_one_step", None) is original:
            _patch(module, "attn_decoding_one_step", replacement)
    layer = importlib.import_module("fla.layers.attn")
    _patch(layer, "flash_attn_func", flash_attn.flash_attn_func)
    _patch(layer, "flash_attn_varlen_func", _flash_attn_varlen)
    losses = importlib.import_module("fla.modules.fused_cross_entropy.ops")
    loss = losses.FusedCrossEntropyLoss
    _patch(loss, "forward", make_cross_entropy_forward(loss.forward, losses.cross_entropy_loss))
    Kernels.installed = True


def uninstall() -> None:
    """Gives fla its own kernels back."""
    Kernels.installed = False
    while _patched:
        owner, name, original = _patched.pop()
        if original is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """`with installed():` for a limited time, backward included; an installation from before stays."""
    before = Kernels.installed
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()
