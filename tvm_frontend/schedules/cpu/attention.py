"""Causal self-attention from the fused QKV projection to the heads side by side, without a T × T matrix.

A task is one head and one block of queries. The queries of a block lie across the vector lanes, so that the softmax
needs no sum across lanes, both products are the register tile of `linear`, and keys and values are read as they are.
Bound by arithmetic: 4 · T · C / 2 flops a token. Keys after a block's last query are never touched.
"""

from collections.abc import Callable

import tvm
from tvm.script import tirx as T

from tvm_frontend.schedules.cpu.elementary import LOG2_E, exp2
from tvm_frontend.schedules.cpu.tile import Tile, clear, divisor


def causal_attention(nh: int, hs: int, tile: Tile, scale: float) -> tvm.tirx.PrimFunc:
    """out[b, t, h] = softmax(scale · q[t] · k[≤ t]) · v[≤ t] for each head h, float32.

    Arguments: qkv [B, T, 3 · nh · hs] (all of q, then k, then v; heads side by side), out [B, T, nh · hs].
    """
    C, NQ = nh * hs, tile.columns
    attend_block = block_of_queries(
        hs,
        tile,
        scale,
        key=lambda qkv, b, h, j, d: qkv[b, j, C + h * hs + d],
        value=lambda qkv, b, h, j, d: qkv[b, j, 2 * C + h * hs + d],
    )

    @T.prim_func(s_tir=True, private=True)
    def attend(qkv_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        qkv = T.match_buffer(qkv_handle, (B, S, 3 * C), "float32")
        out = T.match_buffer(out_handle, (B, S, C), "float32")
        blocks = T.meta_var((S + NQ - 1) // NQ)
        for task in T.parallel(B * nh * blocks):
            b = T.meta_var(task // (nh * blocks))
            h = T.meta_var(task // blocks % nh)
            scores = T.alloc_buffer((S + tile.rows, NQ), "float32")
            attend_block(out, scores, qkv, qkv, qkv, b, h, task % blocks * NQ, S, T.int64(0))

    return attend


def block_of_queries(hs: int, tile: Tile, scale: float, key: Callable, value: Callable) -> Callable:
    """A macro: attention of the queries of one head from `first` on, at most tile.columns of the S that there are.

    Its arguments: out, scores, qkv, keys, values, b, h, first, S, offset. Query t stands at position offset + t.
    key and value say where position j of the buffers `keys` and `values` has its element d: key(keys, b, h, j, d).
    scores is room for offset + S + tile.rows rows of tile.columns.
    """
    NQ, LANES, VECTORS = tile.columns, tile.lanes, tile.vectors  # queries a block
    ROWS = divisor(hs, tile.rows)
    head_tile = Tile(ROWS, VECTORS, LANES)

    @T.macro
    def load_queries(q, qkv, b, h, first, S):
        # Scaled here once, and to base 2: exp(x) = 2^(x log2 e).
        for c in range(NQ):
            for d in range(hs):
                q[d, c] = qkv[b, T.min(first + c, S - 1), h * hs + d] * T.float32(scale * LOG2_E)

    @T.macro
    def score(scores, q, keys, b, h, count, first_key):
        acc = T.alloc_buffer((ROWS, NQ), "float32", scope="local")
        clear(head_tile, acc)
        for d in range(hs):
            for i in T.unroll(ROWS):
                for v in T.unroll(VECTORS):
                    for lane in T.vectorized(LANES):
                        acc[i, v * LANES + lane] = (
                            acc[i, v * LANES + lane]
                            + key(keys, b, h, T.min(first_key + i, count - 1), d) * q[d, v * LANES + lane]
                        )
        for i in T.unroll(ROWS):
            for v in T.unroll(VECTORS):
                for lane in T.vectorized(LANES):
                    scores[first_key + i, v * LANES + lane] = acc[i, v * LANES + lane]

    @T.macro
    def softmax(scores, highest, total, first, count):
        # Key j is seen by query c of the block if j <= first + c; every query sees key 0.
        for c in T.vectorized(NQ):
            highest[c] = scores[0, c]
            total[c] = T.float32(0)
        for j in range(count):
            for c in T.vectorized(NQ):
                highest[c] = T.max(highest[c], T.Select(j <= first + c, scores[j, c], highest[c]))
        for j in range(count):
            for c in T.vectorized(NQ):
                scores[j, c] = T.Select(j <= first + c, exp2(scores[j, c] - highest[c]), T.float32(0))
            for c in T.vectorized(NQ):
                total[c] = total[c] + scores[j, c]

    @T.macro
    def weigh_values(mixed, scores, values, b, h, first_column, count):
        acc = T.alloc_buffer((ROWS, NQ), "float32", scope="local")
        clear(head_tile, acc)
        for j in range(count):
            for i in T.unroll(ROWS):
                for v in T.unroll(VECTORS):
                    for lane in T.vectorized(LANES):
                        acc[i, v * LANES + lane] = (
                            acc[i, v * LANES + lane]
                            + value(values, b, h, j, first_column + i) * scores[j, v * LANES + lane]
                        )
        for i in T.unroll(ROWS):
            for v in T.unroll(VECTORS):
                for lane in T.vectorized(LANES):
                    mixed[first_column + i, v * LANES + lane] = acc[i, v * LANES + lane]

    @T.macro
    def attend(out, scores, qkv, keys, values, b, h, first, S, offset):
        count = T.meta_var(offset + T.min(first + NQ, S))  # of the keys that a query of the block sees
        q = T.alloc_buffer((hs, NQ), "float32")
        highest = T.alloc_buffer((NQ,), "float32", scope="local")
        total = T.alloc_buffer((NQ,), "float32", scope="local")
        mixed = T.alloc_buffer((hs, NQ), "float32")
        load_queries(q, qkv, b, h, first, S)
        for block in range((count + ROWS - 1) // ROWS):
            score(scores, q, keys, b, h, count, block * ROWS)
        softmax(scores, highest, total, offset + first, count)
        for block in range(hs // ROWS):
            weigh_values(mixed, scores, values, b, h, block * ROWS, count)
        for c in range(T.min(NQ, S - first)):
            for d in range(hs):
                out[b, first + c, h * hs + d] = mixed[d, c] / total[c]

    return attend
