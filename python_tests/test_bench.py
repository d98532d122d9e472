"""The benchmark suite where there is no GPU: its cases can be made and called; failing peers do not stop it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parents[1]))
bench = importlib.import_module("bench.main")
cases: ModuleType = bench.cases
harness = importlib.import_module("bench.harness")


@pytest.mark.unpoisoned
def test_the_gpu_suite_has_every_case_and_runs_without_memory() -> None:
    seen, kinds, big = set(), set(), []
    with FakeTensorMode():
        for case in cases.cuda_suite(False, torch.device("cpu")):
            assert case.flops > 0 and case.bytes > 0 and case.memory >= case.largest
            kind = (case.op, case.shape.split()[-1], case.largest >= 2**31)
            if kind not in kinds:  # one of each: lengths and head dimensions change nothing in the call
                kinds.add(kind)
                case.make()[harness.OURS]()
            seen.add((case.op, case.shape))
            big.append(case.largest >= 2**31)
    assert any(big) and big == sorted(big)
    text = " | ".join(" ".join(name) for name in seen)
    wanted = (
        *(f"attention {way} B{16384 // t} T{t} H{2048 // d}/{2048 // d} D{d} causal"
          for way in ("forward", "backward") for t in (512, 1024, 2048, 4096, 8192, 16384) for d in (64, 128, 256)),
        *(f"window {way} B{16384 // t} T{t} H{2048 // d} D{d} window {left}"
          for way in ("forward", "backward") for d in (64, 128, 256) for left in (256, 512, 1024, 4096)
          for t in (512, 1024, 2048, 4096, 8192, 16384) if left < t),
        *(f"attention {way} B1 T{tq}/{tk} H24/8 D128 causal"
          for way in ("forward", "backward") for tq in (1, 16, 1024) for tk in (8192, 131072, 1048576)),
        *(f"retention {way} B{b} T{t} H{h} D{d}" for way in ("forward", "backward") for b, t, h, d in
          ((1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (4, 4096, 64, 128), (8, 2048, 32, 256),
           (8, 1024, 8, 64))),
        *(f"retention with {what} {way} B4 T4096 H64 D128"
          for what in ("rotary", "output gate") for way in ("forward", "backward")),
        *(f"differential {way} B2 T8192 H{1024 // d} D{d}/{2 * d} causal"
          for way in ("forward", "backward") for d in (64, 128)),
        *(f"retention {way} B1 T1048576 H24 D128" for way in ("forward", "backward")),
        *(f"decode B{b} Tk{t} H24/8 D128 {dtype} cache" for b in (1, 8, 64) for t in (4096, 131072, 1048576)
          for dtype in ("bfloat16", "float8_e4m3fn")),
        *(f"retention step{what} B{b} H24 D128" for what in ("", " with output gate") for b in (1, 8, 64)),
        "launch: attention forward B1 T256 H8/8 D64 causal",
    )  # fmt: skip
    missing = [name for name in wanted if name not in text]
    assert not missing, missing


def test_a_peer_that_cannot_run_is_listed_and_our_failure_is_an_error() -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    timer = harness.Timer(torch.device("cpu"))
    calls = []
    runs = {harness.OURS: lambda: calls.append(1), "peer": fail}
    case = harness.Case("op", "shape", torch.float32, 1.0, 1.0, lambda: runs)
    result = harness.measure(case, timer, seconds=0.01)
    assert list(result.milliseconds) == [harness.OURS] and result.ratio is None
    assert result.failed == {"peer": "RuntimeError: no such kernel"}
    assert "not run: peer" in harness.format_row(result)
    before = len(calls)
    many = harness.measure(harness.Case("op", "s", torch.float32, 1, 1, case.make, calls=50), timer, 0.01, (5, 5))
    assert len(calls) - before == 2 + 5 * 50 and many.rounds == 5
    with pytest.raises(RuntimeError, match="no such kernel"):
        harness.measure(harness.Case("op", "shape", torch.float32, 1, 1, lambda: {harness.OURS: fail}), timer)


@pytest.mark.parametrize("backward", [False, True])
def test_differential_peers_compute_the_same(backward: bool) -> None:
    case = cases.differential(torch.device("cpu"), torch.float32, 33, 2, 16, batch=2, backward=backward)
    results = {name: run() for name, run in case.make().items()}
    assert len(results) == 3
    for result in results.values():
        torch.testing.assert_close(result, results[harness.OURS], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("time_q", "time_k", "left"), [(5, 5, -1), (3, 9, -1), (9, 9, 3), (4, 9, 2), (6, 9, 4)])
def test_visible_pairs(time_q: int, time_k: int, left: int) -> None:
    mask = importlib.import_module("bench.peers").window_mask(time_q, time_k, left if left >= 0 else time_k, "cpu")
    assert cases.visible_pairs(time_q, time_k, left) == int(mask.sum())


def test_a_run_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure_ceilings", lambda device, timer: {"read_gbytes": 10.0})
    monkeypatch.setattr(cases, "cpu_suite", lambda quick: cases.launch(torch.device("cpu"), torch.bfloat16))
    path = tmp_path / "figures.json"
    only = ["--quick", "--only", "launch: retention step", "--seconds", "0.05"]
    assert bench.main([*only, "--output", str(path)]) == 0
    document = json.loads(path.read_text())
    (result,) = document["results"]
    assert result["milliseconds"]["yoco_ext"] > 0 and result["best_peer"] == "eager"
    assert {"date", "commit", "torch", "peers", "cpu_kernels"} <= document["machine"].keys()
    assert document["ceilings"] == {"read_gbytes": 10.0} and document["left_out"] == {}
    assert "launch: retention step" in capsys.readouterr().out


def test_a_case_of_ours_that_fails_does_not_take_the_others_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    def suite(quick: bool):
        yield harness.Case("bad", "shape", torch.float32, 1.0, 1.0, lambda: {harness.OURS: fail})
        yield harness.Case("no memory", "shape", torch.float32, 1.0, 1.0, fail)
        yield harness.Case("good forward", "shape", torch.float32, 2e9, 1.0, lambda: {harness.OURS: lambda: None})
        yield harness.Case("good backward", "shape", torch.float32, 1.0, 4e9, lambda: {harness.OURS: lambda: None})

    ceilings = {"gemm_float32_gflops": 1e3, "read_gbytes": 100.0, "copy_gbytes": 80.0}
    monkeypatch.setattr(bench, "measure_ceilings", lambda device, timer: ceilings)
    monkeypatch.setattr(cases, "cpu_suite", suite)
    path = tmp_path / "figures.json"
    assert bench.main(["--seconds", "0.01", "--output", str(path)]) == 1
    document = json.loads(path.read_text())
    assert [r["op"] for r in document["results"]] == ["good forward", "good backward"]
    assert [r["floor"] for r in document["results"]] == [2.0, 40.0]  # ms: 2 GFLOP at 1 TFLOP/s, 4 GB at 100 GB/s
    assert document["left_out"] == dict.fromkeys(
        ("bad shape float32", "no memory shape float32"), "RuntimeError: no such kernel"
    )
    out = capsys.readouterr().out
    assert "bad shape float32: FAILED, RuntimeError: no such kernel" in out and "good forward+backward" in out
    bench.main(["--table", str(path)])
    out = capsys.readouterr().out
    assert "| 40 |" in out and "Left out: no memory shape float32: RuntimeError: no such kernel" in out


def fake_gpu(monkeypatch: pytest.MonkeyPatch, memory: int = 150 * 10**9) -> None:
    """As much of a GPU as the suite's main asks for; the work itself runs nowhere."""
    properties = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(bench, "machine", lambda device: dict.fromkeys(harness.machine(torch.device("cpu")), "a GPU"))
    monkeypatch.setattr(bench, "measure_ceilings", lambda device, timer: {"read_gbytes": 1.0})
    monkeypatch.setattr(bench, "Timer", lambda device: SimpleNamespace(device=device))


def test_cases_larger_than_the_gpu_are_left_out_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu(monkeypatch)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("should not be made"))
    path = tmp_path / "figures.json"
    assert bench.main(["--device", "cuda", "--only", "decode B64 Tk1048576", "--output", str(path)]) == 0
    why = "needs 275 GB, more than the 135 GB allowed on a GPU"
    name = "decode B64 Tk1048576 H24/8 D128 bfloat16 cache bfloat16"
    left_out = json.loads(path.read_text())["left_out"]
    assert left_out[name] == why and len(left_out) == 2  # and the float8 cache
    assert f"{name}: left out, {why}" in capsys.readouterr().out


def test_a_lost_gpu_ends_the_run_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu(monkeypatch)
    states = iter([None, RuntimeError("illegal memory access"), RuntimeError("illegal memory access")])

    def synchronize(device: torch.device) -> None:
        if (state := next(states)) is not None:
            raise state

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    runs = {harness.OURS: lambda: None, "peer": lambda: None}
    cases_ = [harness.Case(name, "s", torch.float32, 1, 1, lambda: runs) for name in ("first", "second")]
    monkeypatch.setattr(cases, "cuda_suite", lambda quick: cases_)
    path = tmp_path / "figures.json"
    assert bench.main(["--device", "cuda", "--output", str(path)]) == 1
    said = json.loads(path.read_text())["left_out"]
    assert said == {"first s float32": "DeviceLost: peer: RuntimeError: illegal memory access"}
    assert "the cases behind are missing" in capsys.readouterr().out


def test_wrong_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    for arguments, message in (
        (["--only", "no such case"], "--only no such case: no case's name"),
        (["--table", str(tmp_path / "none.json")], "none.json: no figures of this command"),
        (["--table", str(tmp_path / "other.json")], "other.json: no figures of this command"),
    ):
        with pytest.raises(SystemExit) as exit_:
            bench.main(arguments)
        assert exit_.value.code == 2 and message in capsys.readouterr().err
