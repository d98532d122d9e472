"""The command line, run as a user runs it, on settings that take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from yoco_ext import YOCOForCausalLM
from yoco_ext.cli import main

ROOT = Path(__file__).parents[1]
TINY_DEMO = "--steps 6 --batch-size 2 --seq-len 64 --hidden-size 64 --num-layers 2 --prompt-bytes 100 --new-bytes 12"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_bytes(b"".join(b"%d bottles of milk on the wall\n" % i for i in range(400)))
    return path


@pytest.fixture(scope="module")
def demo(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "out"
    assert (
        main(["demo", "--text", str(text), "--output", str(output), *TINY_DEMO.split(), "--precision", "float32"]) == 0
    )
    return output


def test_demo_writes_what_it_says(demo: Path) -> None:
    figures = json.loads((demo / "figures.json").read_text())
    assert figures["held_out"]["after"] < figures["held_out"]["before"]
    assert 0 < figures["gzip_bits_per_byte"] < 8
    assert figures["agreement"] < 1e-5
    assert len(figures["training"]["losses_bits_per_byte"]) == 6
    generation = figures["generation"]
    assert generation["cache_bytes"] < generation["transformer_cache_bytes"]
    assert generation["prompt_bytes"] == 100 and generation["cache_tokens"] == 112
    for name in ("loss.png", "cache_memory.png"):
        assert (demo / name).read_bytes().startswith(b"\x89PNG") and (demo / name).stat().st_size > 10_000
    assert YOCOForCausalLM.load(demo / "checkpoint").config.vocab_size == 256


def test_generate_repeats_with_a_seed(demo: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    outputs = []
    for _ in range(2):
        arguments = ["--prompt", "12 bott", "--max-new-tokens", "20", "--seed", "3"]
        assert main(["generate", str(demo / "checkpoint"), *arguments]) == 0
        outputs.append(capfdbinary.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[0].startswith(b"12 bott") and len(outputs[0]) > 10


def test_generate_reads_a_prompt_from_a_file(demo: Path, text: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    options = ["--prompt-file", str(text), "--max-new-tokens", "1", "--temperature", "0", "--ops", "reference"]
    assert main(["generate", str(demo / "checkpoint"), *options]) == 0
    assert capfdbinary.readouterr().out.startswith(text.read_bytes())


def test_train_resumes_where_it_stopped(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 2, "num_heads": 1}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    common = ["--text", str(text), "--config", str(tmp_path / "shape.json"), "--self-decoder", "sliding_window"]
    common += ["--batch-size", "2", "--seq-len", "32", "--warmup-steps", "1", "--precision", "float32"]
    run = ["train", *common, "--output", str(tmp_path / "run"), "--steps", "3", "--save-every", "2"]
    assert main(run) == 0
    assert "held-out text" in capsys.readouterr().out
    assert main(run) == 2
    assert "holds a run already: continue it with --resume" in capsys.readouterr().err
    assert main(["train", *common, "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert "at step 3 of 3" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["self_decoder"] == "sliding_window" and config["hidden_size"] == 64


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--kernels"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "libyoco_ext_ops.so" in out and "kernels for" in out
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines() if len(line.split()) == 3}
    assert rows["retention_backward"] == rows["decode"] == "yes", "the CPU back end has every kernel"


@pytest.mark.parametrize("command", ["info", "demo", "train", "generate"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"example: yoco-ext {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--text", "/no/such/text", "--output", "x"], "/no/such/text is neither a file nor a folder"),
        (["train"], "the following arguments are required: --output"),
        (["train", "--output", "x", "--preset", "7b"], "unknown preset '7b'"),
        (["train", "--output", "x", "--config", "/no/such/file"], "No such file or directory: '/no/such/file'"),
        (["train", "--output", "x", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["train", "--output", "x", "--steps", "0"], "steps must be positive, got 0"),
        (["train", "--text", "TEXT", "--output", "/no/such/run", "--resume"], "nothing to resume"),
        (["demo", "--hidden-size", "100"], "--hidden-size must be a multiple of 64"),
        (["demo", "--batch-size", "0"], "must be at least 1, got 0"),
        (["demo", "--device", "cuda:99"], "--device cuda:99: PyTorch sees"),
        (["demo", "--device", "abacus"], "--device abacus: no such device"),
        (["generate", "/no/such/checkpoint", "--prompt", "x"], "/no/such/checkpoint is not a folder"),
        (["generate", "x"], "one of the arguments --prompt --prompt-file is required"),
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err and captured.err.startswith("yoco-ext") and captured.err.count("\n") == 1


def test_python_m_runs_without_the_op_library(demo: Path, tmp_path: Path) -> None:
    """The reference needs no compiled code, and a missing library is one clear line."""
    environment = os.environ | {"YOCO_EXT_LIBRARY": str(tmp_path / "nothing.so"), "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "yoco_ext",
        "generate",
        str(demo / "checkpoint"),
        "--prompt",
        "7",
        "--device",
        "cpu",
    ]
    command += ["--max-new-tokens", "2"]
    works = subprocess.run([*command, "--ops", "reference"], env=environment, capture_output=True)
    assert works.returncode == 0 and works.stdout.startswith(b"7")
    fails = subprocess.run(command, env=environment, capture_output=True)
    assert fails.returncode == 2 and fails.stderr.count(b"\n") == 1
    assert b"nothing.so named by YOCO_EXT_LIBRARY is not a file" in fails.stderr
