"""compat.unilm: the official functions against the mathematics, and model files that import them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch

from yoco_ext import YOCOConfig, YOCOForCausalLM
from yoco_ext.checkpoint import load_state_dict
from yoco_ext.compat import unilm


def recurrence(q, k, v, g, state=None):
    """float64, one token after the other; the official convention: the state holds k * dim_k^-0.5."""
    q, k, v, g = (x.double() for x in (q, k, v, g))
    k = k * q.shape[-1] ** -0.5
    state = (
        torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=torch.float64) if state is None else state.double()
    )
    outputs = []
    for t in range(q.shape[2]):
        state = g[:, :, t, None, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    return torch.stack(outputs, 2), state


def inputs(time, dim_v=24, grad=False):
    """Transposed views of [B, T, H, D], as the official layers pass them."""
    q, k = (torch.randn(2, time, 3, 16).transpose(1, 2) for _ in range(2))
    v = torch.randn(2, time, 3, dim_v).transpose(1, 2)
    g = torch.nn.functional.logsigmoid(torch.randn(2, time, 3)).div(4).transpose(1, 2)
    return [x.requires_grad_(grad) for x in (q, k, v, g)]


@pytest.mark.parametrize("time", [1, 37, 256])
def test_retention_functions_agree_with_the_recurrence(time):
    q, k, v, g = inputs(time)
    last = torch.randn(2, 3, 16, 24)
    expected, _ = recurrence(q, k, v, g, last)
    torch.testing.assert_close(
        unilm.chunk_gate_retention(q, k, v, g, 64, last).double(), expected, atol=2e-5, rtol=1e-4
    )
    expected, _ = recurrence(q, k, v, g)
    for function in (unilm.parallel_gate_retention, unilm.hier_chunk_gate_retention):
        torch.testing.assert_close(function(q, k, v, g).double(), expected, atol=2e-5, rtol=1e-4)


def test_gradients_reach_every_input():
    arguments = [*inputs(50, grad=True), torch.randn(2, 3, 16, 24, requires_grad=True)]
    q, k, v, g, last = arguments
    d_out = torch.randn(2, 3, 50, 24)
    ours = torch.autograd.grad(unilm.chunk_gate_retention(q, k, v, g, 64, last), arguments, d_out)
    theirs = torch.autograd.grad(recurrence(q, k, v, g, last)[0], arguments, d_out.double())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 20])
def test_recurrent_steps_continue_a_prefill_and_leave_the_inputs_alone(steps):
    q, k, v, g = inputs(30 + steps)
    _, state = recurrence(*(x[:, :, :30] for x in (q, k, v, g)))
    expected, final = recurrence(q, k, v, g)
    memory = {"last_hidden_state": state.float()}
    tail = [x[:, :, 30:] for x in (q, k, v, g)]
    before = [x.clone() for x in tail]
    out = unilm.recurrent_gate_retention(*tail, memory)
    torch.testing.assert_close(out.double(), expected[:, :, 30:], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(memory["last_hidden_state"].double(), final, atol=2e-5, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(tail, before))


def test_chunk_pieces_add_up():
    q, k, v, g = inputs(64)
    split = [x.unflatten(2, (4, 16)) for x in (q, k * 16**-0.5, v)]
    sums = g.unflatten(2, (4, 16)).cumsum(-1)
    out = unilm.cross_chunk(*split, sums) + unilm.inner_chunk(*split, sums)
    torch.testing.assert_close(out.flatten(2, 3).double(), recurrence(q, k, v, g)[0], atol=2e-5, rtol=1e-4)


def test_chunk_states_are_differentiable_in_all_three_arguments():
    kv = torch.randn(1, 2, 3, 4, 5, dtype=torch.float32, requires_grad=True)
    decay = torch.rand(1, 2, 3, requires_grad=True)
    last = torch.randn(1, 2, 4, 5, requires_grad=True)
    states = unilm.chunk_gate_recurrent(kv, decay, last)
    assert torch.equal(states[:, :, 0], last)
    torch.testing.assert_close(states[:, :, 1], last * decay[:, :, 0, None, None] + kv[:, :, 0])
    assert all(x is not None for x in torch.autograd.grad(states.square().sum(), (kv, decay, last)))


def test_float32_state_beats_official_rounding():
    q, k, v, g = (x.bfloat16() for x in inputs(600))
    g = g / 16
    expected, _ = recurrence(q, k, v, g)
    errors = {}
    for parity in ("float32", "official"):
        with unilm.installed("no.such.package", parity=parity):
            memory: dict = {}
            parts = [
                unilm.recurrent_gate_retention(*(x[:, :, t : t + 1] for x in (q, k, v, g)), memory) for t in range(600)
            ]
        errors[parity] = (torch.cat(parts, 2).double() - expected).norm() / expected.norm()
    assert errors["float32"] < 0.005 < errors["official"]


OFFICIAL_STYLE = {
    "__init__.py": "",
    "kernel/__init__.py": "",
    "kernel/gate_recurrent.py": "raise ImportError('needs triton')",
    "kernel/rotary.py": "raise ImportError('needs triton')",
    "kernel/swiglu.py": "raise ImportError('needs a GPU')",
    "rms_norm.py": "class RMSNorm: original = True",
    "yoco.py": """
        class SelfDecoder:
            def __init__(self):
                self.block_size = 256
    """,
    "layer.py": """
        from fairseq.model_parallel.megatron.mpu import ColumnParallelLinear
        from fairscale.nn import checkpoint_wrapper
        from flash_attn import flash_attn_func
        from .rms_norm import RMSNorm
        from .kernel.gate_recurrent import chunk_gate_retention, recurrent_gate_retention
        from .kernel.rotary import apply_rotary_emb
        from .kernel.swiglu import swiglu
    """,
}


def test_install_serves_model_files_that_import_the_official_names(tmp_path, monkeypatch):
    package = tmp_path / "official_decoder"
    for name, text in OFFICIAL_STYLE.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    rms_norm = importlib.import_module("official_decoder.rms_norm")  # imported before install: patched
    original = rms_norm.RMSNorm
    with unilm.installed("official_decoder", stub_parallel=True):
        layer = importlib.import_module("official_decoder.layer")
        assert layer.chunk_gate_retention is unilm.chunk_gate_retention
        assert layer.swiglu is unilm.swiglu and layer.apply_rotary_emb is unilm.apply_rotary_emb
        assert layer.flash_attn_func is unilm.flash_attn_func
        assert layer.RMSNorm is unilm.RMSNorm is rms_norm.RMSNorm
        decoder = importlib.import_module("official_decoder.yoco").SelfDecoder()
        assert decoder.block_size == 1  # no prompt is padded
        assert layer.ColumnParallelLinear(4, 6, bias=False, gather_output=False)(torch.zeros(2, 4)).shape == (2, 6)
    assert rms_norm.RMSNorm is original and decoder.block_size == 256
    assert "fairseq" not in sys.modules and "official_decoder.kernel.swiglu" not in sys.modules
    for name in [n for n in sys.modules if n.startswith("official_decoder")]:
        del sys.modules[name]


def test_uninstall_gives_modules_imported_meanwhile_the_official_functions(tmp_path, monkeypatch):
    files = OFFICIAL_STYLE | {"kernel/swiglu.py": "def swiglu(x, y): return 'official'"}
    files["ffn.py"] = "from .kernel.swiglu import swiglu"
    for name, text in files.items():
        path = tmp_path / "official_too" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    with unilm.installed("official_too", stub_parallel=True):
        ffn = importlib.import_module("official_too.ffn")
        layer = importlib.import_module("official_too.layer")
        assert ffn.swiglu is unilm.swiglu and layer.swiglu is unilm.swiglu
    assert ffn.swiglu(1, 2) == "official"
    assert "official_too.layer" not in sys.modules  # its Triton file cannot be imported: the next import will say so
    with pytest.raises(ImportError, match=r"needs triton|fairseq"):
        importlib.import_module("official_too.layer")
    for name in [n for n in sys.modules if n.startswith("official_too")]:
        del sys.modules[name]


def test_flash_attn_that_the_caller_installed_stays():
    from yoco_ext.compat import flash_attn

    with flash_attn.installed():
        with unilm.installed("no.such.package"):
            pass
        import flash_attn as served

        assert served.flash_attn_func is flash_attn.flash_attn_func
    assert getattr(sys.modules.get("flash_attn"), "flash_attn_func", None) is not flash_attn.flash_attn_func


def test_rms_norm_promotes_like_the_official_one():
    norm = unilm.RMSNorm(32)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    wide = x.float()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * norm.weight
    assert norm(x).dtype == expected.dtype == torch.float32
    torch.testing.assert_close(norm(x), expected, atol=0, rtol=2**-8)
    assert norm.bfloat16()(x).dtype == torch.bfloat16


# ---- the official files themselves ---------------------------------------------------------------------------------
needs_checkout = pytest.mark.skipif(
    not os.environ.get("UNILM_YOCO"), reason="UNILM_YOCO names no checkout of the official YOCO/yoco folder"
)


@pytest.fixture
def official(monkeypatch):
    """The official folder models/decoder as the package `official_yoco`, nothing of it imported yet."""
    package = types.ModuleType("official_yoco")
    package.__path__ = [os.path.join(os.environ["UNILM_YOCO"], "models", "decoder")]
    monkeypatch.setitem(sys.modules, "official_yoco", package)
    yield "official_yoco"
    for name in [n for n in sys.modules if n.startswith("official_yoco.")]:
        del sys.modules[name]


def build(window=None, checkpoint_activations=False):
    """With tables of 310 positions: a prompt padded to 256 or 512 tokens would not always fit."""
    yoco = importlib.import_module("official_yoco.yoco")
    arguments = yoco.YOCOArgs(64, 4, 128, 2, 4, 2, 100, max_batch_size=2, max_seq_len=310, sliding_window=window)
    return yoco.YOCO(arguments, checkpoint_activations)


@needs_checkout
@pytest.mark.parametrize("length", [20, 300])
@pytest.mark.parametrize("window", [None, 8])
def test_official_model_trains_prefills_and_decodes(official, window, length):
    with unilm.installed(official, stub_parallel=True):
        model = build(window)
        tokens = torch.randint(100, (2, length))
        logits, _ = model(tokens, is_prefilling=False)
        logits.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            memory: dict = {}
            prompt = length - 8
            first, _ = model(tokens[:, :prompt], incremental_state=memory, is_prefilling=True)
            torch.testing.assert_close(first, logits[:, :prompt], atol=1e-4, rtol=1e-4)
            later: dict = {}  # the same prompt in two pieces
            model(tokens[:, :5], incremental_state=later, is_prefilling=True)
            rest, _ = model(tokens[:, 5:prompt], start_pos=5, incremental_state=later, is_prefilling=True)
            torch.testing.assert_close(rest, logits[:, 5:prompt], atol=1e-4, rtol=1e-4)
            for t in range(prompt, length):
                step, _ = model(tokens[:, t : t + 1], start_pos=t, incremental_state=memory, is_prefilling=False)
                torch.testing.assert_close(step[:, 0], logits[:, t], atol=1e-4, rtol=1e-4)


@needs_checkout
def test_official_model_pads_nothing_while_installed(official, monkeypatch):
    lengths = []
    prefill = unilm.chunk_gate_retention
    monkeypatch.setattr(
        unilm,
        "chunk_gate_retention",
        lambda q, *rest, **options: lengths.append(q.shape[2]) or prefill(q, *rest, **options),
    )
    with unilm.installed(official, stub_parallel=True):
        model = build()
        model(torch.randint(100, (1, 7)), incremental_state={}, is_prefilling=True)
        decoder = model.self_decoder
        assert decoder.block_size == 1
    assert lengths == [7, 7] and decoder.block_size == 256
    with unilm.installed(official, stub_parallel=True):  # imported and built before
        assert decoder.block_size == 1


@needs_checkout
@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_official_model_agrees_with_the_reference_model(official, window, checkpoint_activations):
    """Logits and gradients of the official files on our kernels, and of our model in plain PyTorch, same weights."""
    with unilm.installed(official, stub_parallel=True):
        model = build(window, checkpoint_activations)
        mine = YOCOForCausalLM(YOCOConfig.from_official(vars(model.args)), "reference")
        load_state_dict(mine, model.state_dict())
        tokens = torch.randint(100, (2, 50))
        ours, theirs = mine(tokens), model(tokens, is_prefilling=False)[0]
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
        up = torch.randn_like(ours)
        for x in (ours, theirs):
            x.backward(up)
        expected = {name: p.grad for name, p in mine.named_parameters()}
        for name, p in model.named_parameters():
            scale = expected[name].abs().max()
            torch.testing.assert_close(p.grad / scale, expected[name] / scale, atol=1e-4, rtol=1e-3, msg=name)


@needs_checkout
def test_official_rounding_points_are_the_official_ones(official, monkeypatch):
    """parity="official" against the official functions themselves, in bfloat16; those that need no GPU, and the
    official naive recurrence in place of the Triton one."""
    pytest.importorskip("triton")
    code = importlib.import_module("official_yoco.kernel.gate_recurrent")
    q, k, v, g = (x.bfloat16() for x in inputs(64))
    sums = g.float().unflatten(2, (4, 16)).cumsum(-1)
    split = [x.unflatten(2, (4, 16)) for x in (q, k * 16**-0.5, v)]
    last = torch.randn(2, 3, 16, 24).bfloat16()
    decay = sums[..., -1].exp().bfloat16()
    update = split[1].transpose(-1, -2) @ split[2]
    inner = getattr(code.inner_chunk, "_torchdynamo_orig_callable", code.inner_chunk)
    monkeypatch.setattr(code, "inner_chunk", inner)
    with unilm.installed("no.such.package", parity="official"):
        assert torch.equal(unilm.naive_kv_recurrent(update, decay, last), code.naive_kv_recurrent(update, decay, last))
        monkeypatch.setattr(code, "chunk_gate_recurrent", unilm.chunk_gate_recurrent)
        assert torch.equal(unilm.cross_chunk(*split, sums, last), code.cross_chunk(*split, sums, last))
        for ours, theirs in (
            (unilm.chunk_gate_retention(q, k, v, g, 16, last), code.chunk_gate_retention(q, k, v, g, 16, last)),
            (unilm.parallel_gate_retention(q, k, v, g), code.parallel_gate_retention(q, k, v, g)),
        ):
            torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)
        ours, theirs = {}, {}
        for t in range(64):
            step = [x[:, :, t : t + 1] for x in (q, k, v, g)]
            a = unilm.recurrent_gate_retention(*step, ours)
            b = code.recurrent_gate_retention(step[0], step[1].clone(), step[2], step[3], theirs)
            assert torch.equal(a, b)
        assert torch.equal(ours["last_hidden_state"], theirs["last_hidden_state"])


@needs_checkout
def test_official_package_imports_where_fairseq_is_not_installed():
    """From the official folder, as its README starts it: models/__init__.py imports every model file."""
    code = """
        import sys
        from yoco_ext.compat import unilm
        unilm.install("models.decoder", stub_parallel=True)
        from models.decoder.yoco import YOCO, YOCOArgs
        import torch
        model = YOCO(YOCOArgs(64, 2, 128, 2, 4, 2, 100, max_batch_size=2, max_seq_len=256))
        assert model(torch.zeros(1, 7, dtype=torch.long))[0].shape == (1, 7, 100)
        from models.yoco import LanguageModel
        unilm.uninstall()
        assert "fairseq" not in sys.modules
    """
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["UNILM_YOCO"], *sys.path])}
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=where, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
