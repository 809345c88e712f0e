"""Kernels for NVIDIA GPUs: CUDA C++ of this project, and TVM's schedule rules (`default`) for all other operators."""

from functools import cache

import ml_dtypes
import numpy as np
import tvm

from gpt.hardware import DEFAULT_ARCH, multiprocessors_of
from tvm_frontend.kernels.cuda.attention import causal_attention, has_attention
from tvm_frontend.kernels.cuda.cached_attention import cached_attention
from tvm_frontend.kernels.cuda.launch import Launcher
from tvm_frontend.kernels.cuda.linear import linear
from tvm_frontend.kernels.cuda.norm_embed import MAX_C, embedding, layer_norm
from tvm_frontend.kernels.cuda.sampling import sample

# By precision: the DTypeTraits in `device/primitives.cuh` and the dtype of activations between kernels. Tensor cores do
# not multiply float32, so fp32 is not here: TVM's rules schedule it.
FORMATS = {"bf16": ("Bf16", "bfloat16"), "fp16": ("Fp16", "float16"), "tf32": ("Tf32", "float32")}

OLDEST_ARCH = "sm_80"  # the first with cp.async, and with tensor cores that multiply bfloat16 and tf32


class CudaKernels:
    """The kernels of this folder for one precision and arch; the methods are those of `kernels.Kernels`."""

    def __init__(self, precision: str, launcher: Launcher | None = None, *, arch: str = DEFAULT_ARCH) -> None:
        self.traits, self.dtype = FORMATS[precision]
        self.is_half = self.dtype != "float32"
        self.launcher = launcher or Launcher()
        self.multiprocessors = multiprocessors_of(arch)
        # All layers have the same shapes, and TVM takes some tenths of a second to parse a kernel.
        self._linear = cache(linear)
        self._attention = cache(causal_attention)
        self._cached_attention = cache(cached_attention)
        self._layer_norm = cache(layer_norm)
        self._embedding = cache(embedding)

    def linear(
        self, K: int, N: int, *, activation: str | None, residual: bool, narrow: bool = False
    ) -> tvm.tirx.PrimFunc | None:
        if K % (8 if self.is_half else 4):  # Rows are loaded in chunks of 16 bytes.
            return None
        out = self.dtype if narrow else "float32"
        return self._linear(
            K, N, self.traits, self.dtype, out, self.launcher,
            multiprocessors=self.multiprocessors, activation=activation, residual=residual,
        )  # fmt: skip

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        if not self.is_half:
            return np.ascontiguousarray(weight.T)
        dtype = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.float16
        return np.ascontiguousarray(weight.T.astype(dtype)).view(np.uint16)

    def table(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return bias.astype(np.float32)

    def causal_attention(self, nh: int, hs: int, scale: float) -> tvm.tirx.PrimFunc | None:
        if not self.is_half or not has_attention(hs, scale):
            return None
        return self._attention(nh, hs, scale, self.traits, self.dtype, self.launcher)

    def layer_norm(self, C: int, epsilon: float, *, narrow: bool = False) -> tvm.tirx.PrimFunc | None:
        if C > MAX_C:
            return None
        return self._layer_norm(C, epsilon, self.traits, self.dtype if narrow else "float32", self.launcher)

    def cached_attention(self, nh: int, hs: int, length: int, scale: float) -> tvm.tirx.PrimFunc | None:
        if not self.is_half or not has_attention(hs, scale):
            return None
        return self._cached_attention(nh, hs, length, scale, self.traits, self.dtype, self.launcher)

    def embedding(self, V: int, block_size: int, C: int, *, behind: bool) -> tvm.tirx.PrimFunc:
        return self._embedding(V, block_size, C, self.launcher, behind=behind)

    def sample(self, V: int) -> tvm.tirx.PrimFunc:
        """Return the kernel that samples the next token from logits of V tokens; see `sampling.sample`."""
        return sample(V, self.launcher)
