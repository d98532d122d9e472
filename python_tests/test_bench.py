"""The benchmark suite where there is no GPU: its cases can be made and called; failing peers do not stop it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parents[1]))
bench = importlib.import_module("bench.main")
cases: ModuleType = bench.cases
harness = importlib.import_module("bench.harness")


@pytest.mark.unpoisoned
def test_every_case_of_the_gpu_suite_runs_without_memory() -> None:
    seen = set()
    with FakeTensorMode():
        for case in cases.cuda_suite(False, torch.device("cpu")):
            assert case.flops > 0 and case.bytes > 0 and harness.OURS in case.runs
            case.runs[harness.OURS]()
            seen.add((case.op, case.shape))
    text = " | ".join(" ".join(name) for name in seen)
    wanted = (
        *(f"attention {way} B{16384 // t} T{t} H{2048 // d}/{2048 // d} D{d} causal"
          for way in ("forward", "backward") for t in (512, 1024, 2048, 4096, 8192, 16384) for d in (64, 128, 256)),
        *(f"window {way} B1 T16384 H{2048 // d} D{d} window {left}"
          for way in ("forward", "backward") for d in (64, 128, 256) for left in (256, 512, 1024, 4096)),
        *(f"attention {way} B1 T{tq}/{tk} H24/8 D128 causal"
          for way in ("forward", "backward") for tq in (1, 16, 1024) for tk in (8192, 131072, 1048576)),
        *(f"retention {way} B{b} T{t} H{h} D{d}" for way in ("forward", "backward") for b, t, h, d in
          ((1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (4, 4096, 64, 128), (8, 2048, 32, 256),
           (8, 1024, 8, 64))),
        *(f"retention with rotary {way} B4 T4096 H64 D128" for way in ("forward", "backward")),
        *(f"differential {way} B2 T8192 H{1024 // d} D{d}/{2 * d} causal"
          for way in ("forward", "backward") for d in (64, 128)),
        "retention forward B1 T1048576 H24 D128",
        *(f"decode B{b} Tk{t} H24/8 D128 {dtype} cache" for b in (1, 8, 64) for t in (4096, 131072, 1048576)
          for dtype in ("bfloat16", "float8_e4m3fn") if b * t <= 2**23),
        *(f"retention step B{b} H24 D128" for b in (1, 8, 64)),
        "launch: attention forward B1 T256 H8/8 D64 causal",
    )  # fmt: skip
    missing = [name for name in wanted if name not in text]
    assert not missing, missing


def test_a_peer_that_cannot_run_is_listed_and_our_failure_is_an_error() -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    timer = harness.Timer(torch.device("cpu"))
    calls = []
    case = harness.Case("op", "shape", torch.float32, 1.0, 1.0, {harness.OURS: lambda: calls.append(1), "peer": fail})
    result = harness.measure(case, timer, seconds=0.01)
    assert list(result.milliseconds) == [harness.OURS] and result.ratio is None
    assert result.failed == {"peer": "RuntimeError: no such kernel"}
    assert "not run: peer" in harness.format_row(result)
    before = len(calls)
    many = harness.measure(harness.Case("op", "s", torch.float32, 1, 1, case.runs, calls=50), timer, 0.01, (5, 5))
    assert len(calls) - before == 2 + 5 * 50 and many.rounds == 5
    with pytest.raises(RuntimeError, match="no such kernel"):
        harness.measure(harness.Case("op", "shape", torch.float32, 1, 1, {harness.OURS: fail}), timer)


@pytest.mark.parametrize("backward", [False, True])
def test_differential_peers_compute_the_same(backward: bool) -> None:
    case = cases.differential(torch.device("cpu"), torch.float32, 33, 2, 16, batch=2, backward=backward)
    results = {name: run() for name, run in case.runs.items()}
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
    assert document["ceilings"] == {"read_gbytes": 10.0}
    assert "launch: retention step" in capsys.readouterr().out


def test_a_case_of_ours_that_fails_does_not_take_the_others_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    def suite(quick: bool):
        yield harness.Case("bad", "shape", torch.float32, 1.0, 1.0, {harness.OURS: fail})
        yield harness.Case("good", "shape", torch.float32, 1.0, 1.0, {harness.OURS: lambda: None})

    monkeypatch.setattr(bench, "measure_ceilings", lambda device, timer: {})
    monkeypatch.setattr(cases, "cpu_suite", suite)
    path = tmp_path / "figures.json"
    assert bench.main(["--seconds", "0.01", "--output", str(path)]) == 1
    assert [r["op"] for r in json.loads(path.read_text())["results"]] == ["good"]
    assert "bad shape: FAILED, RuntimeError: no such kernel" in capsys.readouterr().out
