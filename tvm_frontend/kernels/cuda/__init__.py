"""Schedules for NVIDIA GPUs: kernels of our own, and for what they do not cover TVM's rules (`default`)."""

from functools import cache

import ml_dtypes
import numpy as np
import tvm

from gpt.hardware import DEFAULT_ARCH, multiprocessors_of
from tvm_frontend.kernels.cuda.attention import causal_attention, has_attention
from tvm_frontend.kernels.cuda.cached_attention import cached_attention
from tvm_frontend.kernels.cuda.launch import Launcher
from tvm_frontend.kernels.cuda.linear import linear
from tvm_frontend.kernels.cuda.norm_embed import LARGEST, embedding, layer_norm
from tvm_frontend.kernels.cuda.sampling import choose

# Each precision's type in `device/primitives.cuh` and dtype between kernels. float32 has no tensor cores: TVM's rules.
NUMBERS = {"bf16": ("Bf16", "bfloat16"), "fp16": ("Fp16", "float16"), "tf32": ("Tf32", "float32")}


class CudaKernels:
    """The kernels of this folder for one precision; see `kernels.Kernels`."""

    def __init__(self, precision: str, launcher: Launcher | None = None, *, arch: str = DEFAULT_ARCH) -> None:
        self.number, self.dtype = NUMBERS[precision]
        self.narrow = self.dtype != "float32"
        self.launcher = launcher or Launcher()
        self.multiprocessors = multiprocessors_of(arch)
        # A layer repeats the shapes of the one before it, and parsing a kernel takes some tenths of a second.
        self._linear, self._attention, self._cached_attention, self._layer_norm, self._embedding = map(
            cache, (linear, causal_attention, cached_attention, layer_norm, embedding)
        )

    def linear(
        self, K: int, N: int, *, activation: str | None, residual: bool, narrow: bool = False
    ) -> tvm.tirx.PrimFunc | None:
        if K % (8 if self.narrow else 4):  # its rows are read 16 bytes at a time
            return None
        out = self.dtype if narrow else "float32"
        return self._linear(
            K, N, self.number, self.dtype, out, self.launcher,
            multiprocessors=self.multiprocessors, activation=activation, residual=residual,
        )  # fmt: skip

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        if not self.narrow:
            return np.ascontiguousarray(weight.T)
        dtype = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.float16
        return np.ascontiguousarray(weight.T.astype(dtype)).view(np.uint16)

    def table(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return bias.astype(np.float32)

    def causal_attention(self, nh: int, hs: int, scale: float) -> tvm.tirx.PrimFunc | None:
        if not self.narrow or not has_attention(hs, scale):
            return None
        return self._attention(nh, hs, scale, self.number, self.dtype, self.launcher)

    def layer_norm(self, C: int, epsilon: float, *, narrow: bool = False) -> tvm.tirx.PrimFunc | None:
        if C > LARGEST:
            return None
        return self._layer_norm(C, epsilon, self.number, self.dtype if narrow else "float32", self.launcher)

    def cached_attention(self, nh: int, hs: int, length: int, scale: float) -> tvm.tirx.PrimFunc | None:
        if not self.narrow or not has_attention(hs, scale):
            return None
        return self._cached_attention(nh, hs, length, scale, self.number, self.dtype, self.launcher)

    def embedding(self, V: int, block_size: int, C: int, *, behind: bool) -> tvm.tirx.PrimFunc:
        return self._embedding(V, block_size, C, self.launcher, behind=behind)

    def choose(self, V: int) -> tvm.tirx.PrimFunc:
        return choose(V, self.launcher)
