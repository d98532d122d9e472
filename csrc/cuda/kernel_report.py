"""What ptxas says about every kernel (registers, spilled bytes, shared memory), kept from the build as one JSON file.

Two commands, both called by CMakeLists.txt:

    kernel_report.py record COMMAND...        runs a compiler; ptxas' lines go to <object>.ptxas, others to stderr
    kernel_report.py collect OUT OBJECT...    merges such files into OUT, read by `yoco-ext info --kernels`
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def record(command: list[str]) -> int:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    kept, passed_on = [], []
    of_ptxas = False
    for line in done.stderr.splitlines(keepends=True):
        # The figures of an entry follow on lines of their own, indented.
        of_ptxas = line.startswith("ptxas info") or (of_ptxas and line.startswith("    "))
        (kept if of_ptxas else passed_on).append(line)
    sys.stderr.write("".join(passed_on))
    if "-o" in command and done.returncode == 0:
        Path(command[command.index("-o") + 1] + ".ptxas").write_text("".join(kept))
    return done.returncode


def parse(text: str) -> list[dict[str, str | int]]:
    """One entry per kernel and architecture."""
    kernels: list[dict[str, str | int]] = []
    for line in text.splitlines():
        if found := ENTRY.search(line):
            kernels.append({"name": found[1], "arch": f"sm_{found[2]}", "shared": 0})
        elif kernels and (found := SPILLS.search(line)):
            # The entry's own line comes first, those of functions that were not inlined follow.
            for key, value in zip(("stack", "spill_stores", "spill_loads"), found.groups()):
                kernels[-1].setdefault(key, int(value))
        elif kernels and (found := USED.search(line)):
            kernels[-1]["registers"] = int(found[1])
            if shared := SHARED.search(line):
                kernels[-1]["shared"] = int(shared[1])
    return kernels


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return lines if done.returncode == 0 and len(lines) == len(names) else names


def short(name: str) -> str:
    """The kernel and its template arguments, without namespaces and parameters."""
    name = re.sub(r"\((?:int|bool|unsigned int|long)\)", "", name)  # template arguments are printed as (int)128
    name = name.replace("(anonymous namespace)::", "").replace("yoco::cuda::", "").removeprefix("void ")
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def source(mangled: str) -> str:
    """rms_norm:: for a kernel in the unnamed namespace of rms_norm.cu (several share a name), else nothing."""
    found = re.search(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}", mangled)
    return f"{found[1]}::" if found else ""


def collect(out: Path, files: list[Path]) -> int:
    kernels = [kernel for file in files if file.is_file() for kernel in parse(file.read_text())]
    mangled = [str(kernel["name"]) for kernel in kernels]
    for kernel, before, name in zip(kernels, mangled, demangle(mangled)):
        kernel["name"] = source(before) + short(name)
    kernels.sort(key=lambda k: (str(k["arch"]), str(k["name"])))
    lines = ",\n".join("  " + json.dumps(k) for k in kernels)
    out.write_text(f'{{"kernels": [\n{lines}\n]}}\n' if kernels else '{"kernels": []}\n')
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "record":
        sys.exit(record(sys.argv[2:]))
    sys.exit(collect(Path(sys.argv[2]), [Path(name + ".ptxas") for name in sys.argv[3:]]))
