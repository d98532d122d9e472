"""What flash-linear-attention 0.6 does well except for CPU tensors: plain PyTorch, for these only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import yoco_ext


class PlainOnCPU:
    """Dispatch points of fla with their verifiers, as in _fla_kernels.Kernels."""

    @staticmethod
    def _only_cpu(x: Tensor) -> tuple[bool, str]:
        return x.device.type == "cpu", "fla's own serves this device"

    def swiglu_linear_verifier(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, str]:
        return self._only_cpu(x)

    def swiglu_linear(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(yoco_ext.swiglu(x, y), weight, bias)  # fla's own knows autocast on a GPU only

    def cross_entropy_fwd_verifier(self, logits: Tensor, *_: Any, **options: Any) -> tuple[bool, str]:
        if options.get("process_group") is not None:
            return False, "a vocabulary over several processes"
        return self._only_cpu(logits)

    def cross_entropy_fwd(
        self,
        logits: Tensor,
        target: Tensor,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        logit_softcapping: float | None = None,
        ignore_index: int = -100,
        process_group: None = None,
    ) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """logits [N, V], target [N] -> loss, z-loss and lse, float32 [N], V, first class."""
        z = _final_logits(logits, logit_scale, logit_softcapping)
        lse, kept = z.logsumexp(-1), target != ignore_index
        picked = z.gather(-1, target.where(kept, 0)[:, None])[:, 0]
        z_loss = (lse_square_scale * lse.square()).where(kept, 0)
        loss = (lse - (1 - label_smoothing) * picked - label_smoothing * z.mean(-1)).where(kept, 0)
        return loss + z_loss, z_loss, lse, logits.shape[-1], 0

    def cross_entropy_bwd_verifier(self, logits: Tensor, *_: Any, **__: Any) -> tuple[bool, str]:
        return self._only_cpu(logits)

    def cross_entropy_bwd(
        self,
        logits: Tensor,
        target: Tensor,
        lse: Tensor,
        dloss: Tensor,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        logit_softcapping: float | None = None,
        ignore_index: int = -100,
        total_classes: int | None = None,
        class_start_idx: int = 0,
        inplace_backward: bool = False,
    ) -> Tensor:
        z = _final_logits(logits, logit_scale, logit_softcapping)
        kept = target != ignore_index
        dz = (z - lse[:, None]).exp() * (1 + 2 * lse_square_scale * lse)[:, None]
        dz -= label_smoothing / logits.shape[-1]
        dz.scatter_add_(-1, target.where(kept, 0)[:, None], dz.new_full((len(dz), 1), label_smoothing - 1))
        if logit_softcapping is not None:
            dz *= 1 - (z / logit_softcapping).square()
        dz = (dz * (dloss * logit_scale)[:, None]).where(kept[:, None], 0)
        return logits.copy_(dz) if inplace_backward else dz.to(logits.dtype)

    def fused_linear_cross_entropy_bwd_verifier(self, do: Tensor, dx: Tensor, *_: Any, **__: Any) -> tuple[bool, str]:
        return self._only_cpu(dx)

    def fused_linear_cross_entropy_bwd(
        self, do: Tensor, dx: Tensor, dw: Tensor | None, db: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return tuple(None if d is None else d * do.to(d.dtype) for d in (dx, dw, db))


def _final_logits(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def make_cross_entropy_forward(original: Any, cross_entropy_loss: Any) -> Any:
    def forward(self: nn.Module, input: Tensor, target: Tensor) -> Any:
        """fla's FusedCrossEntropyLoss without its refusal of CPU tensors."""
        if input.device.type != "cpu":
            return original(self, input, target)
        losses = cross_entropy_loss(
            logits=input,
            target=target,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            logit_softcapping=self.logit_softcapping,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )
        if self.reduction != "none":
            losses = [loss.sum() for loss in losses]
        if self.reduction == "mean":
            losses = [loss / (target != self.ignore_index).sum() for loss in losses]
        return tuple(losses) if self.return_z_loss else losses[0]

    return forward
