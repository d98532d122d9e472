"""The op library as a file: what it exports, and that no code for one instruction set can stand in for another."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from yoco_ext import _library

pytestmark = [
    pytest.mark.skipif(not _library.is_built(), reason="the op library is not built"),
    pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed"),
]


def symbols(*options: str) -> list[list[str]]:
    text = subprocess.run(["nm", "-C", *options, _library.ops_library()], capture_output=True, text=True, check=True)
    return [line.split(maxsplit=2)[-2:] for line in text.stdout.splitlines() if len(line.split(maxsplit=2)) >= 2]


def test_exports_nothing_but_its_functions():
    exported = {name for kind, name in symbols("-D", "--defined-only") if kind in "TWVBDR"}
    assert exported == {"yoco_use_backend", "yoco_backend_variant", "yoco_backend_ops"}


def test_uses_no_python_symbols():
    assert not [name for _, name in symbols("-D", "--undefined-only") if name.startswith(("Py", "_Py"))]


def test_no_inline_function_is_shared_between_instruction_sets():
    """The linker keeps one copy of a weak symbol: compiled for AVX-512 it would end a process on an older CPU."""
    names = symbols("--defined-only")
    assert any("yoco::cpu::portable::" in name for _, name in names), "stripped: nothing to look at"
    assert not [name for kind, name in names if kind in "WVu" and name.startswith("yoco::")]
