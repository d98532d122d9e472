"""What a CUDA build tells about its kernels: ptxas' lines -> JSON -> `yoco-ext info --kernels`; table of instances."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from yoco_ext import _library
from yoco_ext.cli import main

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "csrc/cuda/kernel_report.py"

# As nvcc 13.0 -Xptxas=-v prints it; a warning of the host compiler in between belongs to the person who builds.
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4yoco4cuda6kernelILi64ELb1EEEvNS_6ParamsE' for 'sm_80'
ptxas info    : Function properties for _ZN4yoco4cuda6kernelILi64ELb1EEEvNS_6ParamsE
    288 bytes stack frame, 12 bytes spill stores, 34 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 288 bytes cumulative stack size, 1024 bytes smem, 616 bytes cmem[0]
ptxas info    : Compile time = 6.962 ms
kernel.cu(7): warning: something else
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4yoco4cuda5otherEv' for 'sm_90a'
ptxas info    : Function properties for _ZN4yoco4cuda5otherEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def _script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """The report beside an op library, made by a compiler that says the above."""
    compiler = tmp_path / "compiler.py"
    compiler.write_text(f"import sys\nsys.stderr.write({PTXAS!r})\nopen(sys.argv[-1], 'w').close()\n")
    done = _script("record", sys.executable, str(compiler), "-c", "-o", str(tmp_path / "kernel.o"))
    assert done.returncode == 0 and (tmp_path / "kernel.o").exists()
    assert done.stderr == "kernel.cu(7): warning: something else\n"
    out = tmp_path / _library.KERNEL_REPORT
    assert _script("collect", str(out), str(tmp_path / "kernel.o"), str(tmp_path / "missing.o")).returncode == 0
    return out


def test_report_holds_what_ptxas_said(report: Path) -> None:
    first, second = json.loads(report.read_text())["kernels"]
    assert "kernel" in first.pop("name") and "other" in second.pop("name")
    assert first == {
        "arch": "sm_80",
        "registers": 255,
        "stack": 288,
        "spill_stores": 12,
        "spill_loads": 34,
        "shared": 1024,
    }
    assert second == {"arch": "sm_90a", "registers": 8, "stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 0}


def test_info_prints_the_report(
    report: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = report.parent / "libyoco_ext_ops.so"
    monkeypatch.setattr(_library, "ops_library", lambda: library)
    from yoco_ext.cli import _print_report

    _print_report()
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "sm_80" in line)
    assert row[-6:] == ["sm_80", "255", "12,", "34", "288", "1024"]
    report.unlink()
    _print_report()
    out = capsys.readouterr().out
    assert str(library.parent) in out and "YOCO_EXT_CUDA=1" in out


def test_names_say_which_file_a_kernel_is_in(tmp_path: Path) -> None:
    """Two files have a forward_kernel in their unnamed namespaces."""
    for i, name in enumerate(("rms_norm", "pair_norm")):
        entry = f"_ZN4yoco4cuda44_GLOBAL__N__0a1b2c3d_{len(name) + 3}_{name}_cu_89abcdef14forward_kernelILi8EEEvi"
        text = f"ptxas info    : Compiling entry function '{entry}' for 'sm_80'\n"
        (tmp_path / f"{i}.o.ptxas").write_text(text)
    out = tmp_path / "report.json"
    assert _script("collect", str(out), str(tmp_path / "0.o"), str(tmp_path / "1.o")).returncode == 0
    names = [kernel["name"] for kernel in json.loads(out.read_text())["kernels"]]
    assert [name.split("::")[0] for name in names] == ["pair_norm", "rms_norm"]


def test_a_failing_compiler_fails(tmp_path: Path) -> None:
    code = "import sys; sys.stderr.write('kernel.cu: error: no\\n'); sys.exit(3)"
    done = _script("record", sys.executable, "-c", code, "-o", str(tmp_path / "kernel.o"))
    assert done.returncode == 3 and "error: no" in done.stderr


def test_every_back_end_lists_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    ops = _library.backend_ops("cpu")
    struct = (ROOT / "csrc/params.h").read_text().split("struct KernelTable")[1].split("};")[0]
    entries = [line.split("(*")[1].split(")")[0] for line in struct.splitlines() if "(*" in line]
    wanted = {name for name in entries if name != "variant" and not name.endswith("_workspace")}
    assert set(ops) == wanted, "csrc/torch/backend.cpp lists the entries of KernelTable"
    assert all(ops.values())
    assert main(["info", "--kernels"]) == 0
    out = capsys.readouterr().out
    assert all(entry in out for entry in wanted)


def _expand(pattern: str) -> list[str]:
    """a_{b,c}.cu -> a_b.cu, a_c.cu"""
    found = re.search(r"\{([^}]*)\}", pattern)
    if found is None:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [name for word in found[1].split(",") for name in _expand(head + word + tail)]


def test_the_table_of_instances_is_complete() -> None:
    rows = [line for line in (ROOT / "docs/cuda_build.md").read_text().splitlines() if line.startswith("| `")]
    listed = [name for row in rows for word in re.findall(r"`([^`]*\.cu)`", row) for name in _expand(word)]
    folder = ROOT / "csrc/cuda"
    there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.cu"))
    assert sorted(listed) == there, "docs/cuda_build.md lists every .cu file once and says why it exists"


# ---- no spills in the forward up to head dim 128

# Kernels whose first integer template argument is the head dimension they are made for; the others serve all.
PER_HEAD_DIM = ("attention_forward_kernel", "decode_kernel", "hopper_decode_kernel", "retention_run_kernel")
BACKWARD = ("backward", "gradient", "finish_dq", "reduce_latents", "row_statistics")
# Pattern, bytes that may be spilled per thread, reason.
EXCEPTIONS = [
    (
        r"sm90::attention_forward_kernel<sm90::ForwardConfig<\w+, 64, \w+> ?>",
        188,
        "three warpgroups share the registers; plain 32 bytes outside the loop, 188 with softcap or alibi",
    ),
    (
        r"sm90::attention_forward_kernel<sm90::ForwardConfig<\w+, 128, \w+> ?>",
        8,
        "in the producer, which keeps 24 registers: one reload per tile of rows",
    ),
    (
        r"sm90::retention_run_kernel<\w+, 64, \d+, false, true(, \w+)?>",
        4,
        "one register too many with rotary on load",
    ),
]


def _is_forward_up_to_128(name: str) -> bool:
    """Whether a kernel runs in a forward pass at head dims up to 128. `name` as the report has it, with its template
    arguments: retention_run_kernel<dtype, head dim, columns of v, backward, ...>."""
    kernel, _, arguments = re.sub(r"\bsm90::|\bstep::|^\w+::", "", name).partition("<")
    if any(word in kernel for word in BACKWARD):
        return False
    values = [value.strip(" >") for value in arguments.split(",")]
    if kernel == "retention_run_kernel" and values[3] == "true":
        return False
    return kernel not in PER_HEAD_DIM or int(next(value for value in values if value.isdigit())) <= 128


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rms_norm::forward_kernel<__half, 8, 256>", True),  # 256 lanes
        ("rms_norm::backward_kernel<float, 4, 32>", False),
        ("weight_gradient_kernel", False),
        ("combine_kernel<__half>", True),
        ("attention_forward_kernel<ForwardConfig<__half, 128, true> >", True),
        ("sm90::attention_forward_kernel<sm90::ForwardConfig<__half, 256, true> >", False),
        ("sm90::attention_backward_q_kernel<sm90::BackwardQConfig<__half, 64> >", False),
        ("decode_kernel<DecodeConfig<__nv_bfloat16, signed char, 128, 4> >", True),
        ("sm90::hopper_decode_kernel<sm90::HopperDecodeConfig<__nv_bfloat16, __nv_fp8_e4m3, 256, 64> >", False),
        ("sm90::retention_run_kernel<__half, 128, 64, false, true, false>", True),
        ("sm90::retention_run_kernel<__half, 128, 64, true, false, false>", False),
        ("step::retention_step_kernel<float, 16, true, false>", True),
    ],
)
def test_which_kernels_are_forward(name: str, expected: bool) -> None:
    assert _is_forward_up_to_128(name) == expected


def test_forward_kernels_up_to_128_do_not_spill() -> None:
    kernels = _library.kernel_report()
    if kernels is None:
        pytest.skip(f"no machine code in this build: no {_library.KERNEL_REPORT} beside the op library")
    forward = [kernel for kernel in kernels if _is_forward_up_to_128(kernel["name"])]
    assert len(forward) > len(kernels) // 4, "the rule finds the forward kernels"
    spilled = []
    for kernel in forward:
        allowed = max((size for pattern, size, _ in EXCEPTIONS if re.fullmatch(pattern, kernel["name"])), default=0)
        if kernel["spill_stores"] > allowed:
            spilled.append(f"{kernel['arch']} {kernel['name']}: {kernel['spill_stores']} bytes, allowed {allowed}")
    assert not spilled, "\n".join(spilled)
