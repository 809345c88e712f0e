"""LayerNorm over the last axis, a row at a time in cache. Bound by reading and writing the activations once."""

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.formats import AT_ONCE, Arithmetic, row_of
from tvm_frontend.kernels.cpu.register_tile import divisor


def layer_norm(C: int, lanes: int, epsilon: float, narrow: Arithmetic | None = None) -> tvm.tirx.PrimFunc:
    """out = (x - mean) / √(variance + epsilon) · gain + bias, float32 (https://arxiv.org/abs/1607.06450).

    Arguments: x [B, T, C], gain [C], bias [C], out [B, T, C]. narrow: bf16's arithmetic, in whose bfloat16 out is then
    given; C is a multiple of AT_ONCE. The variance is taken about the mean in a second pass: the one-pass form
    E[x²] - E[x]² loses all digits when the mean is large.
    """
    LANES = divisor(C, lanes)
    vectors = C // LANES
    OUT = row_of(C, narrow)
    NARROW, WORDS = narrow is not None, AT_ONCE // 2
    llvm = {"pragma_import_llvm": narrow.llvm} if NARROW else {}

    def normalised(x_mc, gain, bias, mean, scale, row, c):
        return (x_mc[row, c] - mean[0]) * scale[0] * gain[c] + bias[c]

    @T.macro
    def add_lanes(total, partial):
        total[0] = T.float32(0)
        for lane in T.unroll(LANES):
            total[0] = total[0] + partial[lane]

    @T.macro
    def normalise_row(x_mc, gain, bias, out_mc, row):
        partial = T.alloc_buffer((LANES,), "float32")
        mean = T.alloc_buffer((1,), "float32")
        scale = T.alloc_buffer((1,), "float32")
        for lane in T.vectorized(LANES):
            partial[lane] = T.float32(0)
        for v in range(vectors):
            for lane in T.vectorized(LANES):
                partial[lane] = partial[lane] + x_mc[row, v * LANES + lane]
        add_lanes(mean, partial)
        mean[0] = mean[0] * T.float32(1 / C)
        for lane in T.vectorized(LANES):
            partial[lane] = T.float32(0)
        for v in range(vectors):
            for lane in T.vectorized(LANES):
                partial[lane] = partial[lane] + (x_mc[row, v * LANES + lane] - mean[0]) * (
                    x_mc[row, v * LANES + lane] - mean[0]
                )
        add_lanes(scale, partial)
        scale[0] = T.float32(1) / T.sqrt(scale[0] * T.float32(1 / C) + T.float32(epsilon))
        if NARROW:
            for v in range(C // AT_ONCE):
                values = T.alloc_buffer((AT_ONCE,), "float32")
                for lane in T.vectorized(AT_ONCE):
                    values[lane] = normalised(x_mc, gain, bias, mean, scale, row, v * AT_ONCE + lane)
                out_mc[row, T.ramp(v * WORDS, 1, WORDS)] = narrow.narrow(values[T.ramp(0, 1, AT_ONCE)])
        else:
            for v in range(vectors):
                for lane in T.vectorized(LANES):
                    out_mc[row, v * LANES + lane] = normalised(x_mc, gain, bias, mean, scale, row, v * LANES + lane)

    @T.prim_func(s_tir=True, private=True)
    def normalise(x: T.handle, gain: T.Buffer((C,), "float32"), bias: T.Buffer((C,), "float32"), out: T.handle):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        x_btc = T.match_buffer(x, (B, S, C), "float32")
        out_btc = T.match_buffer(out, (B, S, C), OUT[0])
        x_mc = T.decl_buffer((B * S, C), "float32", data=x_btc.data)
        out_mc = T.decl_buffer((B * S, OUT[2]), OUT[1], data=out_btc.data)
        if B * S == 1:  # one row is done before another thread is awake
            normalise_row(x_mc, gain, bias, out_mc, T.int64(0))
        else:
            for row in T.parallel(B * S, annotations=llvm):
                normalise_row(x_mc, gain, bias, out_mc, row)

    return normalise
