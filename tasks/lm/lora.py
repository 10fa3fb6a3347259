"""LoRA's layer, y = x Wᵀ + s (x Aᵀ) Bᵀ (Hu et al. 2021, arXiv 2106.09685, equation 3).

A and B are thin, so that the adapter costs time by what is read and written and not by its arithmetic. Left to
autograd, it makes three more tensors of the size of y, and its gradients multiply thin matrices in the order
that a CPU's kernels are slowest at. `LowRankUpdate` adds to y in place, and takes the same products transposed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LowRankUpdate(torch.autograd.Function):
    """y `[..., O]` of x `[..., I]`, a frozen weight W `[O, I]`, a bias or none, A `[R, I]` and B `[O, R]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        inner = F.linear(x, a)
        y = F.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(inner.flatten(0, -2), b.T, alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        grad_y = grad.flatten(0, -2)
        grad_inner = (b.T @ grad_y.T).mul_(ctx.scaling)
        grad_a = grad_inner @ x.flatten(0, -2)
        grad_b = (inner.flatten(0, -2).T @ grad_y).mul_(ctx.scaling).T
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ weight).addmm_(grad_inner.T, a).view(x.shape)
        return grad_x, None, None, grad_a, grad_b, None


class LoraLinear(Linear):  # type: ignore[misc]
    """PEFT's layer, by way of `LowRankUpdate` where that is all there is to do."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The layer's output `[..., O]` of x `[..., I]`."""
        adapter = self._only_adapter(x)
        if adapter is None or args or options:
            other: Tensor = super().forward(x, *args, **options)
            return other
        base, a, b = self.base_layer, self.lora_A[adapter], self.lora_B[adapter]
        y: Tensor = LowRankUpdate.apply(x, base.weight, base.bias, a.weight, b.weight, self.scaling[adapter])  # type: ignore[no-untyped-call]
        return y

    def _only_adapter(self, x: Tensor) -> str | None:
        """The one adapter that counts now; None where there are more or none, or there is more to do."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        adapter: str = self.active_adapters[0]
        if adapter not in self.lora_A or adapter in self.lora_variant or self.lora_B[adapter].bias is not None:
            return None
        dropout = self.lora_dropout[adapter]
        if dropout.training and not isinstance(dropout, nn.Identity):
            return None
        if any(parameter.requires_grad for parameter in self.base_layer.parameters()):
            return None
        weights = (self.base_layer.weight, self.lora_A[adapter].weight, self.lora_B[adapter].weight)
        whole = all(weight.ndim == 2 for weight in weights)  # DeepSpeed's ZeRO-3 has parts of them
        alike = all(weight.dtype == x.dtype for weight in weights)
        return adapter if whole and alike and not torch.is_autocast_enabled(x.device.type) else None
