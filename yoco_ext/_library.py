"""Finds and loads the compiled ops, and chooses the kernels behind the CPU dispatch key."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

OPS_LIBRARY = "libyoco_ext_ops.so"
EMULATED_LIBRARY = "libyoco_ext_emulated.so"
KERNEL_REPORT = "libyoco_ext_cuda.kernels.json"

_handle: ctypes.CDLL | None = None
_current = "cpu"


def ops_library() -> Path:
    """Where the op library is expected: $YOCO_EXT_LIBRARY, else beside this package. It may not exist."""
    override = os.environ.get("YOCO_EXT_LIBRARY")
    return Path(override) if override else Path(__file__).parent / OPS_LIBRARY


def emulated_library() -> Path | None:
    """The CUDA kernels linked against the PTX emulator: $YOCO_EXT_EMULATED_LIBRARY, else beside the op library."""
    override = os.environ.get("YOCO_EXT_EMULATED_LIBRARY")
    path = Path(override) if override else ops_library().parent / EMULATED_LIBRARY
    if override and not path.is_file():
        raise ImportError(f"YOCO_EXT_EMULATED_LIBRARY names {path}, which is not a file")
    return path if path.is_file() else None


def is_built() -> bool:
    """Whether there is an op library to load."""
    return ops_library().is_file()


def load() -> ctypes.CDLL:
    """Loads the op library once and returns its handle."""
    global _handle
    if _handle is None:
        path = ops_library().resolve()
        if not path.is_file():
            hint = "named by YOCO_EXT_LIBRARY " if os.environ.get("YOCO_EXT_LIBRARY") else ""
            raise ImportError(
                f"the compiled ops of yoco_ext were not found: {path} {hint}is not a file. Build them with "
                "`pip install --no-build-isolation -e .` (or `make build`) in the source tree, or use the plain "
                "PyTorch ops in yoco_ext.reference."
            )
        torch.ops.load_library(str(path))
        handle = ctypes.CDLL(str(path))
        handle.yoco_use_backend.argtypes = [ctypes.c_char_p]
        handle.yoco_use_backend.restype = ctypes.c_char_p
        _handle = handle
    return _handle


def select_backend(name: str) -> None:
    """Puts the kernels of "cpu" (built in) or "emulated" (CUDA kernels on the PTX emulator, for tests) behind CPU
    tensors, for the whole process."""
    global _current
    handle = load()
    if name == "cpu":
        path = None
    elif name == "emulated":
        path = emulated_library()
        if path is None:
            raise ImportError(
                f"{EMULATED_LIBRARY} was not found beside {ops_library()}: build with YOCO_EMULATED=1 or set "
                "YOCO_EXT_EMULATED_LIBRARY"
            )
    else:
        raise ValueError(f'back end is {name!r}; allowed: "cpu", "emulated"')
    message = handle.yoco_use_backend(None if path is None else os.fsencode(path.resolve()))
    if message is not None:
        raise RuntimeError(f"back end {name!r} did not load: {message.decode(errors='replace')}")
    _current = name


def current_backend() -> str:
    """The back end behind CPU tensors: "cpu" or "emulated"."""
    return _current


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """select_backend for the length of a with block."""
    before = _current
    select_backend(name)
    try:
        yield
    finally:
        select_backend(before)


def backend_variant(name: str) -> str | None:
    """What was picked at run time for "cpu" ("avx512_bf16", ...) or "cuda"; None when there are no such kernels."""
    function = load().yoco_backend_variant
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_char_p
    variant = function(name.encode())
    return None if variant is None else variant.decode()


def backend_ops(name: str) -> dict[str, bool]:
    """Kernel entries of "cpu" or "cuda" -> whether this build has a kernel there; empty without such a back end."""
    function = load().yoco_backend_ops
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_char_p
    text = function(name.encode())
    words = [] if text is None else text.decode().split()
    return {entry: present == "1" for entry, present in (word.split("=") for word in words)}


def kernel_report() -> list[dict[str, Any]] | None:
    """What ptxas said about the CUDA kernels of this build, one entry per kernel and architecture; None where no report
    lies beside the op library. Keys: name, arch, registers, stack, spill_stores, spill_loads, shared (all in bytes but
    registers; shared is the static part)."""
    path = ops_library().resolve().parent / KERNEL_REPORT
    return json.loads(path.read_text())["kernels"] if path.is_file() else None
