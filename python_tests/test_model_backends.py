"""The whole model on each back end: loss, gradients, prefill and decode against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from numerics import rms
from tiny import SELF_DECODERS, tiny_model, tokens

from yoco_ext import YOCOForCausalLM

both_decoders = pytest.mark.parametrize("self_decoder", SELF_DECODERS)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def models(backend: Backend, self_decoder: str, dtype: torch.dtype) -> tuple[YOCOForCausalLM, ...]:
    """The same weights three times: fused on the back end, plain PyTorch beside it, the reference in float64."""
    exact = tiny_model(self_decoder, "reference", torch.float64, hidden_size=256, window_size=33)
    twins = [YOCOForCausalLM(exact.config, ops) for ops in ("fused", "reference")]
    for twin in twins:
        twin.load_state_dict(exact.state_dict())
        twin.to(backend.device, dtype)
    return *twins, exact.to(backend.device)


def no_worse(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    error, limit = rms(ours.double() - exact), rms(plain.double() - exact)
    # Errors pass through the whole model and scatter: 3x, and a floor for what is nearly exact in both.
    assert error <= 3 * limit + 1e-6 * rms(exact), f"{name}: error {error:.2e}, plain PyTorch {limit:.2e}"


@pytest.mark.backends("cpu", "cuda")
@both_decoders
@dtypes
def test_training_step(backend: Backend, self_decoder: str, dtype: torch.dtype) -> None:
    found = models(backend, self_decoder, dtype)
    ids = tokens(2, 150, device=backend.device)
    losses = [model(ids[:, :-1], targets=ids[:, 1:]) for model in found]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss, model in zip(losses, found, strict=True)]
    names = [name for name, _ in found[0].named_parameters()]
    for name, ours, plain, exact in zip(names, *gradients, strict=True):
        no_worse(ours, plain, exact, name)


@pytest.mark.backends("cpu", "cuda")
@both_decoders
@dtypes
def test_prefill_and_decode(backend: Backend, self_decoder: str, dtype: torch.dtype) -> None:
    ids = tokens(2, 120, device=backend.device)
    logits = []
    for model in models(backend, self_decoder, dtype):
        cache = model.new_cache(2, 128)
        pieces = [model.prefill(ids[:, :100], cache, lengths=[100, 61], chunk_size=64)[:, None]]
        pieces += [model.decode(ids[:, i : i + 1], cache) for i in range(100, 110)]
        pieces += [model.decode(ids[:, 110:], cache)]
        logits.append(torch.cat(pieces, 1))
    no_worse(*logits, "logits")
