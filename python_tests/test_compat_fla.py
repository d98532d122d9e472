"""compat.fla: flash-linear-attention's functions and its YOCO model, unmodified, against plain PyTorch mathematics.

The model is judged by yoco_ext's reference model on the same weights in float64; functions by fla's own naive versions.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_rule, lengths_to_cu_seqlens, run_with_gradients
from torch import Tensor

from yoco_ext import YOCOConfig, YOCOForCausalLM
from yoco_ext.checkpoint import load_state_dict

# Found, not imported: collecting this file must not cost the seconds that importing fla takes.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None or importlib.util.find_spec("triton") is None,
    reason="flash-linear-attention 0.6.0 (requirements-compat.txt) or triton is not installed",
)
VOCAB = 61


@pytest.fixture
def fla() -> Iterator[ModuleType]:
    from yoco_ext.compat import fla as compat

    with compat.installed():
        yield importlib.import_module("fla")


def randoms(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def check(function, exact, tensors, wanted, *, length, **options) -> None:
    """function against exact(...) in float64, with exact in float32 as what plain PyTorch achieves; all gradients."""
    ours, our_gradients = run_with_gradients(function, tensors, options, upstream, wanted)
    wide = {name: x.double() if x is not None else None for name, x in tensors.items()}
    results = [run_with_gradients(exact, values, options, upstream, wanted) for values in (wide, tensors)]
    for i, (mine, *others) in enumerate(zip(ours, *(outputs for outputs, _ in results), strict=True)):
        assert_rule(f"output {i}", mine.detach(), *(x.detach() for x in others), length=length)
    assert our_gradients.keys() == set(wanted)
    for name in wanted:
        assert_rule(f"d{name}", our_gradients[name], *(found[name] for _, found in results), length=length)


def upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The same in every run: no randomness may differ between ours and theirs."""
    return [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]


# ---- simple GLA ------------------------------------------------------------------------------------------------------
def recurrence(q, k, v, g=None, g_gamma=None, initial_state=None, scale=None, state_v_first=False):
    """One token after the other, in the dtype of q -> o [B, T, H, Dv], final state."""
    dim = q.shape[-1]
    state = q.new_zeros(q.shape[0], q.shape[2], dim, v.shape[-1]) if initial_state is None else initial_state
    if initial_state is not None and state_v_first:
        state = state.transpose(-1, -2)
    decay = torch.zeros_like(q[..., 0]) if g is None else g
    decay = decay if g_gamma is None else g_gamma.expand(q.shape[:3])
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * (dim**-0.5 if scale is None else scale))
    return torch.stack(outputs, 1), state.transpose(-1, -2) if state_v_first else state


def gla_tensors(time: int) -> dict[str, Tensor]:
    q, k, v, g = randoms((2, time, 3, 16), (2, time, 3, 16), (2, time, 3, 24), (2, time, 3))
    return {"q": q, "k": k, "v": v, "g": F.logsigmoid(g) / 4}


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("name", ["chunk_simple_gla", "fused_recurrent_simple_gla"])
def test_simple_gla_with_states(fla, name, state_v_first):
    function = getattr(fla.ops.simple_gla, name)
    tensors = gla_tensors(70)
    tensors["initial_state"] = torch.randn(2, 3, *((24, 16) if state_v_first else (16, 24)))

    def ours(**arguments):
        return function(**arguments, output_final_state=True)

    check(ours, recurrence, tensors, list(tensors), length=70, state_v_first=state_v_first)


@pytest.mark.parametrize("name", ["chunk", "fused_recurrent", "fused_chunk", "parallel"])
def test_every_form_of_simple_gla(fla, name):
    function = getattr(fla.ops.simple_gla, f"{name}_simple_gla")
    tensors = gla_tensors(37)
    check(lambda **a: function(**a)[0], lambda **a: recurrence(**a)[0], tensors, list(tensors), length=37, scale=0.3)
    assert function(**tensors)[1] is None


def test_constant_and_missing_decay(fla):
    tensors = gla_tensors(20)
    del tensors["g"]
    chunk = fla.ops.simple_gla.chunk_simple_gla
    check(lambda **a: chunk(**a)[0], lambda **a: recurrence(**a)[0], tensors, list(tensors), length=20)
    tensors["g_gamma"] = torch.tensor([-0.5, -0.1, -0.01])
    check(lambda **a: chunk(**a)[0], lambda **a: recurrence(**a)[0], tensors, ["q", "k", "v"], length=20)


@pytest.mark.parametrize("name", ["chunk_simple_gla", "fused_recurrent_simple_gla"])
def test_packed_sequences_and_steps(fla, name):
    function = getattr(fla.ops.simple_gla, name)
    lengths = [1, 19, 0, 12]
    cu_seqlens = lengths_to_cu_seqlens(lengths).long()  # fla's are int64
    tensors = {key: x[:1] for key, x in gla_tensors(sum(lengths)).items()}
    state = torch.randn(len(lengths), 3, 24, 16)
    kept = state.clone()
    with torch.no_grad():
        o, final = function(
            **tensors, initial_state=state, output_final_state=True, state_v_first=True, cu_seqlens=cu_seqlens
        )
        for i, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            part = {key: x[:, begin:end] for key, x in tensors.items()}
            if begin < end:
                expected, expected_state = recurrence(**part, initial_state=state[i : i + 1], state_v_first=True)
                torch.testing.assert_close(o[:, begin:end], expected, atol=2e-5, rtol=1e-5)
                torch.testing.assert_close(final[i : i + 1], expected_state, atol=2e-5, rtol=1e-5)
            else:
                assert torch.equal(final[i], state[i])
        # Decoding: the state that was given away comes back, and is not changed by the step.
        step = {key: x[:, :1].repeat(len(lengths), *(1,) * (x.dim() - 1)) for key, x in tensors.items()}
        before = final.clone()
        o, following = function(**step, initial_state=final, output_final_state=True, state_v_first=True)
        expected, expected_state = recurrence(**step, initial_state=before, state_v_first=True)
    torch.testing.assert_close(o, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(following, expected_state, atol=2e-5, rtol=1e-5)
    assert torch.equal(final, before) and torch.equal(state, kept)
    assert following.dtype == torch.float32


# ---- attention -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 2, 9])
def test_parallel_attention(fla, window, sinks):
    from fla.ops.attn.naive import naive_parallel_attn
    from fla.ops.attn.parallel import parallel_attn

    q, k, v = randoms((2, 33, 6, 16), (2, 33, 2, 16), (2, 33, 2, 24))
    tensors = {"q": q, "k": k, "v": v}
    if sinks:
        tensors["sink_bias"] = torch.randn(6)
    check(parallel_attn, lambda **a: naive_parallel_attn(**a)[0], tensors, list(tensors), length=33, window_size=window)


def test_packed_parallel_attention(fla):
    from fla.ops.attn.naive import naive_parallel_attn
    from fla.ops.attn.parallel import parallel_attn

    cu_seqlens = lengths_to_cu_seqlens([5, 0, 21, 1]).long()
    tensors = dict(zip("qkv", randoms((1, 27, 4, 16), (1, 27, 2, 16), (1, 27, 2, 16)), strict=True))

    def each_alone(q, k, v):
        pieces = itertools.pairwise(cu_seqlens.tolist())
        return torch.cat([naive_parallel_attn(q[:, a:b], k[:, a:b], v[:, a:b])[0] for a, b in pieces if a < b], 1)

    check(lambda **a: parallel_attn(**a, cu_seqlens=cu_seqlens), each_alone, tensors, list("qkv"), length=21)


@pytest.mark.parametrize("window", [None, 0, 1, 4])
@pytest.mark.parametrize("lengths", [[7, 7, 7], [3, 0, 18]])
def test_decoding_of_one_token(fla, lengths, window):
    from fla.ops.attn.decoding import attn_decoding_one_step
    from fla.ops.attn.naive import naive_attn_decoding

    cu_seqlens = lengths_to_cu_seqlens(lengths)
    q, k, v, sinks = randoms((1, 3, 6, 16), (1, 21, 2, 16), (1, 21, 2, 24), (6,))
    for sink_bias in (None, sinks):
        options = {"cu_seqlens": cu_seqlens, "window_size": window, "sink_bias": sink_bias}
        expected = naive_attn_decoding(q, k, v, **options)
        torch.testing.assert_close(attn_decoding_one_step(q, k, v, **options), expected, atol=1e-5, rtol=1e-5)
    assert fla.layers.yoco.attn_decoding_one_step is attn_decoding_one_step


# ---- rotary, norms, activations --------------------------------------------------------------------------------------
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 4, [3, -5]], ids=str)
def test_rotary(fla, offsets, interleaved):
    from fla.modules.rotary import rotary_embedding
    from fla.modules.rotary.ops import rotary_embedding_ref

    angles = torch.outer(torch.arange(30.0), torch.rand(6))
    starts = torch.tensor(offsets) if isinstance(offsets, list) else torch.full((2,), offsets)
    positions = starts[:, None] + torch.arange(11)
    visible = (positions >= 0).float()[..., None]  # rows before the sequence (left padding) are zero

    def exact(x):
        cos, sin = (table(angles.to(x.dtype))[positions.clamp(min=0)] for table in (torch.cos, torch.sin))
        y = torch.cat([rotary_embedding_ref(x[b : b + 1], cos[b], sin[b], interleaved=interleaved) for b in range(2)])
        return torch.cat([y[..., :12] * visible[..., None].to(x.dtype), y[..., 12:]], -1)

    def ours(x):
        given = torch.tensor(offsets) if isinstance(offsets, list) else offsets
        return rotary_embedding(x, angles.cos(), angles.sin(), interleaved=interleaved, seqlen_offsets=given)

    check(ours, exact, {"x": torch.randn(2, 11, 3, 16)}, ["x"], length=1)


@pytest.mark.parametrize("offsets", [2, [2, -1, 5]], ids=str)
def test_packed_rotary(fla, offsets):
    from fla.modules.rotary import rotary_embedding

    cos, sin = torch.rand(2, 20, 8)
    x, cu_seqlens = torch.randn(1, 15, 2, 16), lengths_to_cu_seqlens([4, 1, 10]).long()
    given = torch.tensor(offsets) if isinstance(offsets, list) else offsets
    y = rotary_embedding(x, cos, sin, seqlen_offsets=given, cu_seqlens=cu_seqlens)
    for i, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        start = given[i : i + 1] if isinstance(offsets, list) else given
        alone = rotary_embedding(x[:, begin:end], cos, sin, seqlen_offsets=start)
        torch.testing.assert_close(y[:, begin:end], alone, atol=0, rtol=0)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(fla, residual, dtypes):
    norm = fla.modules.RMSNorm(48, eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x, r = torch.randn(2, 7, 48).to(dtypes[0]), torch.randn(2, 7, 48).to(dtypes[1])
    tensors = {"x": x, "weight": norm.weight.detach()} | ({"residual": r} if residual else {})

    def ours(x, weight, residual=None):
        return torch.func.functional_call(norm, {"weight": weight}, (x, residual, residual is not None))

    def exact(x, weight, residual=None):
        total = x if residual is None else x.to(residual.dtype) + residual
        y = F.rms_norm(total, (48,), weight.to(total.dtype), 1e-3).to(x.dtype)
        return y if residual is None else (y, total)

    check(ours, exact, tensors, list(tensors), length=48)


def test_gated_norm_and_swiglu(fla):
    norm = fla.modules.FusedRMSNormGated(16, elementwise_affine=False, eps=1e-3)
    tensors = dict(zip(("x", "g"), randoms((2, 9, 3, 16), (2, 9, 3, 16)), strict=True))
    check(norm, lambda x, g: F.rms_norm(x, (16,), None, 1e-3) * F.silu(g), tensors, ["x", "g"], length=16)
    activations = importlib.import_module("fla.modules.activations")
    tensors = dict(zip(("x", "y"), randoms((2, 9, 40), (2, 9, 40)), strict=True))
    check(lambda x, y: activations.swiglu(x, y), lambda x, y: F.silu(x) * y, tensors, ["x", "y"], length=1)
    tensors["weight"] = torch.randn(24, 40)
    check(
        lambda x, y, weight: activations.swiglu_linear(x, y, weight, None),
        lambda x, y, weight: F.linear(F.silu(x) * y, weight),
        tensors,
        list(tensors),
        length=40,
    )


# ---- cross entropy ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2, "logit_scale": 0.7, "lse_square_scale": 0.1}], ids=len
)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy_of_logits(fla, options, softcap):
    target = torch.randint(VOCAB, (13,))
    target[[2, 5]] = -100
    loss = fla.modules.FusedCrossEntropyLoss(**options, logit_softcapping=softcap)

    def exact(logits):
        z = logits * options.get("logit_scale", 1.0)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        regular = options.get("lse_square_scale", 0.0) * z.logsumexp(-1)[target != -100].square().mean()
        return F.cross_entropy(z, target, label_smoothing=options.get("label_smoothing", 0.0)) + regular

    check(
        lambda logits: loss(logits.clone(), target),
        exact,
        {"logits": 2 * torch.randn(13, VOCAB)},
        ["logits"],
        length=61,
    )


def test_cross_entropy_of_hidden_states(fla):
    target = torch.randint(VOCAB, (2, 19))
    target[0, :7] = -100
    loss = fla.modules.FusedLinearCrossEntropyLoss()
    tensors = dict(zip(("x", "weight"), randoms((2, 19, 16), (VOCAB, 16)), strict=True))
    check(
        lambda x, weight: 3 * loss(x, target, weight),
        lambda x, weight: 3 * F.cross_entropy((x @ weight.T).flatten(0, 1), target.flatten()),
        tensors,
        ["x", "weight"],
        length=61,
    )


# ---- the model -------------------------------------------------------------------------------------------------------
def make_models(fla: ModuleType, kind: str, fuse: bool = True, **options):
    """fla's model with random weights, and the reference model with the same in float32 and float64."""
    from fla.models.yoco import YOCOConfig as FlaConfig
    from fla.models.yoco import YOCOForCausalLM as FlaModel

    config = FlaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_self_decoder_layers=2,
        num_hidden_layers=4,
        vocab_size=VOCAB,
        fuse_norm=fuse,
        fuse_swiglu=fuse,
        fuse_cross_entropy=fuse,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        self_decoder_attn={"type": kind, "num_heads": 2, "window_size": 7 if kind == "swa" else None},
        cross_decoder_attn={"num_heads": 4, "num_kv_heads": 2},
        **options,
    )
    model = FlaModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.uniform_(0.5, 1.5)
            elif "gk_proj" in name:
                parameter.mul_(8)
            elif "_proj" in name:
                parameter.mul_(2)
    plain = YOCOForCausalLM(YOCOConfig.from_fla(config.to_dict()), ops="reference")
    load_state_dict(plain, model.state_dict())
    exact = YOCOForCausalLM(plain.config, ops="reference").double()
    exact.load_state_dict(plain.state_dict())
    return model, plain, exact


KINDS = pytest.mark.parametrize("kind", ["gated_retention", "swa"])


@KINDS
@pytest.mark.parametrize("fuse", [True, False])
def test_logits_loss_and_gradients(fla, kind, fuse):
    from yoco_ext.checkpoint import to_fla

    model, plain, exact = make_models(fla, kind, fuse)
    ids = torch.randint(1, VOCAB, (2, 41))
    targets = ids.clone()
    targets[0, :9] = -100
    assert_rule("logits", model(ids).logits, exact(ids), plain(ids), length=41)
    for mode in (True, False):  # fla has one loss for training and one for evaluation
        model.train(mode).zero_grad()
        loss = model(ids, labels=targets).loss
        loss.backward()
        losses = []
        for other in (exact, plain):
            other.zero_grad()
            losses.append(other(ids[:, :-1], targets=targets[:, 1:]))
            losses[-1].backward()
        assert_rule("loss", loss.detach(), *(x.detach() for x in losses), length=41)
        found = {name: p.grad for name, p in model.named_parameters()}
        wanted = [to_fla({name: p.grad for name, p in other.named_parameters()}) for other in (exact, plain)]
        assert found.keys() == wanted[0].keys()
        for name, gradient in found.items():
            assert_rule(f"gradient of {name}", gradient, wanted[0][name], wanted[1][name], length=82)


@KINDS
def test_packed_training_equals_one_sequence_after_the_other(fla, kind):
    model, plain, exact = make_models(fla, kind)
    lengths = [5, 23, 1, 12]
    cu_seqlens, ids = lengths_to_cu_seqlens(lengths), torch.randint(1, VOCAB, (1, sum(lengths)))
    packed = [other(ids, cu_seqlens=cu_seqlens, max_seqlen=23) for other in (exact, plain)]
    assert_rule("logits", model(ids, cu_seqlens=cu_seqlens.long()).logits, *packed, length=23)


@KINDS
def test_cached_decode_equals_the_full_forward(fla, kind):
    model, plain, exact = make_models(fla, kind)
    ids = torch.randint(1, VOCAB, (2, 30))
    with torch.no_grad():
        expected, reachable = exact(ids), plain(ids)
        out = model(ids[:, :20], use_cache=True)
        assert_rule("prefill", out.logits, expected[:, :20], reachable[:, :20], length=20)
        for t in range(20, 30):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            assert_rule(f"step {t}", out.logits, expected[:, t : t + 1], reachable[:, t : t + 1], length=30)


@KINDS
def test_generation(fla, kind):
    model, _, exact = make_models(fla, kind)
    ids = torch.randint(1, VOCAB, (2, 19))
    expected = torch.tensor(exact.generate(ids, 12))
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False)[:, 19:], expected)


@KINDS
def test_generation_with_left_padding(fla, kind):
    model, _, exact = make_models(fla, kind)
    prompts = [torch.randint(1, VOCAB, (n,)).tolist() for n in (19, 4, 11)]
    padded = torch.tensor([[0] * (19 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (19 - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, 19:]
    assert out.tolist() == exact.generate(prompts, 12)


def test_training_with_checkpointing_and_autocast(fla):
    model, _, _ = make_models(fla, "gated_retention")
    model.train().gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(1, VOCAB, (2, 24))
    losses = []
    for _ in range(15):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


# ---- what is left to fla, and the way back ---------------------------------------------------------------------------
def test_unsupported_arguments_fall_back_with_one_line(fla, monkeypatch, caplog):
    from fla.ops.attn.decoding import attn_decoding_one_step

    from yoco_ext.compat import _fla_kernels
    from yoco_ext.compat import fla as compat

    _fla_kernels._logged.clear()
    recurrent = importlib.import_module("fla.ops.simple_gla.fused_recurrent")
    monkeypatch.setattr(recurrent, "fused_recurrent", lambda **_: ("fla's own", None))
    tensors = gla_tensors(5)
    with caplog.at_level(logging.WARNING, logger="yoco_ext.compat.fla"):
        for _ in range(3):
            assert recurrent.fused_recurrent_simple_gla(**tensors, reverse=True)[0] == "fla's own"
        assert [record.getMessage() for record in caplog.records] == [
            "fused_recurrent_simple_gla: left to flash-linear-attention, because reverse is not supported by yoco_ext"
        ]
        caplog.clear()
        original = []
        replaced = compat._make_decode(lambda *a, **k: original.append((a, k)))
        arguments = randoms((1, 1, 2, 16), (1, 4, 2, 16), (1, 4, 2, 16), (1, 4, 2))
        for _ in range(2):
            replaced(*arguments, cu_seqlens=lengths_to_cu_seqlens([4]))
        assert len(original) == 2 and len(caplog.records) == 1
        caplog.clear()
        shim = compat._ChunkSimpleGLA(type("Fla", (), {"apply": staticmethod(lambda *a: "fla's own")}))
        odd = torch.randn(1, 3, 2, 20)  # 20 is no multiple of 8
        for _ in range(2):
            assert shim.apply(odd, odd, odd, *(None,) * 4, False, False, None, None) == "fla's own"
        assert len(caplog.records) == 1 and "head dimension 20" in caplog.text
    assert attn_decoding_one_step.__module__ == "yoco_ext.compat.fla"


def test_uninstall_gives_everything_back():
    from yoco_ext.compat import fla as compat

    compat._import_fla()
    places = [
        ("fla.ops.simple_gla.chunk", "ChunkSimpleGLAFunction"),
        ("fla.ops.attn.decoding", "attn_decoding_one_step"),
        ("fla.layers.yoco", "attn_decoding_one_step"),
        ("fla.layers.attn", "flash_attn_func"),
        ("fla.layers.attn", "flash_attn_varlen_func"),
    ]

    def current() -> list[object]:
        loss = importlib.import_module("fla.modules.fused_cross_entropy.ops").FusedCrossEntropyLoss.forward
        return [getattr(importlib.import_module(m), name, "absent") for m, name in places] + [loss]

    before = current()
    with compat.installed():
        assert all(a is not b for a, b in zip(current(), before))
        with compat.installed():
            pass
        assert all(a is not b for a, b in zip(current(), before)), "the inner with block took the outer one's kernels"
        compat.install()  # twice is once
    assert all(a is b for a, b in zip(current(), before))
    backends = importlib.import_module("fla.backends")
    kernels = backends._operation_registries["attn"]._backends["yoco_ext"]
    assert not kernels.is_enabled()


def test_errors_name_what_is_missing(monkeypatch):
    from yoco_ext.compat import fla as compat

    package = compat._import_fla()
    monkeypatch.setattr(package, "__version__", "0.7.0")
    with pytest.raises(ImportError, match=r"knows flash-linear-attention 0\.6, found 0\.7\.0"):
        compat.install()
    monkeypatch.undo()
    monkeypatch.setattr(importlib.import_module("fla.backends"), "_DISPATCH_DISABLED", True)
    with pytest.raises(RuntimeError, match="unset FLA_DISABLE_BACKEND_DISPATCH"):
        compat.install()
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "fla", None)
    with pytest.raises(ImportError, match=r"pip install 'yoco_ext\[fla\]'"):
        compat.install()
