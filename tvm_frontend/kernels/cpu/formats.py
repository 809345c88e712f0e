"""GEMM formats: the packed element, accumulator and dot product of each precision, on one CPU.

A storage element is 32 bits whatever the precision: one fp32, two bf16, four int8 or eight int4. So every precision
has the same loops: a step of k takes one storage element of a row of x, broadcast, and a vector of them of W.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tvm_frontend.kernels.cpu.intrinsics import (
    DOT_BF16,
    DOT_INT4,
    DOT_INT8,
    PACK_BF16_PAIRS,
    TO_BF16,
    TO_BF16_AVX512,
    TO_INT8,
    Convert,
    Dot,
    Intrinsic,
    call_dot,
    dot_bf16,
    dot_int4,
    dot_int8,
    fma,
    to_bf16,
    to_signed,
    to_unsigned,
)
from tvm_frontend.kernels.cpu.packing import (
    GROUP_SIZE,
    column_scales,
    pack_elements,
    pack_groups,
    pack_panels,
    quantize_columns,
)
from tvm_frontend.kernels.cpu.packing import to_bf16 as bf16_of
from tvm_frontend.kernels.cpu.register_tile import Tile
from tvm_frontend.target import CompileTarget

VEC_LANES = 16  # fp32 elements converted per vector operation


@dataclass(frozen=True)
class GemmFormat:
    """The traits of one precision on one CPU, from which `linear` and its micro-kernel are generated."""

    precision: str
    pack_factor: int  # elements of x per storage element
    storage_dtype: str  # "float32", or "int32" for packed elements
    acc_dtype: str  # of the accumulators: "int32" for int8, else "float32"
    dot: Dot  # one step of k, on vector registers
    convert: Convert | None  # VEC_LANES fp32 (divided by their scale if `quantized`) → packed; None: stored as they are
    quantized: bool  # x and W are integers with scales: int8, int4
    groupwise: bool  # one scale per GROUP_SIZE elements of k, not per row of x and column of W: int4
    intrinsics: tuple[Intrinsic, ...]  # LLVM functions that `dot` and `convert` call

    def row_elements(self, K: int) -> int:
        """Return the storage elements of a row of x with K elements; a converted row is padded with zeros."""
        unit = GROUP_SIZE if self.groupwise else VEC_LANES
        return -(-K // unit) * unit // self.pack_factor if self.convert else K

    def pack(self, weight: np.ndarray, tile: Tile) -> np.ndarray:
        """Quantise and pack a weight, float32 [K, N], in panels of tile.nr columns: see `packing` for the layout.

        [ceil(N / NR), row_elements(K), NR], or group-wise [ceil(N / NR), groups, group_elements(tile)].
        """
        if self.groupwise:
            return pack_groups(weight, tile)
        if self.convert is None:
            return pack_panels(weight, tile)
        elements = quantize_columns(weight) if self.quantized else bf16_of(weight).view(np.uint16)
        return pack_panels(pack_elements(elements, self.row_elements(len(weight)), self.pack_factor), tile)

    def epilogue_params(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Return what the epilogue reads of each column, float32 [epilogue_rows, N].

        Row 0 is the bias. In int8, row 1 has the columns' scales, and row 2 the bits of int32 zero-point corrections,
        -128 * sum_k W[k, n]: x is stored unsigned, with the zero point 128, for vpdpbusd.
        """
        if self.epilogue_rows == 1:
            return bias[None]
        correction = -128 * quantize_columns(weight).sum(0, dtype=np.int32)
        return np.stack([bias, column_scales(weight), correction.view(np.float32)])

    @property
    def epilogue_rows(self) -> int:
        """Return the rows of `epilogue_params`: 3 for int8, else 1."""
        return 3 if self.quantized and not self.groupwise else 1


class ActivationRow(NamedTuple):
    """Describe how a row of activations lies in memory between two kernels."""

    dtype: str  # of its elements: "float32" or "bfloat16"
    storage_dtype: str  # as kernels read and write it: bfloat16 in pairs, as int32
    elements: int  # storage elements per row
    convert: Convert  # VEC_LANES fp32 → as kernels write them


def gemm_format(precision: str, target: CompileTarget) -> GemmFormat:
    """Return the format of fp32, bf16, int8 or int4, with the target's dot-product instruction where it has one."""
    if precision == "fp32":
        return FP32
    if precision == "bf16":
        native = _has_bf16(target)
        return GemmFormat(
            "bf16",
            pack_factor=2,
            storage_dtype="int32",
            acc_dtype="float32",
            dot=call_dot("dot_bf16") if native else dot_bf16,
            convert=to_bf16,
            quantized=False,
            groupwise=False,
            intrinsics=(TO_BF16_AVX512, PACK_BF16_PAIRS, DOT_BF16) if native else (TO_BF16,),
        )
    native = target.vector_bits == 512 and "avx512vnni" in target.features
    if precision == "int8":
        return GemmFormat(
            "int8",
            pack_factor=4,
            storage_dtype="int32",
            acc_dtype="int32",
            dot=call_dot("dot_int8") if native else dot_int8,
            convert=to_unsigned,
            quantized=True,
            groupwise=False,
            intrinsics=(TO_INT8, DOT_INT8) if native else (TO_INT8,),
        )
    return GemmFormat(
        "int4",
        pack_factor=4,
        storage_dtype="int32",
        acc_dtype="float32",
        dot=call_dot("dot_int4") if native else dot_int4,
        convert=to_signed,
        quantized=True,
        groupwise=True,
        intrinsics=(TO_INT8, DOT_INT4) if native else (TO_INT8,),
    )


def attention_format(precision: str, target: CompileTarget) -> GemmFormat:
    """Return the format of attention's products beside linear layers of a precision.

    bf16 where those use 16 bits or fewer and the CPU has AVX512-BF16; otherwise fp32, which beats emulation.
    """
    return gemm_format("bf16", target) if precision != "fp32" and _has_bf16(target) else FP32


def activation_row(width: int, bf16: GemmFormat | None) -> ActivationRow:
    """Return the layout of a row of `width` activations: bfloat16 if the format bf16 is given, else float32."""
    if bf16 is None or bf16.convert is None:
        return ActivationRow("float32", "float32", width, lambda values: values)
    return ActivationRow("bfloat16", bf16.storage_dtype, bf16.row_elements(width), bf16.convert)


def _has_bf16(target: CompileTarget) -> bool:
    return target.vector_bits == 512 and "avx512bf16" in target.features


FP32 = GemmFormat(
    "fp32",
    pack_factor=1,
    storage_dtype="float32",
    acc_dtype="float32",
    dot=fma,
    convert=None,
    quantized=False,
    groupwise=False,
    intrinsics=(),
)
