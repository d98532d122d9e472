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
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import yoco_ext

from . import _fairseq
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


def chunk_gate_recurrent(kv: Tensor, cross_decay: Tensor, last_kv: Tensor | None = None) -> Tensor:
    """States before each chunk: kv [B, H, N, Dk, Dv] updates, cross_decay [B, H, N] -> [B, H, N, Dk, Dv], carried in
    float32 and differentiable in all three arguments."""
    return _states(kv, cross_decay, last_kv, torch.float64 if kv.dtype == torch.float64 else torch.float32)


def naive_kv_recurrent(kv: Tensor, cross_decay: Tensor, last_kv: Tensor | None = None) -> Tensor:
    """The same; the official one rounds the state to kv's dtype in every chunk, which parity "official" keeps."""
    return (
        _states(kv, cross_decay, last_kv, kv.dtype)
        if _parity == "official"
        else chunk_gate_recurrent(kv, cross_decay, last_kv)
    )


def _states(kv: Tensor, cross_decay: Tensor, last_kv: Tensor | None, dtype: torch.dtype) -> Tensor:
    state = torch.zeros_like(kv[:, :, 0], dtype=dtype) if last_kv is None else last_kv.to(dtype)
    states = []
    for n in range(kv.shape[2]):
        states.append(state)
        state = state * cross_decay[:, :, n, None, None].to(dtype) + kv[:, :, n].to(dtype)
    return torch.stack(states, dim=2).to(kv.dtype)


def cross_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, last_hidden_state: Tensor | None = None) -> Tensor:
    """What each chunk receives from the chunks before it: q, k [B, H, N, C, Dk], v [B, H, N, C, Dv],
    g [B, H, N, C] the log decay summed inside each chunk -> [B, H, N, C, Dv]. k comes scaled."""
    dtype = q.dtype
    if _parity != "official" and dtype != torch.float64:
        q, k, v, g = (x.float() for x in (q, k, v, g))
    kv = k.transpose(-1, -2) @ (v * (g[..., -1:] - g).exp()[..., None].to(v.dtype))
    states = chunk_gate_recurrent(kv, g[..., -1].exp().to(kv.dtype), last_hidden_state)
    return ((q * g[..., None].exp().to(q.dtype)) @ states).to(dtype)


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
    """x / rms(x) in float32, * weight; in parity "official" rounded to x's dtype before the weight."""

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.dim, self.eps, self.elementwise_affine = dim, eps, elementwise_affine
        self.register_parameter("weight", nn.Parameter(torch.ones(dim)) if elementwise_affine else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return yoco_ext.rms_norm(x, eps=self.eps)
        if self.weight.dtype == x.dtype and _parity != "official":
            return yoco_ext.rms_norm(x, self.weight, eps=self.eps)
        return yoco_ext.rms_norm(x, eps=self.eps) * self.weight  # float32 weights make the result float32, as there

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


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


class _BlockSize:
    """SelfDecoder.block_size while installed: the official prefill pads prompts to a multiple of it, for its chunks."""

    def __get__(self, decoder: Any, owner: type | None = None) -> Any:
        return self if decoder is None else 1

    def __set__(self, decoder: Any, value: int) -> None:
        vars(decoder)["block_size"] = value  # what it is again after uninstall


def _stop_padding(module: types.ModuleType | None) -> None:
    decoder = getattr(module, "SelfDecoder", None)
    if decoder is not None and not hasattr(decoder, "block_size"):
        decoder.block_size = _BlockSize()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves <package>.kernel.gate_recurrent and so on, so that the official (Triton) files are never executed."""

    def __init__(self, package: str) -> None:
        self.names = {f"{package}.{module}": functions for module, functions in _SERVED.items()}
        self.model = f"{package}.yoco"

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname in self.names:
            return importlib.machinery.ModuleSpec(fullname, self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == self.model else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                _stop_padding(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def exec_module(self, module: types.ModuleType) -> None:
        for name in self.names[module.__name__]:
            setattr(module, name, globals()[name])


class _Installation:
    def __init__(self, package: str, stub_parallel: bool) -> None:
        self.package = package
        self.finder = _Finder(package)
        self.patched: list[tuple[types.ModuleType, str, Any]] = []
        self.stubs: list[str] = []
        sys.meta_path.insert(0, self.finder)
        for module, name in self._references():  # modules that are imported already hold references of their own
            self.patched.append((module, name, getattr(module, name)))
            setattr(module, name, globals()[name])
        _stop_padding(sys.modules.get(self.finder.model))
        if stub_parallel:
            self._add_stubs()

    def _references(self) -> list[tuple[types.ModuleType, str]]:
        """The served names in all modules of the package."""
        names = {name for functions in _SERVED.values() for name in functions} | {"flash_attn_func"}
        return [
            (module, name)
            for module_name, module in list(sys.modules.items())
            if module is not None and f"{module_name}.".startswith(f"{self.package}.")
            for name in sorted(names & vars(module).keys())
        ]

    def _add_stubs(self) -> None:
        for name, members in _fairseq.MODULES.items():
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
        """The official functions come back: in modules imported before, what was there; in modules imported since, the
        official function where its module can be imported, else the module is forgotten and its next import decides."""
        sys.meta_path.remove(self.finder)
        decoder = getattr(sys.modules.get(self.finder.model), "SelfDecoder", None)
        if isinstance(getattr(decoder, "block_size", None), _BlockSize):
            del decoder.block_size
        for module, name, original in self.patched:
            setattr(module, name, original)
        for name in self.finder.names:
            if getattr(getattr(sys.modules.get(name), "__spec__", None), "loader", None) is self.finder:
                _forget(name)
        for module, name in self._references():
            if getattr(module, name) is not globals()[name]:
                continue
            home = next((home for home, names in self.finder.names.items() if name in names), "flash_attn")
            try:
                setattr(module, name, getattr(importlib.import_module(home), name))
            except Exception:  # no Triton, no GPU, no flash_attn: whatever the official file needs
                _forget(home)
                _forget(module.__name__)
        for name in self.stubs:
            _forget(name)


def _forget(name: str) -> None:
    """Takes a module out of sys.modules and out of its package."""
    module = sys.modules.pop(name, None)
    parent, _, child = name.rpartition(".")
    if module is not None and getattr(sys.modules.get(parent), child, None) is module:
        delattr(sys.modules[parent], child)


_installation: _Installation | None = None
_own_flash_attn = False  # `flash_attn` was put in place here, not by the caller


def install(package: str = "models.decoder", *, parity: str = "float32", stub_parallel: bool = False) -> None:
    """Puts these functions in place of the official ones, in modules that are imported and in those still to come.

    package: how the official folder YOCO/yoco/models/decoder is imported. parity: "float32" (state in float32) or
    "official" (the official rounding points). stub_parallel: serve fairseq's, fairscale's and omegaconf's names where
    those packages are missing. Also serves `flash_attn`, which the official files import. Raises ValueError for another
    parity.
    """
    global _installation, _parity, _own_flash_attn
    if parity not in ("float32", "official"):
        raise ValueError(f"parity: got {parity!r}; allowed: 'float32', 'official'")
    uninstall()
    _parity = parity
    _own_flash_attn = _install_flash_attn()
    _installation = _Installation(package, stub_parallel)


def uninstall() -> None:
    """Takes everything out again: models of the official package run the official code from now on."""
    global _installation, _parity, _own_flash_attn
    installation, _installation, _parity = _installation, None, "float32"
    if _own_flash_attn:
        _uninstall_flash_attn()
    _own_flash_attn = False
    if installation is not None:
        installation.undo()


@contextlib.contextmanager
def installed(package: str = "models.decoder", **options: Any) -> Iterator[None]:
    """`with installed(...)`: for a limited time."""
    install(package, **options)
    try:
        yield
    finally:
        uninstall()
