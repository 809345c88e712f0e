"""Causal self-attention over a preallocated KV cache, to which it appends this step's keys and values in place.

Up to DECODE_QUERIES new tokens, a task is one head, and each of its queries is a GEMV over the cache. What binds is
reading that head's keys and values once, so the vector lanes hold consecutive elements of a cache row:

    for each sequence and head, in parallel                          elements of hs across the lanes
        for each new token t                                               | v0 v1 v2 … | v16 v17 … |
            append k[t], v[t] to the cache                           key j   *  *  *       *   *
            1  for each KEYS = 4 keys j <= pos + t                   q     | q0 q1 q2 … | q16 q17 … |
                   scores[j] = k[j] · q                                     → horizontal_reduce
            2  softmax: row_max, exp2, row_sum                       scores [length], keys across the lanes, in L1
            3  for each key j:  out_acc += scores[j] * v[j]          out_acc [hs] in registers

With more queries, prefill, it is `attention`'s kernel with the cache as keys and values; a cache of fewer bits is
dequantised to float32 first.
"""

from operator import add

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.attention import AttentionBuffers, QueryBlock, query_block_attention
from tvm_frontend.kernels.cpu.formats import FP32, VEC_LANES, GemmFormat, activation_row
from tvm_frontend.kernels.cpu.intrinsics import import_llvm
from tvm_frontend.kernels.cpu.kv_layout import KvLayout
from tvm_frontend.kernels.cpu.math import LOG2_E, exp2
from tvm_frontend.kernels.cpu.register_tile import Tile, broadcast, horizontal_reduce, vector_slice

LOWEST = -3.4e38  # about -FLT_MAX
DECODE_QUERIES = 4  # up to this many queries use the GEMV-style decode path
KEYS = 4  # keys scored at a time, with independent accumulators


def cached_attention(
    nh: int, length: int, tile: Tile, layout: KvLayout, scale: float, bf16_out: GemmFormat | None = None
) -> tvm.tirx.PrimFunc:
    """Return the kernel that appends this step's k, v to the cache, then attends over all of it; sums are fp32.

    Its arguments: qkv [B, T, 3 · nh · hs], pos [B] int64 (rows already filled, per sequence; pos + T ≤ length is not
    checked here), keys and values [B, nh, length, layout.elements] of layout.dtype, out [B, T, nh · hs]. Query t of b
    sees keys up to pos[b] + t. bf16_out: as in `causal_attention`.
    """
    hs, C, NQ = layout.hs, nh * layout.hs, tile.nr
    LANES, VECTORS, SCORE_LANES, ELEMENTS = layout.lanes, layout.vectors, tile.lanes, layout.elements
    PADDED, FULL, TAIL = LANES * VECTORS, hs // LANES, hs % LANES  # PADDED: hs in whole vectors
    DEQUANTISES = layout.convert is not None
    load, row_scale, store_row = layout.load, layout.scale, layout.store_row
    OUT = activation_row(C, bf16_out)
    llvm = import_llvm(*layout.intrinsics, *(bf16_out.intrinsics if bf16_out else ()))
    attend_block = query_block_attention(
        hs,
        tile,
        scale,
        FP32,
        load_key=lambda buffers, b, h, j, d: buffers.keys[b, h, j, d],
        load_value=lambda buffers, b, h, j, d: buffers.values[b, h, j, d],
        bf16_out=bf16_out,
    )

    add_lanes = horizontal_reduce(LANES, add)
    add_scores, max_scores = horizontal_reduce(SCORE_LANES, add), horizontal_reduce(SCORE_LANES, T.max)

    @T.macro
    def append(buffers, b, h, t, row):
        store_row(buffers.keys, b, h, row, buffers.qkv, t, C + h * hs)
        store_row(buffers.values, b, h, row, buffers.qkv, t, 2 * C + h * hs)

    @T.macro
    def dequantise(fp32, cache, b, h, rows):
        for row in range(rows):
            for v in T.unroll(VECTORS):
                fp32[b, h, row, vector_slice(v * LANES, LANES)] = load(cache, b, h, row, v) * broadcast(
                    row_scale(cache, b, h, row), LANES
                )

    @T.macro
    def score_keys(scores, q, keys, b, h, first_key, count):
        """scores[first_key : first_key + KEYS] = keys · q; beyond the last key, of `count`, it is repeated."""
        partial = T.alloc_buffer((KEYS, LANES), "float32")
        for i in T.unroll(KEYS):
            for lane in T.vectorized(LANES):
                partial[i, lane] = T.float32(0)
        for v in T.unroll(VECTORS):
            for i in T.unroll(KEYS):
                partial[i, vector_slice(0, LANES)] = (
                    partial[i, vector_slice(0, LANES)]
                    + load(keys, b, h, T.min(first_key + i, count - 1), v) * q[vector_slice(v * LANES, LANES)]
                )
        for i in T.unroll(KEYS):
            add_lanes(partial, i)
            scores[first_key + i] = partial[i, 0] * row_scale(keys, b, h, T.min(first_key + i, count - 1))

    @T.macro
    def softmax(scores, row_max, row_sum, count):
        """scores = exp2(scores - row_max[0, 0]), over `count` keys; row_sum[0, 0] is their sum."""
        # Pad the scores to a full vector with about -FLT_MAX: zero softmax weight.
        for j in range((count + SCORE_LANES - 1) // SCORE_LANES * SCORE_LANES - count):
            scores[count + j] = T.float32(LOWEST)
        for lane in T.vectorized(SCORE_LANES):
            row_max[0, lane] = T.float32(LOWEST)
            row_sum[0, lane] = T.float32(0)
        for v in range((count + SCORE_LANES - 1) // SCORE_LANES):
            for lane in T.vectorized(SCORE_LANES):
                row_max[0, lane] = T.max(row_max[0, lane], scores[v * SCORE_LANES + lane])
        max_scores(row_max, 0)
        for v in range((count + SCORE_LANES - 1) // SCORE_LANES):
            for lane in T.vectorized(SCORE_LANES):
                scores[v * SCORE_LANES + lane] = exp2(scores[v * SCORE_LANES + lane] - row_max[0, 0])
            for lane in T.vectorized(SCORE_LANES):
                row_sum[0, lane] = row_sum[0, lane] + scores[v * SCORE_LANES + lane]
        add_scores(row_sum, 0)

    @T.macro
    def store_packed(out, out_acc, row_sum, b, h, t, part):
        """VEC_LANES elements of query t as pairs of bf16."""
        pairs = T.meta_var(VEC_LANES // 2)
        out[b, t, T.ramp(h * (hs // 2) + part * pairs, 1, pairs)] = OUT.convert(
            out_acc[T.ramp(part * VEC_LANES, 1, VEC_LANES)] / T.broadcast(row_sum[0, 0], VEC_LANES)
        )

    @T.macro
    def decode(buffers, b, h, t, count):
        """out[b, t, h] = attention of query t over the first `count` keys of the cache."""
        q = T.alloc_buffer((PADDED,), "float32")
        scores = T.alloc_buffer((length + max(KEYS, SCORE_LANES),), "float32")
        row_max = T.alloc_buffer((1, SCORE_LANES), "float32")
        row_sum = T.alloc_buffer((1, SCORE_LANES), "float32")
        out_acc = T.alloc_buffer((PADDED,), "float32")
        for v in T.unroll(VECTORS):
            for lane in T.vectorized(LANES):
                q[v * LANES + lane] = T.float32(0)
                out_acc[v * LANES + lane] = T.float32(0)
        for v in T.unroll(FULL):
            for lane in T.vectorized(LANES):
                q[v * LANES + lane] = buffers.qkv[b, t, h * hs + v * LANES + lane] * T.float32(scale * LOG2_E)
        for d in range(TAIL):
            q[FULL * LANES + d] = buffers.qkv[b, t, h * hs + FULL * LANES + d] * T.float32(scale * LOG2_E)
        for tile_of_keys in range((count + KEYS - 1) // KEYS):
            score_keys(scores, q, buffers.keys, b, h, tile_of_keys * KEYS, count)
        softmax(scores, row_max, row_sum, count)
        for j in range(count):
            for v in T.unroll(VECTORS):
                out_acc[vector_slice(v * LANES, LANES)] = out_acc[vector_slice(v * LANES, LANES)] + broadcast(
                    scores[j] * row_scale(buffers.values, b, h, j), LANES
                ) * load(buffers.values, b, h, j, v)
        if bf16_out is not None:
            for part in T.unroll(hs // VEC_LANES):
                store_packed(buffers.out, out_acc, row_sum, b, h, t, part)
        else:
            for v in T.unroll(FULL):
                for lane in T.vectorized(LANES):
                    buffers.out[b, t, h * hs + v * LANES + lane] = out_acc[v * LANES + lane] / row_sum[0, 0]
            for d in range(TAIL):
                buffers.out[b, t, h * hs + FULL * LANES + d] = out_acc[FULL * LANES + d] / row_sum[0, 0]

    @T.macro
    def prefill(buffers, pos, B, S):
        blocks = T.meta_var((S + NQ - 1) // NQ)
        for task in T.parallel(B * nh * blocks):
            b = T.meta_var(task // (nh * blocks))
            h = T.meta_var(task // blocks % nh)
            scores = T.alloc_buffer((length + tile.mr, NQ), "float32")
            attend_block(buffers, scores, QueryBlock(b, h, task % blocks * NQ, S, pos[b]))

    @T.prim_func(s_tir=True, private=True)
    def attend(
        qkv_handle: T.handle, pos_handle: T.handle, k_handle: T.handle, v_handle: T.handle, out_handle: T.handle
    ):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        qkv = T.match_buffer(qkv_handle, (B, S, 3 * C), "float32")
        pos = T.match_buffer(pos_handle, (B,), "int64")
        keys = T.match_buffer(k_handle, (B, nh, length, ELEMENTS), layout.dtype)
        values = T.match_buffer(v_handle, (B, nh, length, ELEMENTS), layout.dtype)
        out_btc = T.match_buffer(out_handle, (B, S, C), OUT.dtype)
        out = T.decl_buffer((B, S, OUT.elements), OUT.storage_dtype, data=out_btc.data)
        buffers = T.meta_var(AttentionBuffers(qkv, out, keys, values))
        if S <= DECODE_QUERIES:
            for head in T.parallel(B * nh, annotations=llvm):
                for t in range(S):
                    append(buffers, head // nh, head % nh, t, pos[head // nh] + t)
                    decode(buffers, head // nh, head % nh, t, pos[head // nh] + t + 1)
        else:
            for head in T.parallel(B * nh):
                for t in range(S):
                    append(buffers, head // nh, head % nh, t, pos[head // nh] + t)
            if DEQUANTISES:
                fp32_keys = T.alloc_buffer((B, nh, length, PADDED), "float32")
                fp32_values = T.alloc_buffer((B, nh, length, PADDED), "float32")
                for head in T.parallel(B * nh):
                    dequantise(fp32_keys, keys, head // nh, head % nh, pos[head // nh] + S)
                    dequantise(fp32_values, values, head // nh, head % nh, pos[head // nh] + S)
                prefill(AttentionBuffers(qkv, out, fp32_keys, fp32_values), pos, B, S)
            else:
                prefill(buffers, pos, B, S)

    return attend
