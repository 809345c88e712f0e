"""Token and position embedding in one pass. Bound by writing the activations once."""

import tvm
from tvm.script import tirx as T

from tvm_frontend.schedules.cpu.tile import divisor


def embedding(V: int, block_size: int, C: int, lanes: int) -> tvm.tirx.PrimFunc:
    """out[b, t] = tokens[ids[b, t]] + positions[t], float32.

    Arguments: tokens [V, C], ids [B, T] int64, positions [block_size, C], out [B, T, C]. The ids are not checked here:
    whoever calls the library does (`tvm_frontend.artifact`).
    """
    LANES = divisor(C, lanes)

    @T.prim_func(s_tir=True, private=True)
    def embed(
        tokens: T.Buffer((V, C), "float32"),
        ids: T.handle,
        positions: T.Buffer((block_size, C), "float32"),
        out: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        ids_bt = T.match_buffer(ids, (B, S), "int64")
        out_btc = T.match_buffer(out, (B, S, C), "float32")
        for row in T.parallel(B * S):
            for v in range(C // LANES):
                for lane in T.vectorized(LANES):
                    out_btc[row // S, row % S, v * LANES + lane] = (
                        tokens[ids_bt[row // S, row % S], v * LANES + lane] + positions[row % S, v * LANES + lane]
                    )

    return embed
