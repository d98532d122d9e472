"""SharedKV: K and V computed once, attended to by every layer of the cross-decoder.

Left to autograd, L/2 layers would each write a full dK and dV, and L/2 - 1 additions would sum them in low precision.
Here one float32 accumulator travels through the backward instead. Two "tokens" thread the layers together in the order
in which they were called: a token is a float32 tensor of K's (or V's) shape with all strides zero, so it occupies four
bytes, and its only purpose is that autograd carries a gradient of that shape along it. In the backward

    last layer: no gradient for its outgoing tokens -> fresh zeros; adds its dK, dV; passes them on as the gradient of
    its incoming tokens -> next layer adds in place -> ... -> SharedKV rounds the sum to the dtype of K and V, once.

The chain is ordinary data flow: autograd orders it, compile traces it, a second backward starts from fresh zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yoco_ext.ops._common import autocast


class _Root(torch.autograd.Function):
    """K, V -> the tokens of the first layer; the accumulated gradient -> dK, dV in the dtype of K and V."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ctx.dtype = k.dtype
        ctx.set_materialize_grads(False)
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        return k.new_zeros(1, dtype=dtype).expand(k.shape), v.new_zeros(1, dtype=dtype).expand(v.shape)

    @staticmethod
    def backward(ctx: Any, dk: Tensor | None, dv: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return None if dk is None else dk.to(ctx.dtype), None if dv is None else dv.to(ctx.dtype)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class SharedKV:
    """The one K/V cache of a YOCO model: k [B, Tk, Hkv, Dqk] and v [B, Tk, Hkv, Dv] with what describes them.

        shared = SharedKV(k, v)
        for layer in cross_layers:
            x = x + layer(x, shared)  # cross_attention(q, shared) inside

    Under autograd the gradients of all layers for k and v add into one float32 accumulator (see this module's
    docstring); the result equals autograd's own sum of the layers' gradients, with one rounding at the end. Works
    under torch.utils.checkpoint (see `tensors` for use_reentrant=True), torch.compile and repeated backward; k and v
    may also be used directly. Make one per forward pass, from that pass's k and v. The layers hang together: several
    losses over one SharedKV need one backward, or retain_graph=True in all but the last.

    cu_seqlens: int32 [N + 1] of packed sequences (B = 1), used for queries and keys alike unless a call overrides it.
    seqused_k: int32 [sequences], keys really there.
    """

    def __init__(
        self, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, seqused_k: Tensor | None = None
    ) -> None:
        self.k, self.v = autocast(k, v)
        self.cu_seqlens = cu_seqlens
        self.seqused_k = seqused_k
        self.tokens: tuple[Tensor, Tensor] | None = None
        if torch.is_grad_enabled() and (self.k.requires_grad or self.v.requires_grad):
            self.tokens = _Root.apply(self.k, self.v)

    def options(self) -> dict[str, Tensor]:
        """What every attention over this K/V is told about it."""
        found: dict[str, Tensor] = {}
        if self.cu_seqlens is not None:
            found["cu_seqlens_q"] = found["cu_seqlens_k"] = self.cu_seqlens
        if self.seqused_k is not None:
            found["seqused_k"] = self.seqused_k
        return found

    def incoming(self) -> tuple[Tensor, Tensor] | None:
        """The tokens for the next layer; None when no gradient goes to K and V."""
        if not torch.is_grad_enabled():
            return None
        if self.tokens is None or torch.compiler.is_compiling():
            return self.tokens
        # A backward has been through the chain and freed it: what comes now is another pass.
        if getattr(self.tokens[0].grad_fn, "spent", False) and not _in_backward():
            self.tokens = _Root.apply(self.k, self.v)
        return self.tokens

    def advance(self, following: Any) -> None:
        """The next layer hangs behind the one that has just returned these tokens."""
        # A checkpoint that recomputes a layer builds a graph nobody keeps: nothing may hang on that.
        if torch.compiler.is_compiling() or not _in_backward():
            self.tokens = (following[0], following[1])

    @property
    def time(self) -> int:
        """Number of keys."""
        return self.k.shape[1]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything this object is made of, for checkpoints that must see it all as tensors: with use_reentrant=True,
        or inside torch.compile(fullgraph=True).

            def layer(x, *tensors):
                shared = SharedKV.from_tensors(*tensors)
                return x + cross_layer(x, shared), *shared.tensors()

            x, *tensors = checkpoint(layer, x, *tensors, use_reentrant=...)
        """
        token_k, token_v = (None, None) if self.tokens is None else self.tokens
        return self.k, self.v, self.cu_seqlens, self.seqused_k, token_k, token_v

    @classmethod
    def from_tensors(
        cls,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None = None,
        seqused_k: Tensor | None = None,
        token_k: Tensor | None = None,
        token_v: Tensor | None = None,
    ) -> SharedKV:
        """The object that `tensors` took apart, at the same place of the chain."""
        shared = cls.__new__(cls)
        shared.k, shared.v, shared.cu_seqlens, shared.seqused_k = k, v, cu_seqlens, seqused_k
        shared.tokens = None if token_k is None or token_v is None else (token_k, token_v)
        return shared
