"""Token plus position embedding in one pass. Bound by writing the activations once.

for each row of B * T, in parallel
    for each vector of C:  out = tokens + positions
"""

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.register_tile import pow2_divisor


def embedding(V: int, block_size: int, C: int, lanes: int, *, behind: bool) -> tvm.tirx.PrimFunc:
    """Return the kernel of out[b, t] = tokens[ids[b, t]] + positions[t], float32; `behind`: positions[pos[b] + t].

    Its arguments: tokens [V, C], ids [B, T] int64, positions [block_size, C], pos [B] int64 if `behind` (the tokens
    that are in the KV cache already), out [B, T, C]. Neither ids nor pos are checked here: the caller of the library
    does (`tvm_frontend.runtime.session`).
    """
    LANES = pow2_divisor(C, lanes)

    @T.macro
    def add_rows(tokens, ids, positions, out, b, t, position):
        for v in range(C // LANES):
            for lane in T.vectorized(LANES):
                out[b, t, v * LANES + lane] = (
                    tokens[ids[b, t], v * LANES + lane] + positions[position, v * LANES + lane]
                )

    if behind:

        @T.prim_func(s_tir=True, private=True)
        def embed(
            tokens: T.Buffer((V, C), "float32"),
            ids: T.handle,
            positions: T.Buffer((block_size, C), "float32"),
            pos: T.handle,
            out: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            B, S = T.int64(), T.int64()
            ids_bt = T.match_buffer(ids, (B, S), "int64")
            pos_b = T.match_buffer(pos, (B,), "int64")
            out_btc = T.match_buffer(out, (B, S, C), "float32")
            if B * S == 1:  # a single row is done before another thread is awake
                add_rows(tokens, ids_bt, positions, out_btc, T.int64(0), T.int64(0), pos_b[0])
            else:
                for row in T.parallel(B * S):
                    add_rows(tokens, ids_bt, positions, out_btc, row // S, row % S, pos_b[row // S] + row % S)

    else:

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
                add_rows(tokens, ids_bt, positions, out_btc, row // S, row % S, row % S)

    return embed
