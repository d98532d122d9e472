"""Which kernels of the emulated library test_cuda_schedules.py never launches:

    YOCO_EXT_EMULATED_LIBRARY=... python python_tests/kernel_coverage.py

Its cases run once each, as a GPU of compute capability 9.0 and as one of 8.0; the emulator notes every launch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]


def launched(compute_capability: str) -> set[str]:
    """Runs this file again: the emulator reads its environment once in a process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launches"
        path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        environment = {"PTXSIM_CC": compute_capability, "PTXSIM_STATS": str(file), "PYTHONPATH": path}
        subprocess.run([sys.executable, __file__, "run"], check=True, env=os.environ | environment)
        return {json.loads(line)["kernel"] for line in file.read_text().splitlines()}


def run_cases() -> None:
    from test_cuda_schedules import CASES

    from yoco_ext import _library, ops

    with _library.use_backend("emulated"):
        for make in CASES.values():
            make(SimpleNamespace(ops=ops, device="cpu"))()


def registered(library: Path) -> set[str]:
    """Names under which a library registers its kernels: they lie in it as text. Host functions beside them carry an L
    (internal linkage) before the name, or are no kernels."""
    names = re.findall(rb"\0(_ZN4yoco4cuda\w*?_kernel\w*)\0", library.read_bytes().replace(b"\0", b"\0\0"))
    others = re.compile(rb"L\d+\w*_kernel|launch_kernel|choose_kernel")
    return {name.decode() for name in names if not others.search(name)}


def main() -> int:
    from yoco_ext import _library

    library = _library.emulated_library()
    if library is None:
        sys.exit("YOCO_EXT_EMULATED_LIBRARY names no library")
    everything, seen = registered(Path(library)), launched("90") | launched("80")
    sys.path.insert(0, str(ROOT / "csrc/cuda"))
    import kernel_report

    missing = sorted(everything - seen)
    for name, plain in zip(missing, kernel_report.demangle(missing), strict=True):
        print(kernel_report.source(name) + kernel_report.short(plain))
    print(f"{len(everything)} kernels, {len(missing)} never launched; {len(seen - everything)} launches of others")
    return 0


if __name__ == "__main__":
    run_cases() if sys.argv[1:] == ["run"] else sys.exit(main())
