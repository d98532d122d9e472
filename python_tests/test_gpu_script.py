"""`make gpu` where there is no GPU: one clear sentence; with stand-ins for the tools: what is run."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci/gpu.sh"


def _tool(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A python3 that says what it was asked to run, on a machine that looks as if it had a GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    _tool(folder, "python3", 'echo "python3 $*"; [[ "$*" == *"-m pytest"* && -n "$FAIL_TESTS" ]] && exit 1; exit 0')
    _tool(folder, "compute-sanitizer", 'echo "sanitizer $*"')
    for name in ("libyoco_ext_ops.so", "libyoco_ext_cuda.so"):
        (tmp_path / name).touch()
    return folder


def _run(tools: Path, stage: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{tools}:/usr/bin:/bin"
    library = str(tools.parent / "libyoco_ext_ops.so")
    return subprocess.run(
        [str(SCRIPT), str(tools.parent / "out"), stage],
        capture_output=True,
        text=True,
        env={"PATH": path, "HOME": os.environ.get("HOME", "/"), "YOCO_EXT_LIBRARY": library, **environment},
    )


def test_all_stages_in_order_and_a_table_last(tools: Path) -> None:
    done = _run(tools, "all")
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["build", "reused"],
        *([name, "ok"] for name in ("test", "memcheck", "racecheck", "bench")),
    ]
    logs = {path.stem: path.read_text() for path in (tools.parent / "out").glob("*.log")}
    assert "pytest" in logs["test"] and "-k cuda" in logs["test"]
    assert "--tool racecheck" in logs["racecheck"] and "bench --device cuda --quick" in logs["bench"]
    assert "-k test_repeats and bf16 python_tests/test_cuda_schedules.py" in logs["memcheck"]


def test_a_failing_stage_fails_the_run_and_the_others_go_on(tools: Path) -> None:
    done = _run(tools, "all", FAIL_TESTS="1")
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert done.returncode == 1 and "exit 1" in rows["test"] and "ok" in rows["bench"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("nonsense", "unknown stage 'nonsense'; there are: build test sanitize bench all"),
        ("test", "stage test needs an NVIDIA GPU that PyTorch sees"),
        ("bench", "stage bench needs an NVIDIA GPU that PyTorch sees"),
    ],
)
def test_without_a_gpu_one_sentence(tools: Path, stage: str, message: str) -> None:
    _tool(tools, "python3", "exit 1")
    done = _run(tools, stage)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_what_is_missing_is_named(tools: Path) -> None:
    (tools / "compute-sanitizer").unlink()
    assert "stage sanitize needs compute-sanitizer" in _run(tools, "sanitize").stderr
    (tools.parent / "libyoco_ext_cuda.so").unlink()
    assert "is missing; run stage build first or set YOCO_EXT_LIBRARY" in _run(tools, "test").stderr
    # nvcc may be in /usr/bin: only where it is not.
    if not Path("/usr/bin/nvcc").exists():
        assert "stage build needs the CUDA compiler" in _run(tools, "build").stderr
