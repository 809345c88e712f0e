"""Causal self-attention over a preallocated KV cache, which it updates in place.

With one query or a few, a task is a head: bound by reading that head's keys and values once, which lie in a row each,
so the lanes hold elements of a row. With more queries it is `attention`'s kernel, over the cache.
"""

from operator import add

import tvm
from tvm.script import tirx as T

from tvm_frontend.schedules.cpu.attention import block_of_queries
from tvm_frontend.schedules.cpu.elementary import LOG2_E, exp2
from tvm_frontend.schedules.cpu.tile import Tile, divisor, fold_lanes

LOWEST = -3.4e38  # of float32, nearly
FEW = 4  # queries up to which each reads the cache by itself
KEYS = 4  # scored at a time, so that their sums do not wait for one another


def cached_attention(nh: int, hs: int, length: int, tile: Tile, scale: float) -> tvm.tirx.PrimFunc:
    """Write k, v behind what the cache holds of each sequence, and attend to all of it, float32.

    Arguments: qkv [B, T, 3 · nh · hs], pos [B] int64 (rows filled of each sequence; pos + T ≤ length is not checked
    here), keys and values [B, nh, length, hs], out [B, T, nh · hs]. Query t of b sees keys up to pos[b] + t.
    """
    C, NQ = nh * hs, tile.columns
    LANES = divisor(hs, tile.lanes)
    VECTORS, WIDE = hs // LANES, tile.lanes
    attend_block = block_of_queries(
        hs,
        tile,
        scale,
        key=lambda keys, b, h, j, d: keys[b, h, j, d],
        value=lambda values, b, h, j, d: values[b, h, j, d],
    )

    add_key, add_total, find_highest = fold_lanes(LANES, add), fold_lanes(WIDE, add), fold_lanes(WIDE, T.max)

    @T.macro
    def append(qkv, keys, values, b, h, t, row):
        for v in T.unroll(VECTORS):
            for lane in T.vectorized(LANES):
                keys[b, h, row, v * LANES + lane] = qkv[b, t, C + h * hs + v * LANES + lane]
                values[b, h, row, v * LANES + lane] = qkv[b, t, 2 * C + h * hs + v * LANES + lane]

    @T.macro
    def score(scores, q, keys, b, h, first_key, count):
        partial = T.alloc_buffer((KEYS, LANES), "float32", scope="local")
        for i in T.unroll(KEYS):
            for lane in T.vectorized(LANES):
                partial[i, lane] = T.float32(0)
        for v in T.unroll(VECTORS):
            for i in T.unroll(KEYS):
                for lane in T.vectorized(LANES):
                    partial[i, lane] = (
                        partial[i, lane]
                        + keys[b, h, T.min(first_key + i, count - 1), v * LANES + lane] * q[v * LANES + lane]
                    )
        for i in T.unroll(KEYS):
            add_key(partial, i)
            scores[first_key + i] = partial[i, 0]

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
    def attend_one(out, qkv, keys, values, b, h, t, count):
        q = T.alloc_buffer((hs,), "float32", scope="local")
        scores = T.alloc_buffer((length + max(KEYS, WIDE),), "float32")
        highest = T.alloc_buffer((1, WIDE), "float32", scope="local")
        total = T.alloc_buffer((1, WIDE), "float32", scope="local")
        mixed = T.alloc_buffer((hs,), "float32", scope="local")
        for v in T.unroll(VECTORS):
            for lane in T.vectorized(LANES):
                q[v * LANES + lane] = qkv[b, t, h * hs + v * LANES + lane] * T.float32(scale * LOG2_E)
                mixed[v * LANES + lane] = T.float32(0)
        for block in range((count + KEYS - 1) // KEYS):
            score(scores, q, keys, b, h, block * KEYS, count)
        softmax(scores, highest, total, count)
        for j in range(count):
            for v in T.unroll(VECTORS):
                for lane in T.vectorized(LANES):
                    mixed[v * LANES + lane] = mixed[v * LANES + lane] + scores[j] * values[b, h, j, v * LANES + lane]
        for v in T.unroll(VECTORS):
            for lane in T.vectorized(LANES):
                out[b, t, h * hs + v * LANES + lane] = mixed[v * LANES + lane] / total[0, 0]

    @T.prim_func(s_tir=True, private=True)
    def attend(
        qkv_handle: T.handle, pos_handle: T.handle, k_handle: T.handle, v_handle: T.handle, out_handle: T.handle
    ):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        qkv = T.match_buffer(qkv_handle, (B, S, 3 * C), "float32")
        pos = T.match_buffer(pos_handle, (B,), "int64")
        keys = T.match_buffer(k_handle, (B, nh, length, hs), "float32")
        values = T.match_buffer(v_handle, (B, nh, length, hs), "float32")
        out = T.match_buffer(out_handle, (B, S, C), "float32")
        blocks = T.meta_var((S + NQ - 1) // NQ)
        if S <= FEW:
            for head in T.parallel(B * nh):
                for t in range(S):
                    append(qkv, keys, values, head // nh, head % nh, t, pos[head // nh] + t)
                    attend_one(out, qkv, keys, values, head // nh, head % nh, t, pos[head // nh] + t + 1)
        else:
            for head in T.parallel(B * nh):
                for t in range(S):
                    append(qkv, keys, values, head // nh, head % nh, t, pos[head // nh] + t)
            for task in T.parallel(B * nh * blocks):
                b = T.meta_var(task // (nh * blocks))
                h = T.meta_var(task // blocks % nh)
                scores = T.alloc_buffer((length + tile.rows, NQ), "float32")
                attend_block(out, scores, qkv, keys, values, b, h, task % blocks * NQ, S, pos[b])

    return attend
