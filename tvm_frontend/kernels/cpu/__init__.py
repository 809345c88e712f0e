"""Kernels for CPUs with vector registers (AVX-512, AVX2, SSE), in TensorIR."""

from functools import cache

import numpy as np
import tvm

from tvm_frontend.kernels.cpu.attention import causal_attention
from tvm_frontend.kernels.cpu.cached_attention import cached_attention
from tvm_frontend.kernels.cpu.embedding import embedding
from tvm_frontend.kernels.cpu.formats import AT_ONCE, Arithmetic, arithmetic_of, arithmetic_of_attention
from tvm_frontend.kernels.cpu.kv_layout import cache_rows
from tvm_frontend.kernels.cpu.layer_norm import layer_norm
from tvm_frontend.kernels.cpu.linear import linear
from tvm_frontend.kernels.cpu.register_tile import tile_for
from tvm_frontend.target import CompileTarget


class CpuKernels:
    """The kernels of this folder with the register tile and instructions of one CPU; see `kernels.Kernels`."""

    def __init__(self, target: CompileTarget, precision: str = "fp32") -> None:
        self.tile = tile_for(target)
        self.arithmetic = arithmetic_of(precision, target)
        self.attention_arithmetic = arithmetic_of_attention(precision, target)
        # A layer repeats the shapes of the one before it, and parsing a kernel takes some tenths of a second.
        self._linear, self._attention, self._cached_attention, self._layer_norm, self._embedding = map(
            cache, (linear, causal_attention, cached_attention, layer_norm, embedding)
        )

    def linear(
        self, K: int, N: int, *, activation: str | None, residual: bool, narrow: bool = False
    ) -> tvm.tirx.PrimFunc:
        takes, gives = self._narrow(K) is not None, narrow and self._narrow(N) is not None
        how = {"activation": activation, "residual": residual, "narrow_x": takes, "narrow_out": gives}
        return self._linear(K, N, self.tile, self.arithmetic, **how)

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        return self.arithmetic.pack(weight, self.tile)

    def table(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return self.arithmetic.table(weight, bias)

    def causal_attention(self, nh: int, hs: int, scale: float) -> tvm.tirx.PrimFunc:
        return self._attention(nh, hs, self.tile, scale, self.attention_arithmetic, self._narrow(hs))

    def layer_norm(self, C: int, epsilon: float, *, narrow: bool = False) -> tvm.tirx.PrimFunc:
        return self._layer_norm(C, self.tile.lanes, epsilon, self._narrow(C) if narrow else None)

    def cached_attention(self, nh: int, hs: int, length: int, scale: float) -> tvm.tirx.PrimFunc:
        rows = cache_rows(hs, self.arithmetic, self.tile)
        return self._cached_attention(nh, length, self.tile, rows, scale, self._narrow(hs))

    def embedding(self, V: int, block_size: int, C: int, *, behind: bool) -> tvm.tirx.PrimFunc:
        return self._embedding(V, block_size, C, self.tile.lanes, behind=behind)

    def _narrow(self, width: int) -> Arithmetic | None:
        """How rows of some width are rounded where they are made, for linear layers to read them so; None if not."""
        whole = width % AT_ONCE == 0 and self.tile.columns % AT_ONCE == 0
        return self.arithmetic if self.arithmetic.precision == "bf16" and whole else None
