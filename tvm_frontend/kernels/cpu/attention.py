"""Fused causal self-attention on packed QKV, output as concatenated heads, without a T x T matrix of scores.

A task is one head and one block of NQ = NR queries; what it keeps is a strip of scores [T, NQ], in L2. The queries of
the block lie across the vector lanes, so that softmax needs no reduction across lanes, and both products are the
register tile of `linear`, with keys and values read by broadcasts:

              NQ queries →                              for each task: sequence b, head h, block of NQ queries
    scores   +-----------------+                          1  for each MR keys j ≤ the last query       qk_gemm
    [T, NQ]  | key 0: q0 q1 …  |  one row: NQ lanes            for d in hs: acc[MR, NQ] += k[j, d] * q[d]
             | key 1: q0 q1 …  |                          2  for each key j: row_max, exp2, row_sum    softmax
             | …               |                          3  for each MR elements d of hs              pv_gemm
             +-----------------+                               for j: acc[MR, NQ] += v[j, d] * p[j]
    out_acc  | element 0       |                          4  out[query, d] = out_acc[d, query] / row_sum[query]
    [hs, NQ] | …               |

q [hs, NQ] is in L1 in step 1; the head's keys and values, T * hs each, are read once per block. Keys after the block's
last query are never touched. In bf16 keys and values are packed once for all blocks, two elements of a key or two keys'
values per int32, and so are q and p.

Bound by FMA throughput: 4 · T · C / 2 flops per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.formats import VEC_LANES, GemmFormat, activation_row
from tvm_frontend.kernels.cpu.intrinsics import import_llvm, pack_bf16_pairs
from tvm_frontend.kernels.cpu.kv_layout import kv_layout
from tvm_frontend.kernels.cpu.math import LOG2_E, exp2
from tvm_frontend.kernels.cpu.microkernel import NO_BUFFER
from tvm_frontend.kernels.cpu.register_tile import Tile, clear, pow2_divisor


@dataclass(frozen=True, eq=False)
class AttentionBuffers:
    """The buffers of attention; NO_BUFFER for keys and values that are read from qkv."""

    qkv: T.Buffer  # float32 [B, S, 3 C]: q, k, v; heads side by side
    out: T.Buffer  # [B, S, C] float32, or [B, S, C/2] pairs of bf16
    keys: T.Buffer | None = NO_BUFFER
    values: T.Buffer | None = NO_BUFFER


@dataclass(frozen=True, eq=False)
class QueryBlock:
    """A block of at most NQ queries of one head: query `first` + i of S, at position pos + first + i."""

    b: Expr
    h: Expr
    first: Expr
    S: Expr
    pos: Expr


def causal_attention(
    nh: int, hs: int, tile: Tile, scale: float, fmt: GemmFormat, bf16_out: GemmFormat | None = None
) -> tvm.tirx.PrimFunc:
    """Return the kernel of out[b, t, h] = softmax(scale · q[t] · k[≤ t]) · v[≤ t] for each head h; softmax is fp32.

    Its arguments: qkv [B, T, 3 · nh · hs] (all of q, then k, then v; heads side by side), out [B, T, nh · hs]. fmt: of
    the products, fp32 or native bf16. bf16_out: the format bf16 if out is emitted as bfloat16, which needs hs to be a
    multiple of VEC_LANES.
    """
    C, NQ, BF16 = nh * hs, tile.nr, fmt.convert is not None
    layout = kv_layout(hs, fmt, tile)
    PADDED = layout.lanes * layout.vectors  # hs, padded to whole vectors
    OUT = activation_row(C, bf16_out)
    llvm = import_llvm(*fmt.intrinsics, *(bf16_out.intrinsics if bf16_out else ()))
    store_key = layout.store_row

    def load_key(buffers, b, h, j, d):
        return buffers.keys[b, h, j, d] if BF16 else buffers.qkv[b, j, C + h * hs + d]

    def load_value(buffers, b, h, j, d):
        return buffers.values[b, h, j, d] if BF16 else buffers.qkv[b, j, 2 * C + h * hs + d]

    attend_block = query_block_attention(hs, tile, scale, fmt, load_key, load_value, bf16_out)

    @T.macro
    def store_value_pair(values, qkv, b, h, j, S):
        """values[b, h, j] = the values of keys 2 j and 2 j + 1, packed; beyond the last key there are zeros."""
        both = T.alloc_buffer((2, PADDED), "float32")
        for i in T.unroll(2):
            for d in range(PADDED):
                both[i, d] = T.float32(0)
        for i in range(T.min(2, S - 2 * j)):
            for d in range(hs):
                both[i, d] = qkv[b, 2 * j + i, 2 * C + h * hs + d]
        for v in T.unroll(PADDED // VEC_LANES):
            values[b, h, j, T.ramp(v * VEC_LANES, 1, VEC_LANES)] = pack_bf16_pairs(
                both[0, T.ramp(v * VEC_LANES, 1, VEC_LANES)], both[1, T.ramp(v * VEC_LANES, 1, VEC_LANES)]
            )

    @T.macro
    def attend_blocks(buffers, B, S):
        blocks = T.meta_var((S + NQ - 1) // NQ)
        for task in T.parallel(B * nh * blocks, annotations=llvm):
            b = T.meta_var(task // (nh * blocks))
            h = T.meta_var(task // blocks % nh)
            scores = T.alloc_buffer((S + tile.mr, NQ), "float32")
            attend_block(buffers, scores, QueryBlock(b, h, task % blocks * NQ, S, pos=T.int64(0)))

    @T.prim_func(s_tir=True, private=True)
    def attend(qkv_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        qkv = T.match_buffer(qkv_handle, (B, S, 3 * C), "float32")
        out_btc = T.match_buffer(out_handle, (B, S, C), OUT.dtype)
        out = T.decl_buffer((B, S, OUT.elements), OUT.storage_dtype, data=out_btc.data)
        if BF16:
            keys = T.alloc_buffer((B, nh, S, layout.elements), "int32")
            values = T.alloc_buffer((B, nh, (S + 1) // 2, PADDED), "int32")
            for head in T.parallel(B * nh):
                for j in range(S):
                    store_key(keys, head // nh, head % nh, j, qkv, j, C + head % nh * hs)
                for j in range((S + 1) // 2):
                    store_value_pair(values, qkv, head // nh, head % nh, j, S)
            attend_blocks(AttentionBuffers(qkv, out, keys, values), B, S)
        else:
            attend_blocks(AttentionBuffers(qkv, out), B, S)

    return attend


def query_block_attention(
    hs: int,
    tile: Tile,
    scale: float,
    fmt: GemmFormat,
    load_key: Callable,
    load_value: Callable,
    bf16_out: GemmFormat | None,
) -> Callable:
    """Build a macro (buffers, scores, block: QueryBlock) that attends with one block of queries.

    load_key(buffers, b, h, j, d) loads packed element d of key j; load_value(buffers, b, h, j, d) loads element d of
    value j, or, when two bf16 share an int32, of values 2 j and 2 j + 1. scores: room for [pos + S + MR, NQ] float32.
    bf16_out: as in `causal_attention`; buffers.out has pairs then.
    """
    NQ, LANES, VECTORS = tile.nr, tile.lanes, tile.nr_vectors
    MR = pow2_divisor(hs, tile.mr)  # keys per tile of qk_gemm, elements of hs per tile of pv_gemm
    head_tile = Tile(MR, VECTORS, LANES)
    PACK, STORAGE, dot = fmt.pack_factor, fmt.storage_dtype, fmt.dot
    BF16 = fmt.convert is not None
    DEPTH = -(-hs // PACK)  # storage elements of a key
    convert_out = activation_row(hs, bf16_out).convert

    @T.macro
    def load_queries(q, qkv, block):
        """q[d, c] = the block's queries, transposed, and scaled for exp2: exp(x) = 2^(x log2 e)."""
        for c in range(NQ):
            for d in range(hs):
                q[d, c] = qkv[block.b, T.min(block.first + c, block.S - 1), block.h * hs + d] * T.float32(
                    scale * LOG2_E
                )

    @T.macro
    def pack_row_pairs(packed, rows, count):
        """packed[j] = rows 2 j and 2 j + 1 as pairs of bf16."""
        for j in range(count):
            for v in T.unroll(VECTORS):
                packed[j, T.ramp(v * LANES, 1, LANES)] = pack_bf16_pairs(
                    rows[2 * j, T.ramp(v * LANES, 1, LANES)], rows[2 * j + 1, T.ramp(v * LANES, 1, LANES)]
                )

    @T.macro
    def qk_gemm(scores, q, buffers, block, keys, first_key):
        """scores[first_key : first_key + MR] = keys · q; rows beyond the last key repeat it."""
        acc = T.alloc_buffer((MR, NQ), "float32")
        clear(head_tile, acc)
        for d in range(DEPTH):
            for i in T.unroll(MR):
                for v in T.unroll(VECTORS):
                    acc[i, T.ramp(v * LANES, 1, LANES)] = dot(
                        acc[i, T.ramp(v * LANES, 1, LANES)],
                        load_key(buffers, block.b, block.h, T.min(first_key + i, keys - 1), d),
                        q[d, T.ramp(v * LANES, 1, LANES)],
                    )
        for i in T.unroll(MR):
            for v in T.unroll(VECTORS):
                for lane in T.vectorized(LANES):
                    scores[first_key + i, v * LANES + lane] = acc[i, v * LANES + lane]

    @T.macro
    def softmax(scores, row_max, row_sum, first_position, keys):
        """scores = exp2(scores - row_max), 0 where masked: query c sees the keys j <= first_position + c."""
        for c in T.vectorized(NQ):
            row_max[c] = scores[0, c]
            row_sum[c] = T.float32(0)
        for j in range(keys):
            for c in T.vectorized(NQ):
                row_max[c] = T.max(row_max[c], T.Select(j <= first_position + c, scores[j, c], row_max[c]))
        for j in range(keys):
            for c in T.vectorized(NQ):
                scores[j, c] = T.Select(j <= first_position + c, exp2(scores[j, c] - row_max[c]), T.float32(0))
            for c in T.vectorized(NQ):
                row_sum[c] = row_sum[c] + scores[j, c]

    @T.macro
    def pv_gemm(out_acc, p, buffers, block, first_element, rows):
        """out_acc[first_element : first_element + MR] = values · p, over `rows` rows of p: keys, or pairs of them."""
        acc = T.alloc_buffer((MR, NQ), "float32")
        clear(head_tile, acc)
        for j in range(rows):
            for i in T.unroll(MR):
                for v in T.unroll(VECTORS):
                    acc[i, T.ramp(v * LANES, 1, LANES)] = dot(
                        acc[i, T.ramp(v * LANES, 1, LANES)],
                        load_value(buffers, block.b, block.h, j, first_element + i),
                        p[j, T.ramp(v * LANES, 1, LANES)],
                    )
        for i in T.unroll(MR):
            for v in T.unroll(VECTORS):
                for lane in T.vectorized(LANES):
                    out_acc[first_element + i, v * LANES + lane] = acc[i, v * LANES + lane]

    @T.macro
    def store_packed(out, out_acc, row_sum, block, c, part):
        """VEC_LANES elements of query c as pairs of bf16."""
        values = T.alloc_buffer((VEC_LANES,), "float32")
        for lane in T.vectorized(VEC_LANES):
            values[lane] = out_acc[part * VEC_LANES + lane, c] / row_sum[c]
        pairs = T.meta_var(VEC_LANES // 2)
        index = T.meta_var(block.h * (hs // 2) + part * pairs)
        out[block.b, block.first + c, T.ramp(index, 1, pairs)] = convert_out(values[T.ramp(0, 1, VEC_LANES)])

    @T.macro
    def attend(buffers, scores, block):
        keys = T.meta_var(block.pos + T.min(block.first + NQ, block.S))  # that a query of the block sees
        q = T.alloc_buffer((DEPTH * PACK, NQ), "float32")
        row_max = T.alloc_buffer((NQ,), "float32")
        row_sum = T.alloc_buffer((NQ,), "float32")
        out_acc = T.alloc_buffer((hs, NQ), "float32")
        load_queries(q, buffers.qkv, block)
        if BF16:
            packed_q = T.alloc_buffer((DEPTH, NQ), STORAGE)
            if hs < DEPTH * PACK:
                for c in T.vectorized(NQ):
                    q[hs, c] = T.float32(0)
            pack_row_pairs(packed_q, q, DEPTH)
            for tile_of_keys in range((keys + MR - 1) // MR):
                qk_gemm(scores, packed_q, buffers, block, keys, tile_of_keys * MR)
        else:
            for tile_of_keys in range((keys + MR - 1) // MR):
                qk_gemm(scores, q, buffers, block, keys, tile_of_keys * MR)
        softmax(scores, row_max, row_sum, block.pos + block.first, keys)
        if BF16:
            packed_p = T.alloc_buffer(((block.pos + block.S) // 2 + 1, NQ), STORAGE)
            for c in T.vectorized(NQ):
                scores[keys, c] = T.float32(0)
            pack_row_pairs(packed_p, scores, (keys + 1) // 2)
            for tile_of_elements in range(hs // MR):
                pv_gemm(out_acc, packed_p, buffers, block, tile_of_elements * MR, (keys + 1) // 2)
        else:
            for tile_of_elements in range(hs // MR):
                pv_gemm(out_acc, scores, buffers, block, tile_of_elements * MR, keys)
        for c in range(T.min(NQ, block.S - block.first)):
            if bf16_out is not None:
                for part in range(hs // VEC_LANES):
                    store_packed(buffers.out, out_acc, row_sum, block, c, part)
            else:
                for d in range(hs):
                    buffers.out[block.b, block.first + c, block.h * hs + d] = out_acc[d, c] / row_sum[c]

    return attend
