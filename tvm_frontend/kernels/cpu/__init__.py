"""Kernels for CPUs with vector registers (AVX-512, AVX2, SSE), in TensorIR."""

from functools import cache

import numpy as np
import tvm

from tvm_frontend.kernels.cpu.attention import causal_attention
from tvm_frontend.kernels.cpu.cached_attention import cached_attention
from tvm_frontend.kernels.cpu.embedding import embedding
from tvm_frontend.kernels.cpu.formats import VEC_LANES, GemmFormat, attention_format, gemm_format
from tvm_frontend.kernels.cpu.kv_layout import kv_layout
from tvm_frontend.kernels.cpu.layer_norm import layer_norm
from tvm_frontend.kernels.cpu.linear import linear
from tvm_frontend.kernels.cpu.register_tile import tile_for
from tvm_frontend.target import CompileTarget


class CpuKernels:
    """The kernels of this folder with the register tile and instructions of one CPU; see `kernels.Kernels`."""

    def __init__(self, target: CompileTarget, precision: str = "fp32") -> None:
        self.tile = tile_for(target)
        self.format = gemm_format(precision, target)
        self.attention_format = attention_format(precision, target)
        # Layers repeat the shapes of the layer before, and parsing a kernel takes some tenths of a second.
        self._linear = cache(linear)
        self._attention = cache(causal_attention)
        self._cached_attention = cache(cached_attention)
        self._layer_norm = cache(layer_norm)
        self._embedding = cache(embedding)

    def linear(
        self, K: int, N: int, *, activation: str | None, residual: bool, narrow: bool = False
    ) -> tvm.tirx.PrimFunc:
        bf16 = {"bf16_x": self._bf16(K) is not None, "bf16_out": narrow and self._bf16(N) is not None}
        return self._linear(K, N, self.tile, self.format, activation=activation, residual=residual, **bf16)

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        return self.format.pack(weight, self.tile)

    def table(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return self.format.epilogue_params(weight, bias)

    def causal_attention(self, nh: int, hs: int, scale: float) -> tvm.tirx.PrimFunc:
        return self._attention(nh, hs, self.tile, scale, self.attention_format, self._bf16(hs))

    def layer_norm(self, C: int, epsilon: float, *, narrow: bool = False) -> tvm.tirx.PrimFunc:
        return self._layer_norm(C, self.tile.lanes, epsilon, self._bf16(C) if narrow else None)

    def cached_attention(self, nh: int, hs: int, length: int, scale: float) -> tvm.tirx.PrimFunc:
        layout = kv_layout(hs, self.format, self.tile)
        return self._cached_attention(nh, length, self.tile, layout, scale, self._bf16(hs))

    def embedding(self, V: int, block_size: int, C: int, *, behind: bool) -> tvm.tirx.PrimFunc:
        return self._embedding(V, block_size, C, self.tile.lanes, behind=behind)

    def _bf16(self, width: int) -> GemmFormat | None:
        """Return the format in which a producer emits rows of this width for the next linear layer; None for fp32."""
        whole = width % VEC_LANES == 0 and self.tile.nr % VEC_LANES == 0
        return self.format if self.format.precision == "bf16" and whole else None
