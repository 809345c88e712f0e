"""LayerNorm over the last axis. Bound by reading and writing the activations once.

for each row of B * T, in parallel
    for each vector of C:  sum                       x from memory; the row, 4 C bytes, is then in L1
    for each vector of C:  sum of (x - mean)²        from L1
    for each vector of C:  normalise and store       from L1
"""

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.formats import VEC_LANES, GemmFormat, activation_row
from tvm_frontend.kernels.cpu.intrinsics import import_llvm
from tvm_frontend.kernels.cpu.register_tile import pow2_divisor


def layer_norm(C: int, lanes: int, epsilon: float, bf16_out: GemmFormat | None = None) -> tvm.tirx.PrimFunc:
    """Return the kernel of (x - mean) / √(variance + epsilon) · gain + bias, fp32 (https://arxiv.org/abs/1607.06450).

    Its arguments: x [B, T, C], gain [C], bias [C], out [B, T, C]. bf16_out: the format bf16 if out is emitted as
    bfloat16, which needs C to be a multiple of VEC_LANES. The variance is taken about the mean in a second pass: the
    one-pass form E[x²] - E[x]² loses all digits when the mean is large.
    """
    LANES = pow2_divisor(C, lanes)
    VECTORS = C // LANES
    OUT = activation_row(C, bf16_out)
    PAIRS = VEC_LANES // 2
    llvm = import_llvm(*(bf16_out.intrinsics if bf16_out else ()))

    def normalised(x_mc, gain, bias, mean, rstd, row, c):
        return (x_mc[row, c] - mean[0]) * rstd[0] * gain[c] + bias[c]

    @T.macro
    def sum_lanes(total, partial):
        total[0] = T.float32(0)
        for lane in T.unroll(LANES):
            total[0] = total[0] + partial[lane]

    @T.macro
    def normalise_row(x_mc, gain, bias, out_mc, row):
        partial = T.alloc_buffer((LANES,), "float32")
        mean = T.alloc_buffer((1,), "float32")
        rstd = T.alloc_buffer((1,), "float32")
        for lane in T.vectorized(LANES):
            partial[lane] = T.float32(0)
        for v in range(VECTORS):
            for lane in T.vectorized(LANES):
                partial[lane] = partial[lane] + x_mc[row, v * LANES + lane]
        sum_lanes(mean, partial)
        mean[0] = mean[0] * T.float32(1 / C)
        for lane in T.vectorized(LANES):
            partial[lane] = T.float32(0)
        for v in range(VECTORS):
            for lane in T.vectorized(LANES):
                partial[lane] = partial[lane] + (x_mc[row, v * LANES + lane] - mean[0]) * (
                    x_mc[row, v * LANES + lane] - mean[0]
                )
        sum_lanes(rstd, partial)
        rstd[0] = T.float32(1) / T.sqrt(rstd[0] * T.float32(1 / C) + T.float32(epsilon))
        if bf16_out is not None:
            for v in range(C // VEC_LANES):
                values = T.alloc_buffer((VEC_LANES,), "float32")
                for lane in T.vectorized(VEC_LANES):
                    values[lane] = normalised(x_mc, gain, bias, mean, rstd, row, v * VEC_LANES + lane)
                out_mc[row, T.ramp(v * PAIRS, 1, PAIRS)] = OUT.convert(values[T.ramp(0, 1, VEC_LANES)])
        else:
            for v in range(VECTORS):
                for lane in T.vectorized(LANES):
                    out_mc[row, v * LANES + lane] = normalised(x_mc, gain, bias, mean, rstd, row, v * LANES + lane)

    @T.prim_func(s_tir=True, private=True)
    def normalise(x: T.handle, gain: T.Buffer((C,), "float32"), bias: T.Buffer((C,), "float32"), out: T.handle):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        x_btc = T.match_buffer(x, (B, S, C), "float32")
        out_btc = T.match_buffer(out, (B, S, C), OUT.dtype)
        x_mc = T.decl_buffer((B * S, C), "float32", data=x_btc.data)
        out_mc = T.decl_buffer((B * S, OUT.elements), OUT.storage_dtype, data=out_btc.data)
        if B * S == 1:  # a single row is done before another thread is awake
            normalise_row(x_mc, gain, bias, out_mc, T.int64(0))
        else:
            for row in T.parallel(B * S, annotations=llvm):
                normalise_row(x_mc, gain, bias, out_mc, row)

    return normalise
