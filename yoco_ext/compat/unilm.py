"""The functions of microsoft/unilm's YOCO/yoco/models/decoder on yoco_ext's kernels.

    from yoco_ext.compat import unilm
    unilm.install()                       # before or after the official package is imported
    from models.decoder.yoco import YOCO  # the official model files, unchanged

Names, signatures and layouts are the official ones ([batch, heads, time, dim] for retention). What is lifted: lengths
need not be multiples of a chunk, gradients reach every input, the caller's tensors are never changed, the recurrent
state is float32 (`parity="official"` keeps it in the model's dtype, with the official rounding points).
`install(stub_parallel=True)` also serves the few names the official files import from fairseq and fairscale, as
single-process stand-ins, where those packages are not installed.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

import yoco_ext

from .flash_attn import apply_rotary_emb, flash_attn_func
from .flash_attn import install as _install_flash_attn
from .flash_attn import uninstall as _uninstall_flash_attn

__all__ = [
    "RMSNorm",
    "apply_rotary_emb",
    "chunk_gate_recurrent",
    "chunk_gate_retention",
    "cross_chunk",
    "flash_attn_func",
    "hier_chunk_gate_retention",
    "inner_chunk",
    "install",
    "installed",
    "naive_kv_recurrent",
    "parallel_gate_retention",
    "recurrent_gate_retention",
    "swiglu",
    "uninstall",
]

_parity = "float32"


def _time_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, T, ...] -> [B, T, H, ...], a view; a copy only where the last dimension is strided."""
    views = (x.transpose(1, 2) for x in tensors)
    return tuple(x if x.dim() < 4 or x.stride(-1) == 1 else x.contiguous() for x in views)


def _scaled_state(state: Tensor | None, dim_k: int) -> Tensor | None:
    """The official state holds k * dim_k^-0.5, ours holds k."""
    return None if state is None else (state.float() * math.sqrt(dim_k)).contiguous()


def chunk_gate_retention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk_size: int = 64, last_hidden_state: Tensor | None = None
) -> Tensor:
    """q, k [B, H, T, Dk], v [B, H, T, Dv], g [B, H, T] log decay, last_hidden_state [B, H, Dk, Dv] -> o [B, H, T, Dv].
    Any T; chunk_size does not change the result."""
    if _parity == "official":
        return _official_chunks(q, k, v, g, chunk_size, last_hidden_state)
    q, k, v, g = _time_first(q, k, v, g)
    state = _scaled_state(last_hidden_state, q.shape[-1])
    return yoco_ext.gated_retention(q, k, v, g, initial_state=state).transpose(1, 2)


def parallel_gate_retention(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The same retention without an incoming state."""
    return chunk_gate_retention(q, k, v, g, chunk_size=q.shape[2])


def hier_chunk_gate_retention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk_size: int = 64, hier_chunk_size: int = 16384
) -> Tensor:
    """The same retention; the two chunk sizes, which bound memory in the official code, do not change the result."""
    return chunk_gate_retention(q, k, v, g, chunk_size)


def recurrent_gate_retention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, incremental_state: dict[str, Any]) -> Tensor:
    """One or more decoding steps: q, k [B, H, T, Dk], v [B, H, T, Dv], g [B, H, T] -> o [B, H, T, Dv].
    incremental_state["last_hidden_state"] [B, H, Dk, Dv] is read, advanced and put back; k is left alone."""
    batch, heads, time, dim_k = k.shape
    state = incremental_state.get("last_hidden_state")
    g = g.reshape(batch, heads, time)
    if _parity == "official":
        k = k * dim_k**-0.5
        outputs = []
        for t in range(time):
            update = k[:, :, t, :, None] * v[:, :, t, None, :]
            decay = g[:, :, t, None, None].float().exp().to(update.dtype)
            state = update if state is None else update + state * decay
            outputs.append(q[:, :, t : t + 1] @ state)
        incremental_state["last_hidden_state"] = state
        return torch.cat(outputs, dim=2)
    if state is None:
        state = torch.zeros(batch, heads, dim_k, v.shape[-1], dtype=torch.float32, device=q.device)
    elif state.dtype != torch.float32 or not state.is_contiguous():
        state = state.float().contiguous()
    # In float32: the official state holds scaled keys, and rounding them would be an error that stays in it.
    q32, k32, v32 = (x.float() for x in _time_first(q, k, v))
    outputs = []
    for begin in range(0, time, 16):
        part = slice(begin, begin + 16)
        inputs = (q32[:, part], k32[:, part] * dim_k**-0.5, v32[:, part], g.transpose(1, 2)[:, part].float())
        outputs.append(yoco_ext.gated_retention_step(*inputs, state, scale=1.0))
    incremental_state["last_hidden_state"] = state
    return torch.cat(outputs, dim=1).transpose(1, 2).to(q.dtype)


def naive_kv_recurrent(kv: Tensor, cross_decay: Tensor, last_kv: Tensor | None = None) -> Tensor:
    """States before each chunk: kv [B, H, N, Dk, Dv] updates, cross_decay [B, H, N] -> [B, H, N, Dk, Dv], carried in
    float32 and differentiable in all three arguments."""
    state = torch.zeros_like(kv[:, :, 0], dtype=torch.float32) if last_kv is None else last_kv.float()
    states = []
    for n in range(kv.shape[2]):
        states.append(state)
        state = state * cross_decay[:, :, n, None, None].float() + kv[:, :, n].float()
    return torch.stack(states, dim=2).to(kv.dtype)


chunk_gate_recurrent = naive_kv_recurrent


def cross_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, last_hidden_state: Tensor | None = None) -> Tensor:
    """What each chunk receives from the chunks before it: q, k [B, H, N, C, Dk], v [B, H, N, C, Dv],
    g [B, H, N, C] the log decay summed inside each chunk -> [B, H, N, C, Dv]. k comes scaled."""
    kv = k.transpose(-1, -2) @ (v * (g[..., -1:] - g).exp()[..., None].to(v.dtype))
    states = chunk_gate_recurrent(kv, g[..., -1].exp().to(kv.dtype), last_hidden_state)
    return (q * g[..., None].exp().to(q.dtype)) @ states


def inner_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What each chunk computes of itself; arguments as for cross_chunk."""
    batch, heads, chunks, length, _ = q.shape
    steps = torch.diff(g.float(), dim=-1, prepend=torch.zeros_like(g[..., :1], dtype=torch.float32))

    def fold(x: Tensor) -> Tensor:  # every chunk is a sequence of its own
        return x.transpose(1, 2).reshape(batch * chunks, heads, *x.shape[3:]).transpose(1, 2)

    o = yoco_ext.gated_retention(*(fold(x).contiguous() for x in (q, k, v)), fold(steps).contiguous(), scale=1.0)
    return o.reshape(batch, chunks, length, heads, -1).permute(0, 3, 1, 2, 4)


def _official_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk_size: int, last_hidden_state: Tensor | None
) -> Tensor:
    """The official rounding points: keys scaled, decays and scores rounded in the model's dtype."""
    time, dim_k = q.shape[2:]
    padding = -time % chunk_size

    def split(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, padding)) if x.dim() == 4 else F.pad(x, (0, padding))
        return x.unflatten(2, (-1, chunk_size))

    q, k, v, g = split(q), split(k) * dim_k**-0.5, split(v), split(g).float().cumsum(-1)
    scores = q @ k.transpose(-1, -2)
    rows = torch.arange(chunk_size, device=q.device)
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(rows[:, None] < rows[None, :], -math.inf).exp()
    inner = (scores * decay.to(scores.dtype)) @ v
    return (cross_chunk(q, k, v, g, last_hidden_state) + inner).flatten(2, 3)[:, :, :time]


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y."""
    return yoco_ext.swiglu(x, y)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, rounded to x's dtype, then * weight."""

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.dim, self.eps, self.elementwise_affine = dim, eps, elementwise_affine
        self.register_parameter("weight", nn.Parameter(torch.ones(dim)) if elementwise_affine else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return yoco_ext.rms_norm(x, eps=self.eps)
        if self.weight.dtype in (x.dtype, torch.float32) and _parity != "official":
            return yoco_ext.rms_norm(x, self.weight, eps=self.eps)
        return yoco_ext.rms_norm(x, eps=self.eps) * self.weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


# ---- single-process stand-ins for fairseq and fairscale --------------------------------------------------------------
class _ParallelLinear(nn.Linear):
    """fairseq's Column-/RowParallelLinear with a model-parallel size of one."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, init_method: Callable | None = None, **_: Any
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if init_method is not None:
            init_method(self.weight)


class _VocabParallelEmbedding(nn.Embedding):
    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, init_method: Any = None, **_: Any
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, None if padding_idx in (None, -1) else padding_idx)
        if init_method is not None:
            init_method(self.weight)


def _checkpoint_wrapper(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
    """fairscale's checkpoint_wrapper: the module's activations are recomputed in the backward."""
    forward = module.forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)

    module.forward = checkpointed
    return module


def _parallel_modules() -> dict[str, dict[str, Any]]:
    parallel = {
        "ColumnParallelLinear": _ParallelLinear,
        "RowParallelLinear": _ParallelLinear,
        "VocabParallelEmbedding": _VocabParallelEmbedding,
        "copy_to_model_parallel_region": lambda x: x,
        "gather_from_model_parallel_region": lambda x: x,
    }
    return {
        "fairseq": {},
        "fairseq.model_parallel": {},
        "fairseq.model_parallel.megatron": {},
        "fairseq.model_parallel.megatron.mpu": parallel,
        "fairscale": {},
        "fairscale.nn": {"checkpoint_wrapper": _checkpoint_wrapper},
    }


# ---- putting it in place --------------------------------------------------------------------------------------------
_SERVED: dict[str, tuple[str, ...]] = {
    "kernel.gate_recurrent": (
        "chunk_gate_retention",
        "recurrent_gate_retention",
        "parallel_gate_retention",
        "hier_chunk_gate_retention",
        "chunk_gate_recurrent",
        "cross_chunk",
        "inner_chunk",
        "naive_kv_recurrent",
    ),
    "kernel.rotary": ("apply_rotary_emb",),
    "kernel.swiglu": ("swiglu",),
    "rms_norm": ("RMSNorm",),
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves <package>.kernel.gate_recurrent and so on, so that the official (Triton) files are never executed."""

    def __init__(self, package: str) -> None:
        self.names = {f"{package}.{module}": functions for module, functions in _SERVED.items()}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in self.names else None

    def exec_module(self, module: types.ModuleType) -> None:
        for name in self.names[module.__name__]:
            setattr(module, name, globals()[name])


class _Installation:
    def __init__(self, package: str, stub_parallel: bool) -> None:
        self.finder = _Finder(package)
        self.patched: list[tuple[types.ModuleType, str, Any]] = []
        self.stubs: list[str] = []
        sys.meta_path.insert(0, self.finder)
        self._patch_loaded(package)
        if stub_parallel:
            self._add_stubs()

    def _patch_loaded(self, package: str) -> None:
        """Modules of the package that are imported already hold references of their own."""
        names = {name for functions in _SERVED.values() for name in functions} | {"flash_attn_func"}
        for module_name, module in list(sys.modules.items()):
            if module is None or not (module_name == package or module_name.startswith(package + ".")):
                continue
            for name in names & vars(module).keys():
                self.patched.append((module, name, getattr(module, name)))
                setattr(module, name, globals()[name])

    def _add_stubs(self) -> None:
        for name, members in _parallel_modules().items():
            top = name.split(".")[0]
            if top not in self.stubs and (top in sys.modules or importlib.util.find_spec(top) is not None):
                continue  # the real package is there
            module = types.ModuleType(name, "Single-process stand-in served by yoco_ext.compat.unilm")
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            module.__path__ = []
            vars(module).update(members)
            sys.modules[name] = module
            self.stubs.append(name)
            if "." in name:
                parent, child = name.rsplit(".", 1)
                setattr(sys.modules[parent], child, module)

    def undo(self) -> None:
        sys.meta_path.remove(self.finder)
        for module, name, original in self.patched:
            setattr(module, name, original)
        for name in [*self.finder.names, *self.stubs]:
            if (
                name in self.stubs
                or getattr(getattr(sys.modules.get(name), "__spec__", None), "loader", None) is self.finder
            ):
                sys.modules.pop(name, None)


_installation: _Installation | None = None


def install(package: str = "models.decoder", *, parity: str = "float32", stub_parallel: bool = False) -> None:
    """Puts these functions in place of the official ones.

    package: how the official folder YOCO/yoco/models/decoder is imported. parity: "float32" (state in float32) or
    "official" (the official rounding points). stub_parallel: serve fairseq's and fairscale's names where those packages
    are missing. Also serves `flash_attn`, which the official files import. Raises ValueError for another parity.
    """
    global _installation, _parity
    if parity not in ("float32", "official"):
        raise ValueError(f"parity: got {parity!r}; allowed: 'float32', 'official'")
    uninstall()
    _parity = parity
    _install_flash_attn()
    _installation = _Installation(package, stub_parallel)


def uninstall() -> None:
    """Takes everything out again."""
    global _installation, _parity
    if _installation is not None:
        _installation.undo()
        _uninstall_flash_attn()
    _installation, _parity = None, "float32"


@contextlib.contextmanager
def installed(package: str = "models.decoder", **options: Any) -> Iterator[None]:
    """`with installed(...)`: for a limited time."""
    install(package, **options)
    try:
        yield
    finally:
        uninstall()
