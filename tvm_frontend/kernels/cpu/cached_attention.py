"""Causal self-attention over a preallocated KV cache, which it updates in place.

With one query or a few, a task is a head: bound by reading that head's keys and values once, which lie in a row each,
so the lanes hold elements of a row. With more queries it is `attention`'s kernel, over the cache, or a copy of it in
float32 where the cache has fewer bits.
"""

from operator import add

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.attention import block_of_queries
from tvm_frontend.kernels.cpu.formats import AT_ONCE, FP32, Arithmetic, row_of
from tvm_frontend.kernels.cpu.kv_layout import CacheRows
from tvm_frontend.kernels.cpu.math import LOG2_E, exp2
from tvm_frontend.kernels.cpu.register_tile import Tile, fold_lanes, span, spread

LOWEST = -3.4e38  # of float32, nearly
FEW = 4  # queries up to which each reads the cache by itself
KEYS = 4  # scored at a time, so that their sums do not wait for one another


def cached_attention(
    nh: int, length: int, tile: Tile, rows: CacheRows, scale: float, narrow: Arithmetic | None = None
) -> tvm.tirx.PrimFunc:
    """Write k, v behind what the cache holds of each sequence, and attend to all of it, float32.

    Arguments: qkv [B, T, 3 · nh · hs], pos [B] int64 (rows filled of each sequence; pos + T ≤ length is not checked
    here), keys and values [B, nh, length, rows.words] of rows.dtype, out [B, T, nh · hs]. Query t of b sees keys up to
    pos[b] + t. narrow: as in `causal_attention`.
    """
    hs, C, NQ = rows.hs, nh * rows.hs, tile.columns
    LANES, VECTORS, WIDE, WORDS = rows.lanes, rows.vectors, tile.lanes, rows.words
    FULL, WHOLE, REST = LANES * VECTORS, hs // LANES, hs % LANES  # FULL: hs, or somewhat more
    NARROW, GIVEN_NARROW = rows.narrow is not None, narrow is not None
    read, scale_of, put = rows.read, rows.scale_of, rows.put
    OUT = row_of(C, narrow)
    functions = rows.llvm or (narrow.llvm if narrow else "")
    llvm = {"pragma_import_llvm": functions} if functions else {}
    attend_block = block_of_queries(
        hs,
        tile,
        scale,
        FP32,
        key=lambda keys, b, h, j, d: keys[b, h, j, d],
        value=lambda values, b, h, j, d: values[b, h, j, d],
        narrow=narrow,
    )

    add_key, add_total, find_highest = fold_lanes(LANES, add), fold_lanes(WIDE, add), fold_lanes(WIDE, T.max)

    @T.macro
    def append(qkv, keys, values, b, h, t, row):
        put(keys, b, h, row, qkv, t, C + h * hs)
        put(values, b, h, row, qkv, t, 2 * C + h * hs)

    @T.macro
    def widen(wide, cache, b, h, count):
        for row in range(count):
            for v in T.unroll(VECTORS):
                wide[b, h, row, span(v * LANES, LANES)] = read(cache, b, h, row, v) * spread(
                    scale_of(cache, b, h, row), LANES
                )

    @T.macro
    def score(scores, q, keys, b, h, first_key, count):
        partial = T.alloc_buffer((KEYS, LANES), "float32")
        for i in T.unroll(KEYS):
            for lane in T.vectorized(LANES):
                partial[i, lane] = T.float32(0)
        for v in T.unroll(VECTORS):
            for i in T.unroll(KEYS):
                partial[i, span(0, LANES)] = (
                    partial[i, span(0, LANES)]
                    + read(keys, b, h, T.min(first_key + i, count - 1), v) * q[span(v * LANES, LANES)]
                )
        for i in T.unroll(KEYS):
            add_key(partial, i)
            scores[first_key + i] = partial[i, 0] * scale_of(keys, b, h, T.min(first_key + i, count - 1))

    @T.macro
    def softmax(scores, highest, total, count):
        # Beyond the last key, up to a whole register: weights of nothing.
        for j in range((count + WIDE - 1) // WIDE * WIDE - count):
            scores[count + j] = T.float32(LOWEST)
        for lane in T.vectorized(WIDE):
            highest[0, lane] = T.float32(LOWEST)
            total[0, lane] = T.float32(0)
        for v in range((count + WIDE - 1) // WIDE):
            for lane in T.vectorized(WIDE):
                highest[0, lane] = T.max(highest[0, lane], scores[v * WIDE + lane])
        find_highest(highest, 0)
        for v in range((count + WIDE - 1) // WIDE):
            for lane in T.vectorized(WIDE):
                scores[v * WIDE + lane] = exp2(scores[v * WIDE + lane] - highest[0, 0])
            for lane in T.vectorized(WIDE):
                total[0, lane] = total[0, lane] + scores[v * WIDE + lane]
        add_total(total, 0)

    @T.macro
    def put_words(out, mixed, total, b, h, t, part):
        words = T.meta_var(AT_ONCE // 2)
        out[b, t, T.ramp(h * (hs // 2) + part * words, 1, words)] = narrow.narrow(
            mixed[T.ramp(part * AT_ONCE, 1, AT_ONCE)] / T.broadcast(total[0, 0], AT_ONCE)
        )

    @T.macro
    def attend_one(out, qkv, keys, values, b, h, t, count):
        q = T.alloc_buffer((FULL,), "float32")
        scores = T.alloc_buffer((length + max(KEYS, WIDE),), "float32")
        highest = T.alloc_buffer((1, WIDE), "float32")
        total = T.alloc_buffer((1, WIDE), "float32")
        mixed = T.alloc_buffer((FULL,), "float32")
        for v in T.unroll(VECTORS):
            for lane in T.vectorized(LANES):
                q[v * LANES + lane] = T.float32(0)
                mixed[v * LANES + lane] = T.float32(0)
        for v in T.unroll(WHOLE):
            for lane in T.vectorized(LANES):
                q[v * LANES + lane] = qkv[b, t, h * hs + v * LANES + lane] * T.float32(scale * LOG2_E)
        for d in range(REST):
            q[WHOLE * LANES + d] = qkv[b, t, h * hs + WHOLE * LANES + d] * T.float32(scale * LOG2_E)
        for block in range((count + KEYS - 1) // KEYS):
            score(scores, q, keys, b, h, block * KEYS, count)
        softmax(scores, highest, total, count)
        for j in range(count):
            for v in T.unroll(VECTORS):
                mixed[span(v * LANES, LANES)] = mixed[span(v * LANES, LANES)] + spread(
                    scores[j] * scale_of(values, b, h, j), LANES
                ) * read(values, b, h, j, v)
        if GIVEN_NARROW:
            for part in T.unroll(hs // AT_ONCE):
                put_words(out, mixed, total, b, h, t, part)
        else:
            for v in T.unroll(WHOLE):
                for lane in T.vectorized(LANES):
                    out[b, t, h * hs + v * LANES + lane] = mixed[v * LANES + lane] / total[0, 0]
            for d in range(REST):
                out[b, t, h * hs + WHOLE * LANES + d] = mixed[WHOLE * LANES + d] / total[0, 0]

    @T.macro
    def attend_blocks(out, qkv, keys, values, pos, B, S):
        blocks = T.meta_var((S + NQ - 1) // NQ)
        for task in T.parallel(B * nh * blocks):
            b = T.meta_var(task // (nh * blocks))
            h = T.meta_var(task // blocks % nh)
            scores = T.alloc_buffer((length + tile.rows, NQ), "float32")
            attend_block(out, scores, qkv, keys, values, b, h, task % blocks * NQ, S, pos[b])

    @T.prim_func(s_tir=True, private=True)
    def attend(
        qkv_handle: T.handle, pos_handle: T.handle, k_handle: T.handle, v_handle: T.handle, out_handle: T.handle
    ):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        qkv = T.match_buffer(qkv_handle, (B, S, 3 * C), "float32")
        pos = T.match_buffer(pos_handle, (B,), "int64")
        keys = T.match_buffer(k_handle, (B, nh, length, WORDS), rows.dtype)
        values = T.match_buffer(v_handle, (B, nh, length, WORDS), rows.dtype)
        out_btc = T.match_buffer(out_handle, (B, S, C), OUT[0])
        out = T.decl_buffer((B, S, OUT[2]), OUT[1], data=out_btc.data)
        if S <= FEW:
            for head in T.parallel(B * nh, annotations=llvm):
                for t in range(S):
                    append(qkv, keys, values, head // nh, head % nh, t, pos[head // nh] + t)
                    attend_one(out, qkv, keys, values, head // nh, head % nh, t, pos[head // nh] + t + 1)
        else:
            for head in T.parallel(B * nh):
                for t in range(S):
                    append(qkv, keys, values, head // nh, head % nh, t, pos[head // nh] + t)
            if NARROW:
                wide_keys = T.alloc_buffer((B, nh, length, FULL), "float32")
                wide_values = T.alloc_buffer((B, nh, length, FULL), "float32")
                for head in T.parallel(B * nh):
                    widen(wide_keys, keys, head // nh, head % nh, pos[head // nh] + S)
                    widen(wide_values, values, head // nh, head % nh, pos[head // nh] + S)
                attend_blocks(out, qkv, wide_keys, wide_values, pos, B, S)
            else:
                attend_blocks(out, qkv, keys, values, pos, B, S)

    return attend
