"""Attention over a KV cache, which the kernels also append to. See `device/cached_attention.cuh`."""

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cuda.attention import BLOCK_Q, LOG2_E, THREADS, attention_shared_bytes
from tvm_frontend.kernels.cuda.launch import Launcher, template

SPLIT_KEYS, SPLIT_THREADS = 128, 128  # the same as in cached_attention.cuh


def cached_attention(
    nh: int, hs: int, length: int, scale: float, traits: str, dtype: str, launcher: Launcher
) -> tvm.tirx.PrimFunc:
    """Append the keys and values of qkv to the cache at pos[b], and attend from each new query up to its own key.

    Arguments: qkv [B, T, 3 · nh · hs] of dtype, pos [B] int64, keys and values [B, nh, length, hs], whose uint16 hold
    the bits of dtype, out [B, T, nh · hs] of dtype. One new token (T = 1) goes the way of split-KV decoding.
    """
    C, scale = nh * hs, scale * LOG2_E
    max_splits = -(-length // SPLIT_KEYS)  # of a full cache; blocks of splits beyond pos return at once
    append = launcher.launch(template("append_kv", nh, hs, length, THREADS), THREADS)
    attend = launcher.launch(template("append_attention", traits, nh, hs, length), THREADS, attention_shared_bytes(hs))
    decode = launcher.launch(
        template("decode_split_kv", traits, nh, hs, length), SPLIT_THREADS, 4 * (SPLIT_KEYS + SPLIT_THREADS // 32 * hs)
    )
    merge = launcher.launch(template("merge_states", traits, nh, hs), hs)

    @T.prim_func(s_tir=True, private=True)
    def fused(qkv_handle: T.handle, pos_handle: T.handle, k_handle: T.handle, v_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        qkv = T.match_buffer(qkv_handle, (B, S, 3 * C), dtype)
        pos = T.match_buffer(pos_handle, (B,), "int64")
        keys = T.match_buffer(k_handle, (B, nh, length, hs), "uint16")
        values = T.match_buffer(v_handle, (B, nh, length, hs), "uint16")
        out = T.match_buffer(out_handle, (B, S, C), dtype)
        if S == 1:
            # TVM passes pointers to a kernel in the order of their names, so a new name here changes the machine code.
            partial_states = T.alloc_buffer((B, nh, max_splits, hs + 2), "float32")
            decode(
                max_splits, nh, B,
                [qkv.data, pos.data, keys.data, values.data, partial_states.data, T.float32(scale)],
            )  # fmt: skip
            merge(nh, B, 1, [partial_states.data, pos.data, out.data, T.int32(max_splits), T.float32(scale)])
        else:
            append(S, B, 1, [qkv.data, pos.data, keys.data, values.data, T.Cast("int32", S)])
            attend(
                (S + BLOCK_Q - 1) // BLOCK_Q, nh, B,
                [qkv.data, pos.data, keys.data, values.data, out.data, T.Cast("int32", S), T.float32(scale)],
            )  # fmt: skip

    return fused
