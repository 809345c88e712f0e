"""Kernels for each kind of target: one family a file."""

from typing import Protocol

import numpy as np
import tvm

from tvm_frontend.target import CompileTarget
from tvm_frontend.tvm_patches import patch_macro_lookup

# What products are computed in, by kind of target; the first is what a target is compiled for by default.
CPU_PRECISIONS = {
    "fp32": "float32",
    "bf16": "weights and inputs of linear layers and the KV cache rounded to bfloat16, sums in float32; of attention "
    "too, here and below, where the CPU has instructions for it",
    "int8": "weights of linear layers int8 by column, their inputs int8 by row as they come, sums in int32; "
    "the KV cache int8 by row of a head",
    "int4": "weights of linear layers int4 in groups of 32, their inputs int8 in the same groups, sums in float32; "
    "the KV cache as in int8",
}
CUDA_PRECISIONS = {
    "bf16": "weights, what passes between kernels and the KV cache rounded to bfloat16; sums, LayerNorm, softmax, the "
    "residual stream and logits in float32",
    "fp16": "the same with float16",
    "tf32": "float32, but for the inputs of linear layers, rounded to 11 bits in the tensor cores",
    "fp32": "float32, by TVM's own schedules",
}
PRECISIONS = {"llvm": CPU_PRECISIONS, "cuda": CUDA_PRECISIONS}


patch_macro_lookup()  # before any kernel is parsed


class Kernels(Protocol):
    """What a target offers to the graph rewrites. None means: no kernel for this, leave it to TVM."""

    def linear(
        self, K: int, N: int, *, activation: str | None, residual: bool, narrow: bool = False
    ) -> tvm.tirx.PrimFunc | None:
        """activation(x · W + bias) [+ residual]; see `kernels.cpu.linear`.

        narrow: all that reads it takes it in fewer bits, so it may be given so.
        """

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        """Weight [K, N] in the layout that `linear` reads."""

    def table(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Bias [N] and what else `linear` needs of each column."""

    def causal_attention(self, nh: int, hs: int, scale: float) -> tvm.tirx.PrimFunc | None:
        """Causal attention from fused QKV; see `kernels.cpu.attention`."""

    def layer_norm(self, C: int, epsilon: float, *, narrow: bool = False) -> tvm.tirx.PrimFunc | None:
        """LayerNorm over the last axis; see `kernels.cpu.layer_norm`. narrow: as in `linear`."""

    def cached_attention(self, nh: int, hs: int, length: int, scale: float) -> tvm.tirx.PrimFunc | None:
        """The same over a KV cache of `length` rows; see `kernels.cpu.cached_attention`.

        Its third argument, the keys, is of the dtype, and has rows of the size, that the cache is to be kept in.
        """

    def embedding(self, V: int, block_size: int, C: int, *, behind: bool) -> tvm.tirx.PrimFunc | None:
        """Token plus position embedding; see `kernels.cpu.embedding`."""


def kernels_for(target: CompileTarget, precision: str = "fp32") -> Kernels | None:
    """The hand-written kernels of a target; None where there are none yet and TVM's own rules schedule everything.

    precision: of the products of linear layers, a name in PRECISIONS of the target's kind.
    """
    if target.kind == "llvm":
        from tvm_frontend.kernels.cpu import CpuKernels

        return CpuKernels(target, precision)
    from tvm_frontend.kernels.cuda import FORMATS, CudaKernels

    return CudaKernels(precision, arch=target.arch) if precision in FORMATS else None
