"""Causal self-attention from the fused QKV projection to the heads side by side, without a T × T matrix.

A task is one head and one block of queries. The queries of a block lie across the vector lanes, so that the softmax
needs no sum across lanes, both products are the register tile of `linear`, and keys and values are read as they are; in
bf16 as words of two, which are made once for all blocks. Bound by arithmetic: 4 · T · C / 2 flops a token. Keys after a
block's last query are never touched.
"""

from collections.abc import Callable

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.formats import AT_ONCE, Arithmetic, row_of
from tvm_frontend.kernels.cpu.intrinsics import pair
from tvm_frontend.kernels.cpu.kv_layout import cache_rows
from tvm_frontend.kernels.cpu.math import LOG2_E, exp2
from tvm_frontend.kernels.cpu.register_tile import Tile, clear, divisor


def causal_attention(
    nh: int, hs: int, tile: Tile, scale: float, arithmetic: Arithmetic, narrow: Arithmetic | None = None
) -> tvm.tirx.PrimFunc:
    """out[b, t, h] = softmax(scale · q[t] · k[≤ t]) · v[≤ t] for each head h, float32 but for the products.

    Arguments: qkv [B, T, 3 · nh · hs] (all of q, then k, then v; heads side by side), out [B, T, nh · hs]. arithmetic:
    fp32, or bf16 by instructions. narrow: bf16's, in whose bfloat16 out is then given; hs is a multiple of AT_ONCE.
    """
    C, NQ, PAIRED = nh * hs, tile.columns, arithmetic.narrow is not None
    rows = cache_rows(hs, arithmetic, tile)
    FULL = rows.lanes * rows.vectors  # hs, or somewhat more
    OUT = row_of(C, narrow)
    functions = arithmetic.llvm or (narrow.llvm if narrow else "")
    llvm = {"pragma_import_llvm": functions} if functions else {}
    put_key = rows.put

    def word(words, b, h, j, d):
        return words[b, h, j, d]

    def third(number):
        return lambda qkv, b, h, j, d: qkv[b, j, number * C + h * hs + d]

    key, value = (word, word) if PAIRED else (third(1), third(2))
    attend_block = block_of_queries(hs, tile, scale, arithmetic, key, value, narrow)

    @T.macro
    def put_values(values, qkv, b, h, j, S):
        # Rows 2j and 2j + 1; beyond the last one there are zeros.
        both = T.alloc_buffer((2, FULL), "float32")
        for i in T.unroll(2):
            for d in range(FULL):
                both[i, d] = T.float32(0)
        for i in range(T.min(2, S - 2 * j)):
            for d in range(hs):
                both[i, d] = qkv[b, 2 * j + i, 2 * C + h * hs + d]
        for v in T.unroll(FULL // AT_ONCE):
            values[b, h, j, T.ramp(v * AT_ONCE, 1, AT_ONCE)] = pair(
                both[0, T.ramp(v * AT_ONCE, 1, AT_ONCE)], both[1, T.ramp(v * AT_ONCE, 1, AT_ONCE)]
            )

    @T.macro
    def attend_all(out, qkv, keys, values, B, S):
        blocks = T.meta_var((S + NQ - 1) // NQ)
        for task in T.parallel(B * nh * blocks, annotations=llvm):
            b = T.meta_var(task // (nh * blocks))
            h = T.meta_var(task // blocks % nh)
            scores = T.alloc_buffer((S + tile.rows, NQ), "float32")
            attend_block(out, scores, qkv, keys, values, b, h, task % blocks * NQ, S, T.int64(0))

    @T.prim_func(s_tir=True, private=True)
    def attend(qkv_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        qkv = T.match_buffer(qkv_handle, (B, S, 3 * C), "float32")
        out_btc = T.match_buffer(out_handle, (B, S, C), OUT[0])
        out = T.decl_buffer((B, S, OUT[2]), OUT[1], data=out_btc.data)
        if PAIRED:
            keys = T.alloc_buffer((B, nh, S, rows.words), "int32")
            values = T.alloc_buffer((B, nh, (S + 1) // 2, FULL), "int32")
            for head in T.parallel(B * nh):
                for j in range(S):
                    put_key(keys, head // nh, head % nh, j, qkv, j, C + head % nh * hs)
                for j in range((S + 1) // 2):
                    put_values(values, qkv, head // nh, head % nh, j, S)
            attend_all(out, qkv, keys, values, B, S)
        else:
            attend_all(out, qkv, qkv, qkv, B, S)

    return attend


def block_of_queries(
    hs: int,
    tile: Tile,
    scale: float,
    arithmetic: Arithmetic,
    key: Callable,
    value: Callable,
    narrow: Arithmetic | None,
) -> Callable:
    """A macro: attention of the queries of one head from `first` on, at most tile.columns of the S that there are.

    Its arguments: out, scores, qkv, keys, values, b, h, first, S, offset. Query t stands at position offset + t.
    key and value say where the buffers `keys` and `values` have word d of position j, and the word of position j, with
    its neighbour where a word holds two, and element d: key(keys, b, h, j, d). scores is room for offset + S +
    tile.rows rows of tile.columns. narrow: as in `causal_attention`; out has words then.
    """
    NQ, LANES, VECTORS = tile.columns, tile.lanes, tile.vectors  # queries a block
    ROWS = divisor(hs, tile.rows)
    head_tile = Tile(ROWS, VECTORS, LANES)
    A_WORD, WORD, dot = arithmetic.values, arithmetic.word, arithmetic.dot
    PAIRED, NARROW = arithmetic.narrow is not None, narrow is not None
    DEPTH = -(-hs // A_WORD)

    @T.macro
    def load_queries(q, qkv, b, h, first, S):
        # Scaled here once, and to base 2: exp(x) = 2^(x log2 e).
        for c in range(NQ):
            for d in range(hs):
                q[d, c] = qkv[b, T.min(first + c, S - 1), h * hs + d] * T.float32(scale * LOG2_E)

    @T.macro
    def join_rows(words, rows, count):
        for j in range(count):
            for v in T.unroll(VECTORS):
                words[j, T.ramp(v * LANES, 1, LANES)] = pair(
                    rows[2 * j, T.ramp(v * LANES, 1, LANES)], rows[2 * j + 1, T.ramp(v * LANES, 1, LANES)]
                )

    @T.macro
    def score(scores, q, keys, b, h, count, first_key):
        acc = T.alloc_buffer((ROWS, NQ), "float32")
        clear(head_tile, acc)
        for d in range(DEPTH):
            for i in T.unroll(ROWS):
                for v in T.unroll(VECTORS):
                    acc[i, T.ramp(v * LANES, 1, LANES)] = dot(
                        acc[i, T.ramp(v * LANES, 1, LANES)],
                        key(keys, b, h, T.min(first_key + i, count - 1), d),
                        q[d, T.ramp(v * LANES, 1, LANES)],
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
    def weigh_values(mixed, weights, values, b, h, first_column, count):
        acc = T.alloc_buffer((ROWS, NQ), "float32")
        clear(head_tile, acc)
        for j in range(count):
            for i in T.unroll(ROWS):
                for v in T.unroll(VECTORS):
                    acc[i, T.ramp(v * LANES, 1, LANES)] = dot(
                        acc[i, T.ramp(v * LANES, 1, LANES)],
                        value(values, b, h, j, first_column + i),
                        weights[j, T.ramp(v * LANES, 1, LANES)],
                    )
        for i in T.unroll(ROWS):
            for v in T.unroll(VECTORS):
                for lane in T.vectorized(LANES):
                    mixed[first_column + i, v * LANES + lane] = acc[i, v * LANES + lane]

    @T.macro
    def put_words(out, mixed, total, b, h, first, c, part):
        together = T.alloc_buffer((AT_ONCE,), "float32")
        for lane in T.vectorized(AT_ONCE):
            together[lane] = mixed[part * AT_ONCE + lane, c] / total[c]
        words = T.meta_var(AT_ONCE // 2)
        place = T.meta_var(h * (hs // 2) + part * words)
        out[b, first + c, T.ramp(place, 1, words)] = narrow.narrow(together[T.ramp(0, 1, AT_ONCE)])

    @T.macro
    def attend(out, scores, qkv, keys, values, b, h, first, S, offset):
        count = T.meta_var(offset + T.min(first + NQ, S))  # of the keys that a query of the block sees
        q = T.alloc_buffer((DEPTH * A_WORD, NQ), "float32")
        highest = T.alloc_buffer((NQ,), "float32")
        total = T.alloc_buffer((NQ,), "float32")
        mixed = T.alloc_buffer((hs, NQ), "float32")
        load_queries(q, qkv, b, h, first, S)
        if PAIRED:
            words = T.alloc_buffer((DEPTH, NQ), WORD)
            if hs < DEPTH * A_WORD:
                for c in T.vectorized(NQ):
                    q[hs, c] = T.float32(0)
            join_rows(words, q, DEPTH)
            for block in range((count + ROWS - 1) // ROWS):
                score(scores, words, keys, b, h, count, block * ROWS)
        else:
            for block in range((count + ROWS - 1) // ROWS):
                score(scores, q, keys, b, h, count, block * ROWS)
        softmax(scores, highest, total, offset + first, count)
        if PAIRED:
            weights = T.alloc_buffer(((offset + S) // 2 + 1, NQ), WORD)
            for c in T.vectorized(NQ):
                scores[count, c] = T.float32(0)
            join_rows(weights, scores, (count + 1) // 2)
            for block in range(hs // ROWS):
                weigh_values(mixed, weights, values, b, h, block * ROWS, (count + 1) // 2)
        else:
            for block in range(hs // ROWS):
                weigh_values(mixed, scores, values, b, h, block * ROWS, count)
        for c in range(T.min(NQ, S - first)):
            if NARROW:
                for part in range(hs // AT_ONCE):
                    put_words(out, mixed, total, b, h, first, c, part)
            else:
                for d in range(hs):
                    out[b, first + c, h * hs + d] = mixed[d, c] / total[c]

    return attend
