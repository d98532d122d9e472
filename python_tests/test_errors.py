"""Bad input: every op of every back end names the argument, what it got and what is allowed, and touches nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import bitwise_equal


class Inputs:
    """Good arguments of every op, to be spoilt one at a time."""

    def __init__(self, device: str) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device)

        def ints(*values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.random, self.ints = random, ints
        q, k, v = random(2, 3, 4, 16), random(2, 5, 2, 16), random(2, 5, 2, 8)
        caches = {"k_cache": random(2, 9, 2, 16), "v_cache": random(2, 9, 2, 8)}
        retention = {"q": random(2, 3, 4, 16), "k": random(2, 3, 4, 16), "v": random(2, 3, 4, 8)}
        retention["g"] = -torch.rand(2, 3, 4, device=device)
        self.good: dict[str, dict[str, Any]] = {
            "attention": {"q": q, "k": k, "v": v},
            "attention_decode": {"q": q, **caches, "seqused_k": ints(3, 9)},
            "append_kv": {"k": k, "v": v, **caches, "seqused_k": ints(0, 4)},
            "gated_retention": dict(retention),
            "gated_retention_step": {**retention, "state": random(2, 4, 16, 8)},
            "rms_norm": {"x": random(3, 16), "weight": random(16), "residual": random(3, 16)},
            "rotary": {"x": random(2, 3, 4, 16), "inv_freq": torch.rand(8, device=device)},
            "swiglu": {"gate": random(3, 16), "up": random(3, 16)},
            "retention_output": {"o": random(2, 3, 4, 16), "gate": random(2, 3, 4, 16)},
        }


# op, changed arguments (made from the good ones), words of the message
Change = Callable[[Inputs, dict[str, Any]], dict[str, Any]]
CASES: list[tuple[str, Change, str]] = [
    # attention
    ("attention", lambda i, a: {"q": a["q"][0]}, r"q.*\[3, 4, 16\].*batch, time_q, heads_q"),
    ("attention", lambda i, a: {"q": a["q"].int()}, r"q\.dtype.*int32.*bfloat16"),
    ("attention", lambda i, a: {"k": a["k"].double()}, r"k\.dtype.*float64.*float32"),
    ("attention", lambda i, a: {"k": i.random(2, 5, 2, 8)}, r"k.*head dimension 8.*16"),
    ("attention", lambda i, a: {"k": i.random(3, 5, 2, 16), "v": i.random(3, 5, 2, 8)}, r"k.*batch 3.*2"),
    ("attention", lambda i, a: {"v": i.random(2, 4, 2, 8)}, r"v.*\[2, 4, 2, 8\].*like k"),
    ("attention", lambda i, a: {"q": i.random(2, 3, 5, 16)}, r"q.*5 heads over 2.*multiple"),
    (
        "attention",
        lambda i, a: {"q": i.random(2, 3, 4, 12), "k": i.random(2, 5, 2, 12)},
        r"dimension 12.*multiple of 8",
    ),
    ("attention", lambda i, a: {"v": i.random(2, 5, 2, 264)}, r"v.*dimension 264.*256"),
    ("attention", lambda i, a: {"q": i.random(2, 3, 16, 4).transpose(2, 3)}, r"q.*strides.*contiguous last"),
    ("attention", lambda i, a: {"q": [1, 2]}, r"q.*list.*tensor"),
    ("attention", lambda i, a: {"window": 5}, r"window.*5.*left, right"),
    ("attention", lambda i, a: {"window": (-2, 0)}, r"window.*-2"),
    ("attention", lambda i, a: {"softcap": -1.0}, r"softcap.*-1.*>= 0"),
    ("attention", lambda i, a: {"softcap": None}, r"softcap.*None.*>= 0"),
    ("attention", lambda i, a: {"scale": i.random(1)}, r"scale.*number"),
    ("attention", lambda i, a: {"sinks": i.random(3)}, r"sinks.*\[3\].*\[4\]"),
    ("attention", lambda i, a: {"sinks": i.ints(1, 2, 3, 4)}, r"sinks.*int32.*floating"),
    ("attention", lambda i, a: {"alibi_slopes": i.random(3, 4)}, r"alibi_slopes.*\[3, 4\].*\[2, 4\]"),
    ("attention", lambda i, a: {"alibi_slopes": i.random(4).requires_grad_()}, r"alibi_slopes.*gradient"),
    ("attention", lambda i, a: {"cu_seqlens_q": i.ints(0, 3)}, r"cu_seqlens_k.*None.*both"),
    ("attention", lambda i, a: {"cu_seqlens_q": i.ints(0, 3), "cu_seqlens_k": i.ints(0, 5)}, r"batch 2.*batch 1"),
    ("attention", lambda i, a: {"seqused_k": i.ints(1, 2, 3)}, r"seqused_k.*\[3\].*\[2\]"),
    ("attention", lambda i, a: {"seqused_k": i.ints(1, 2).long()}, r"seqused_k.*int64.*int32"),
    ("attention", lambda i, a: {"prefix_len": i.ints([1] * 5, [1] * 5)}, r"prefix_len.*\[2, 5\].*\[2, 3\]"),
    (
        "attention",
        lambda i, a: {"prefix_len": i.ints([1] * 3, [1] * 3), "window": (2, 0)},
        r"window.*\(2, 0\).*prefix_len",
    ),
    ("attention", lambda i, a: {"latents": (i.random(2, 3, 2, 16),)}, r"latents.*pair"),
    ("attention", lambda i, a: {"latents": (i.random(3, 3, 2, 16), i.random(3, 3, 2, 8))}, r"latents\[0\].*3.*2 or 1"),
    ("attention", lambda i, a: {"latents": (i.random(2, 3, 2, 16), i.random(2, 4, 2, 8))}, r"latents\[1\]"),
    ("attention", lambda i, a: {"latent_end": i.ints([1] * 3, [1] * 3)}, r"latent_end.*latents"),
    ("attention", lambda i, a: {"max_seqlen_q": -3}, r"max_seqlen_q.*-3"),
    # decode
    ("attention_decode", lambda i, a: {"q": i.random(2, 17, 4, 16)}, r"q.*17 tokens.*1 to 16"),
    ("attention_decode", lambda i, a: {"q": i.random(2, 0, 4, 16)}, r"q.*0 tokens.*1 to 16"),
    ("attention_decode", lambda i, a: {"k_cache": a["k_cache"].half()}, r"k_cache\.dtype.*float16.*float8"),
    ("attention_decode", lambda i, a: {"v_cache": a["v_cache"].char()}, r"v_cache\.dtype.*int8.*float32"),
    ("attention_decode", lambda i, a: {"q": i.random(3, 1, 4, 16), "seqused_k": i.ints(1, 1, 1)}, r"k_cache.*2.*3"),
    ("attention_decode", lambda i, a: {"seqused_k": i.ints(1)}, r"seqused_k.*\[1\].*\[2\]"),
    ("attention_decode", lambda i, a: {"block_table": i.ints(0, 1)}, r"block_table.*\[2\].*max_pages"),
    ("attention_decode", lambda i, a: {"k_scale": i.random(3)}, r"k_scale.*\[3\].*\[2\]"),
    ("attention_decode", lambda i, a: {"latent_len": i.ints(1, 1)}, r"latent_len.*latents"),
    ("attention_decode", lambda i, a: {"num_splits": -1}, r"num_splits.*-1.*>= 0"),
    ("attention_decode", lambda i, a: {"q": a["q"].clone().requires_grad_()}, r"attention_decode.*no_grad.*attention"),
    # append
    ("append_kv", lambda i, a: {"v": i.random(2, 4, 2, 8)}, r"v.*\[2, 4, 2, 8\]"),
    ("append_kv", lambda i, a: {"k_cache": i.random(2, 9, 3, 16)}, r"k_cache.*\[2, 9, 3, 16\]"),
    ("append_kv", lambda i, a: {"inv_freq": i.random(9)}, r"inv_freq.*9.*8"),
    ("append_kv", lambda i, a: {"ring": True, "block_table": i.ints([0], [1])}, r"ring.*block_table"),
    # retention
    ("gated_retention", lambda i, a: {"k": i.random(2, 4, 4, 16)}, r"k.*\[2, 4, 4, 16\].*\[2, 3, 4, 16\]"),
    ("gated_retention", lambda i, a: {"g": i.random(2, 3, 5)}, r"g.*\[2, 3, 5\].*\[2, 3, 4\]"),
    ("gated_retention", lambda i, a: {"g": a["g"].half()}, r"g\.dtype.*float16.*float32"),
    ("gated_retention", lambda i, a: {"v": i.random(2, 3, 4, 7)}, r"v.*dimension 7.*multiple of 8"),
    ("gated_retention", lambda i, a: {"initial_state": i.random(2, 4, 8, 16)}, r"initial_state.*\[2, 4, 8, 16\]"),
    (
        "gated_retention",
        lambda i, a: {"initial_state": i.random(2, 4, 16, 8).half()},
        r"initial_state.*float16.*float32",
    ),
    ("gated_retention", lambda i, a: {"cu_seqlens": i.ints(0, 3)}, r"cu_seqlens.*batch 2.*batch 1"),
    ("gated_retention", lambda i, a: {"inv_freq": i.random(9)}, r"inv_freq.*9.*1 to 8"),
    ("gated_retention", lambda i, a: {"inv_freq": i.random(8).double()}, r"inv_freq.*float64.*float32"),
    ("gated_retention", lambda i, a: {"inv_freq": i.random(8), "offsets": i.ints(1)}, r"offsets.*\[1\].*sequences"),
    ("gated_retention", lambda i, a: {"inv_freq": i.random(8), "offsets": -1}, r"offsets.*-1"),
    ("gated_retention", lambda i, a: {"offsets": i.ints(1, 2)}, r"offsets.*without inv_freq"),
    ("gated_retention_step", lambda i, a: {"inv_freq": i.random(2, 4)}, r"inv_freq.*\[rotary_dim / 2\]"),
    ("gated_retention_step", lambda i, a: {"offsets": 3}, r"offsets.*without inv_freq"),
    ("gated_retention_step", lambda i, a: {"state": a["state"].half()}, r"state.*float16.*float32"),
    ("gated_retention_step", lambda i, a: {"state": i.random(2, 4, 8, 16).transpose(2, 3)}, r"state.*contiguous"),
    ("gated_retention_step", lambda i, a: {n: torch.cat([a[n]] * 6, 1) for n in "qkvg"}, r"18 tokens"),
    ("gated_retention_step", lambda i, a: {"q": a["q"].clone().requires_grad_()}, r"gated_retention_step.*no_grad"),
    # pointwise
    ("rms_norm", lambda i, a: {"weight": i.random(15)}, r"weight.*\[15\].*\[16\]"),
    ("rms_norm", lambda i, a: {"weight": a["weight"].half()}, r"weight\.dtype.*float16"),
    ("rms_norm", lambda i, a: {"residual": i.random(4, 16)}, r"residual.*\[4, 16\].*\[3, 16\]"),
    ("rms_norm", lambda i, a: {"eps": -1.0}, r"eps.*-1"),
    ("rotary", lambda i, a: {"inv_freq": None}, r"inv_freq.*None.*cos and sin"),
    ("rotary", lambda i, a: {"cos": i.random(3, 8)}, r"inv_freq.*either"),
    ("rotary", lambda i, a: {"inv_freq": i.random(9)}, r"inv_freq.*9.*8"),
    ("rotary", lambda i, a: {"offsets": -1}, r"offsets.*-1.*>= 0"),
    ("rotary", lambda i, a: {"offsets": i.ints(1, 2, 3)}, r"offsets.*\[3\].*\[2\]"),
    ("swiglu", lambda i, a: {"up": i.random(3, 15)}, r"up.*\[3, 15\].*\[3, 16\]"),
    ("swiglu", lambda i, a: {"up": a["up"].half()}, r"up\.dtype.*float16.*float32"),
    ("retention_output", lambda i, a: {"gate": i.random(2, 3, 4, 8)}, r"gate.*\[2, 3, 4, 8\]"),
    ("retention_output", lambda i, a: {"eps": -1.0}, r"eps.*-1"),
]


def spoil(backend: Any, op: str, change: Change) -> dict[str, Any]:
    inputs = Inputs(backend.device)
    good = inputs.good[op]
    return {**good, **change(inputs, good)}


@pytest.mark.parametrize("op,change,words", CASES, ids=[f"{op}-{i}" for i, (op, _, _) in enumerate(CASES)])
def test_bad_arguments(backend, op, change, words):
    arguments = spoil(backend, op, change)
    before = {n: x.clone() for n, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(ValueError) as caught:
        getattr(backend.ops, op)(**arguments)
    assert re.search(words, str(caught.value)), str(caught.value)
    assert "got" in str(caught.value) and "allowed" in str(caught.value)
    assert all(bitwise_equal(arguments[n], x) for n, x in before.items())


# What lies in the index tensors: checked before anything runs where the host may look.
CONTENTS: list[tuple[str, Change, str]] = [
    ("attention", lambda i, a: {"seqused_k": i.ints(3, 6)}, r"seqused_k.*6.*5"),
    ("attention", lambda i, a: {"seqused_k": i.ints(-1, 2)}, r"seqused_k.*-1"),
    ("attention", lambda i, a: {"prefix_len": i.ints([0, 1, 6], [1, 1, 1])}, r"prefix_len.*6.*5"),
    (
        "attention",
        lambda i, a: {
            "latents": (i.random(2, 3, 2, 16), i.random(2, 3, 2, 8)),
            "latent_end": i.ints([0, 1, 4], [1, 1, 1]),
        },
        r"latent_end.*4.*3",
    ),
    ("attention_decode", lambda i, a: {"seqused_k": i.ints(3, 10)}, r"seqused_k.*10.*9"),
    ("attention_decode", lambda i, a: {"block_table": i.ints([0], [2])}, r"block_table.*2.*1"),
    ("append_kv", lambda i, a: {"seqused_k": i.ints(0, 5)}, r"sequence 1.*10.*9|seqused_k\[1\].*5.*0 to 4"),
    ("append_kv", lambda i, a: {"seqused_k": i.ints(-1, 0)}, r"seqused_k.*-1"),
    ("append_kv", lambda i, a: {"block_table": i.ints([0], [-1])}, r"block_table.*-1"),
    ("gated_retention", lambda i, a: {"inv_freq": i.random(8), "offsets": i.ints(0, -1)}, r"offsets.*-1"),
    ("gated_retention_step", lambda i, a: {"inv_freq": i.random(8), "offsets": i.ints(-7, 0)}, r"offsets.*-7"),
    ("rotary", lambda i, a: {"inv_freq": None, "cos": i.random(4, 8), "sin": i.random(4, 8), "offsets": 2}, r"4.*5"),
]


@pytest.mark.backends("cpu", "reference", "emulated")
@pytest.mark.parametrize("op,change,words", CONTENTS, ids=[f"{op}-{i}" for i, (op, _, _) in enumerate(CONTENTS)])
def test_bad_contents(backend, op, change, words):
    arguments = spoil(backend, op, change)
    before = {n: x.clone() for n, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises((ValueError, RuntimeError)) as caught:
        getattr(backend.ops, op)(**arguments)
    assert re.search(words, str(caught.value)), str(caught.value)
    assert all(bitwise_equal(arguments[n], x) for n, x in before.items())


@pytest.mark.backends("cpu", "reference", "emulated")
@pytest.mark.parametrize("bounds", [(1, 3), (0, 2, 1), (0, 4), (0, -1)], ids=str)
@pytest.mark.parametrize("op", ["attention q", "attention k", "gated_retention", "rotary", "append_kv"])
def test_bad_boundaries(backend, op, bounds):
    inputs = Inputs(backend.device)
    name, _, which = op.partition(" ")
    arguments = {n: x[:1, :3] if x.dim() > 2 and "cache" not in n else x for n, x in inputs.good[name].items()}
    cu = inputs.ints(*bounds)
    fine = inputs.ints(*range(len(bounds)))
    if name == "attention":
        arguments |= {"cu_seqlens_q": fine, "cu_seqlens_k": fine, f"cu_seqlens_{which}": cu}
    else:
        arguments["cu_seqlens"] = cu
    if name == "append_kv":
        rows = len(bounds) - 1
        arguments["seqused_k"] = torch.zeros(rows, dtype=torch.int32)
        arguments |= {n: inputs.random(rows, 9, *arguments[n].shape[2:]) for n in ("k_cache", "v_cache")}
    with pytest.raises((ValueError, RuntimeError), match="cu_seqlens"):
        getattr(backend.ops, name)(**arguments)


@pytest.mark.backends("cuda", "emulated")
def test_float64_is_refused_where_there_is_none(backend):
    arguments = {n: x.double() for n, x in Inputs(backend.device).good["attention"].items()}
    with pytest.raises(RuntimeError, match=r"float64|double"):
        backend.ops.attention(**arguments)


SMALL_GPU = """
import torch
from yoco_ext import _library, ops, reference

_library.select_backend("emulated")
q, k, v = (torch.randn(1, 40, 1, 256).bfloat16() for _ in range(3))
try:
    ops.attention(q, k, v)
except RuntimeError as error:
    assert "shared memory" in str(error), error
else:
    raise AssertionError("256 columns fit into 99 KB")
# The error is over with that call: the next one does not find it.
q, used = torch.randn(1, 1, 64, 128).bfloat16(), torch.tensor([70], dtype=torch.int32)
k, v = (torch.randint(-127, 128, (1, 70, 1, 128)).to(torch.int8) for _ in "kv")
scale = torch.full((1,), 0.01)
run = {"q": q, "k_cache": k, "v_cache": v, "seqused_k": used, "k_scale": scale, "v_scale": scale}
ours, plain = (f.attention_decode(**run).double() for f in (ops, reference))
assert (ours - plain).norm() <= 0.02 * plain.norm()
"""


@pytest.mark.backends("emulated")
def test_a_gpu_with_little_shared_memory_says_so(backend):
    """Compute capability 8.6 has 99 KB per block where 8.0 has 163."""
    command = [sys.executable, "-c", SMALL_GPU]
    done = subprocess.run(command, env={**os.environ, "PTXSIM_CC": "86"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_missing_library_says_what_to_do(monkeypatch, tmp_path):
    from yoco_ext import _library

    monkeypatch.setattr(_library, "_handle", None)
    monkeypatch.setenv("YOCO_EXT_LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(ImportError, match=r"nothing\.so.*YOCO_EXT_LIBRARY.*pip install.*yoco_ext\.reference"):
        _library.load()


def test_unknown_backend():
    from yoco_ext import _library

    with pytest.raises(ValueError, match=r"'tpu'.*\"cpu\", \"emulated\""):
        _library.select_backend("tpu")
