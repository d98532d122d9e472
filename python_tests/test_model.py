"""YOCOForCausalLM: the paper's equations, fused = reference, training features."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from numerics import rms
from tiny import SELF_DECODERS, VOCAB, tiny_config, tiny_model, tokens
from torch import Tensor

import yoco_ext.model
from yoco_ext import YOCOForCausalLM
from yoco_ext.config import ROPE_STYLES
from yoco_ext.nn import RotaryEmbedding

both_ops = pytest.mark.parametrize("ops", ["fused", "reference"])
both_decoders = pytest.mark.parametrize("self_decoder", SELF_DECODERS)


# ---- against the equations of the paper, written down once more -------------------------------------


def _norm(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rope(x: Tensor, style: str, theta: float) -> Tensor:
    """As a multiplication of complex numbers; x [B, T, H, D]."""
    half = x.shape[-1] // 2
    exponent = torch.linspace(0, 1, half).double() if style == "official" else torch.arange(half).double() / half
    if style == "none":
        return x
    angle = torch.arange(x.shape[1]).double()[:, None, None] / (theta**exponent).float().double()
    pairs = x.unflatten(-1, (2, half)).mT if style == "standard" else x.unflatten(-1, (half, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle))
    return turned.mT.flatten(-2) if style == "standard" else turned.flatten(-2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    time, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    distance = torch.arange(time)[:, None] - torch.arange(time)
    seen = (distance >= 0) & (distance < (window or time))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def paper_logits(model: YOCOForCausalLM, ids: Tensor) -> Tensor:
    """Section 2 of the paper in float64, token by token where it is recurrent; nothing of yoco_ext runs here."""
    config, weights = model.config, {name: p.detach().double() for name, p in model.state_dict().items()}
    eps = config.norm_eps

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[name + ".weight"].T

    def heads(x: Tensor, dim: int) -> Tensor:
        return x.unflatten(-1, (-1, dim))

    def feed_forward(x: Tensor, name: str) -> Tensor:
        y = _norm(x, weights[name + ".final_layer_norm.weight"], eps)
        gate, up = linear(y, name + ".ffn.fc1"), linear(y, name + ".ffn.gate")
        return x + linear(gate * gate.sigmoid() * up, name + ".ffn.fc2")

    x = weights["embed_tokens.weight"][ids] * math.sqrt(config.hidden_size)
    for i in range(config.num_self_layers):
        name, dim = f"self_decoder.layers.{i}", config.self_head_dim
        y = _norm(x, weights[name + ".mixer_layer_norm.weight"], eps)
        q, k, v = (heads(linear(y, f"{name}.mixer.{p}_proj"), dim) for p in "qkv")
        q, k = (_rope(t, config.self_rope, config.rope_theta) for t in (q, k))
        if config.self_decoder == "gated_retention":
            gamma = linear(y, name + ".mixer.gt_proj").sigmoid() ** (1 / config.gate_logit_normalizer)
            state, outputs = torch.zeros(*q[:, 0].shape, dim, dtype=torch.float64), []
            for t in range(q.shape[1]):
                state = gamma[:, t, :, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
                outputs.append((q[:, t, :, None] @ state)[:, :, 0] / math.sqrt(dim))
            gate = linear(y, name + ".mixer.g_proj")
            o = _norm(torch.stack(outputs, 1), 1.0, eps).flatten(2) * gate * gate.sigmoid()
        else:
            o = _softmax_attention(q, k, v, config.window_size).flatten(2)
        x = feed_forward(x + linear(o, name + ".mixer.out_proj"), name)
    y, dim = _norm(x, weights["cross_decoder.kv_layer_norm.weight"], eps), config.head_dim
    k = _rope(heads(linear(y, "cross_decoder.k_proj"), dim), config.cross_rope, config.rope_theta)
    v = heads(linear(y, "cross_decoder.v_proj"), dim)
    for i in range(config.num_cross_layers):
        name = f"cross_decoder.layers.{i}"
        y = _norm(x, weights[name + ".mixer_layer_norm.weight"], eps)
        q = _rope(heads(linear(y, name + ".mixer.q_proj"), dim), config.cross_rope, config.rope_theta)
        o = _softmax_attention(q, k, v, None).flatten(2)
        x = feed_forward(x + linear(o, name + ".mixer.out_proj"), name)
    return linear(_norm(x, weights["layer_norm.weight"], eps), "output_projection")


@both_ops
@both_decoders
@pytest.mark.parametrize("rope", ROPE_STYLES)
def test_logits_are_the_papers(ops: str, self_decoder: str, rope: str) -> None:
    model = tiny_model(self_decoder, ops, torch.float64, self_rope=rope, cross_rope=rope)
    ids = tokens(2, 19)
    expected = paper_logits(model, ids)
    # float32 angles and their sine are what limits this.
    assert rms(model(ids) - expected) < 2e-6 * rms(expected)


def test_official_rope_has_its_end_point() -> None:
    official, standard = (RotaryEmbedding(128, style=s, ops="reference").inv_freq for s in ("official", "standard"))
    assert official[-1].item() == pytest.approx(1e-4) and official[0] == standard[0] == 1
    assert standard[-1] / official[-1] == pytest.approx(1.155, abs=1e-3)  # 13.4 % the other way round


# ---- fused = reference ------------------------------------------------------------------------------


@both_decoders
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_step_of_fused_is_that_of_reference(self_decoder: str, dtype: torch.dtype) -> None:
    ids, targets = tokens(2, 70), tokens(2, 70)
    exact = tiny_model(self_decoder, "reference", torch.float64)
    gradients: dict[str, dict[str, Tensor]] = {}
    for label, ops, kind in (
        ("exact", "reference", torch.float64),
        ("plain", "reference", dtype),
        ("ours", "fused", dtype),
    ):
        model = YOCOForCausalLM(exact.config, ops).double()
        model.load_state_dict(exact.state_dict())
        model.to(kind)
        model(ids, targets=targets).backward()
        gradients[label] = {name: p.grad.double() for name, p in model.named_parameters()}
    for name, expected in gradients["exact"].items():
        ours, plain = (rms(gradients[label][name] - expected) / rms(expected) for label in ("ours", "plain"))
        # A gradient passes through the roundings of the whole model, so the two scatter; the factor covers it.
        assert ours <= max(3 * plain, {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.0}[dtype]), name


@both_decoders
def test_both_have_the_same_state_dict(self_decoder: str) -> None:
    fused, reference = (tiny_model(self_decoder, ops).state_dict() for ops in ("fused", "reference"))
    assert {n: t.shape for n, t in fused.items()} == {n: t.shape for n, t in reference.items()}


# ---- what a language model must do ------------------------------------------------------------------


@both_ops
@both_decoders
def test_no_token_sees_the_future(ops: str, self_decoder: str) -> None:
    model = tiny_model(self_decoder, ops)
    ids = tokens(1, 40)
    other = ids.clone()
    other[:, 25:] = tokens(1, 15)
    assert torch.equal(model(ids)[:, :25], model(other)[:, :25])


@both_ops
@both_decoders
def test_packed_sequences_do_not_see_each_other(ops: str, self_decoder: str) -> None:
    model = tiny_model(self_decoder, ops, torch.float64)
    lengths = [9, 0, 23, 1]
    ids = tokens(1, sum(lengths))
    cu_seqlens = torch.tensor([0, 9, 9, 32, 33], dtype=torch.int32)
    packed = model(ids, cu_seqlens=cu_seqlens, max_seqlen=23)
    alone = torch.cat([model(piece) for piece in ids.split(lengths, 1) if piece.numel()], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)


@both_ops
@both_decoders
def test_activation_checkpointing_changes_no_gradient(ops: str, self_decoder: str) -> None:
    model = tiny_model(self_decoder, ops)
    ids, found = tokens(2, 30), []
    for enabled in (False, True):
        model.checkpoint_activations(enabled)
        model.zero_grad()
        model(ids, targets=ids).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@both_ops
def test_loss_in_pieces_is_the_loss(ops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(ops=ops, dtype=torch.float64)
    ids, targets = tokens(2, 30), tokens(2, 30)
    targets[0, :7] = -100
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    for chunk in (1 << 26, 11 * VOCAB):
        monkeypatch.setattr(yoco_ext.model, "_LOSS_CHUNK", chunk)
        loss = model(ids, targets=targets)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), expected_gradients)


@both_ops
@both_decoders
def test_autocast_keeps_parameters_and_residual_in_float32(ops: str, self_decoder: str) -> None:
    model = tiny_model(self_decoder, ops)
    ids = tokens(2, 33)
    exact = model(ids)
    kinds = {}
    model.self_decoder.layers[1].register_forward_hook(lambda *a: kinds.update(residual=a[-1].dtype))
    model.cross_decoder.k_proj.register_forward_hook(lambda *a: kinds.update(k=a[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(ids), model(ids, targets=ids)
    loss.backward()
    assert kinds == {"residual": torch.float32, "k": torch.bfloat16}
    assert 0 < rms(logits - exact) < 0.05 * rms(exact)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@both_decoders
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_without_a_graph_break(self_decoder: str, checkpointing: bool) -> None:
    torch._dynamo.reset()
    model = tiny_model(self_decoder, "fused", torch.float64)
    model.checkpoint_activations(checkpointing)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = tokens(2, 24)
    losses = [function(ids, targets=ids) for function in (model, compiled)]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_tied_embeddings_are_one_matrix() -> None:
    model = tiny_model(tie_embeddings=True)
    assert model.output_projection.weight is model.embed_tokens.weight
    assert model.to(torch.float64).output_projection.weight is model.embed_tokens.weight


def test_frequencies_survive_casts_copies_and_late_allocation() -> None:
    model = tiny_model(ops="reference")
    expected = model.cross_decoder.rotary.inv_freq.clone()
    assert torch.equal(model.to(torch.bfloat16).cross_decoder.rotary.inv_freq, expected)
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(model), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).cross_decoder.rotary.inv_freq, expected)
    with torch.device("meta"):
        late = YOCOForCausalLM(tiny_config(), "reference")
    assert torch.equal(late.to_empty(device="cpu").cross_decoder.rotary.inv_freq, expected)


def test_unknown_ops_are_refused() -> None:
    with pytest.raises(ValueError, match="ops must be one of fused, reference, got 'triton'"):
        YOCOForCausalLM(tiny_config(), "triton")


@pytest.mark.parametrize("ops", ["fused", "reference"])
def test_wrong_tokens_and_targets_are_named(ops: str) -> None:
    model, ids = tiny_model(ops=ops), tokens(2, 5)
    for call, message in (
        (lambda: model(ids[None]), r"input_ids must be \[batch, time\] of int64 or int32, got torch.int64 \[1, 2, 5\]"),
        (lambda: model(ids.float()), r"got torch.float32 \[2, 5\]"),
        (lambda: model(ids, targets=ids[:, 1:]), r"targets must have the shape of input_ids \[2, 5\], got \[2, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
