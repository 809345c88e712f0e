"""Hand-written kernels for each kind of target, one operator per file, and the precisions that they offer."""

from typing import Literal, Protocol

import numpy as np
import tvm

from tvm_frontend.target import CompileTarget
from tvm_frontend.tvm_patches import patch_macro_lookup

# The precisions of each kind of target, with the number formats of their products; the first is the default.
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
Precision = Literal["fp32", "bf16", "int8", "int4", "fp16", "tf32"]  # of any kind of target


patch_macro_lookup()  # before any kernel is parsed


class Kernels(Protocol):
    """The kernels that a target offers to the graph rewrites. None: there is no such kernel, so TVM's rules apply."""

    def linear(
        self, K: int, N: int, *, activation: str | None, residual: bool, narrow: bool = False
    ) -> tvm.tirx.PrimFunc | None:
        """Return the kernel of activation(x · W + bias) [+ residual]; see `kernels.cpu.linear`.

        narrow: every consumer of the result reads it in 16 bits, so the kernel may emit it so.
        """

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        """Return a weight [K, N] in the layout that `linear` reads."""

    def table(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Return the parameters of `linear`'s epilogue, per column: the bias [N], and scales where W is quantised."""

    def causal_attention(self, nh: int, hs: int, scale: float) -> tvm.tirx.PrimFunc | None:
        """Return the kernel of causal attention on packed QKV; see `kernels.cpu.attention`."""

    def layer_norm(self, C: int, epsilon: float, *, narrow: bool = False) -> tvm.tirx.PrimFunc | None:
        """Return the kernel of LayerNorm over the last axis; see `kernels.cpu.layer_norm`. narrow: as in `linear`."""

    def cached_attention(self, nh: int, hs: int, length: int, scale: float) -> tvm.tirx.PrimFunc | None:
        """Return the kernel of causal attention over a KV cache of `length` rows; see `kernels.cpu.cached_attention`.

        The dtype and the row size of its third parameter, the keys, are those that the cache has to be allocated with.
        """

    def embedding(self, V: int, block_size: int, C: int, *, behind: bool) -> tvm.tirx.PrimFunc | None:
        """Return the kernel of token plus position embedding; see `kernels.cpu.embedding`.

        behind: the tokens follow those in a KV cache, so positions begin at pos[b], a parameter, and not at 0.
        """


def kernels_for(target: CompileTarget, precision: str = "fp32") -> Kernels | None:
    """Return the hand-written kernels of a target, or None where there are none and TVM's rules schedule everything.

    precision: the format of the products of linear layers, a name in PRECISIONS of the target's kind.
    """
    if target.kind == "llvm":
        from tvm_frontend.kernels.cpu import CpuKernels

        return CpuKernels(target, precision)
    from tvm_frontend.kernels.cuda import FORMATS, CudaKernels

    return CudaKernels(precision, arch=target.gpu_arch) if precision in FORMATS else None
