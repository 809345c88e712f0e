"""Linear layers by oneDNN, for training in float32 on a CPU.

torch multiplies float32 matrices by MKL, which does not use AVX-512 on the CPUs of other makers than Intel.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def pays() -> bool:
    """Return whether this CPU has AVX-512 that MKL leaves unused."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "GenuineIntel" not in cpu.read_text()


def use_onednn(model: nn.Module) -> None:
    """Have every Linear of a float32 model on the CPU computed by oneDNN, forward and backward."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]  # nn.Module lets one do so


def _forward(module: nn.Linear, x: Tensor) -> Tensor:  # [..., in] to [..., out]
    return _Linear.apply(x, module.weight, module.bias)


class _Linear(torch.autograd.Function):
    """x wᵀ + b and its gradients, each product one call of oneDNN. x: [..., in]; weight: [out, in]; bias: [out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)  # [N, in], [N, out]
        of_bias = grads.sum(0) if ctx.needs_input_grad[2] else None
        return _product(grad, weight.t()), _product(grads.t(), rows.t()), of_bias  # [..., in], [out, in], [out]


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a bᵀ + bias: [..., k] and [n, k] to [..., n]. torch.compile calls it; there is no public name for it."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
