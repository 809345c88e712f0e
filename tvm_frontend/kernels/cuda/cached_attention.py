"""Attention over a KV cache on the device, which it also writes; see `device/cached_attention.cuh`."""

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cuda.attention import LOG2_E, ROWS, THREADS, attention_shared_bytes
from tvm_frontend.kernels.cuda.launch import Launcher, template

PART_KEYS, PART_THREADS = 128, 128  # part_keys and part_threads there


def cached_attention(
    nh: int, hs: int, length: int, scale: float, number: str, dtype: str, launcher: Launcher
) -> tvm.tirx.PrimFunc:
    """The rows of qkv behind pos[b] go into the cache, and each query attends to all up to its own.

    Arguments: qkv [B, T, 3 · nh · hs] of dtype, pos [B] int64, keys and values [B, nh, length, hs] in its bits, as
    uint16, out [B, T, nh · hs] of dtype.
    """
    C, scale = nh * hs, scale * LOG2_E
    parts_of_row = -(-length // PART_KEYS)  # for the longest; on the device those beyond pos end at once
    append = launcher.launch(template("append_rows", nh, hs, length, THREADS), THREADS)
    attend = launcher.launch(template("attend_to_cache", number, nh, hs, length), THREADS, attention_shared_bytes(hs))
    attend_part = launcher.launch(
        template("attend_to_part", number, nh, hs, length), PART_THREADS, 4 * (PART_KEYS + PART_THREADS // 32 * hs)
    )
    join = launcher.launch(template("join_parts", number, nh, hs), hs)

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
            parts = T.alloc_buffer((B, nh, parts_of_row, hs + 2), "float32")
            attend_part(
                parts_of_row, nh, B,
                [qkv.data, pos.data, keys.data, values.data, parts.data, T.float32(scale)],
            )  # fmt: skip
            join(nh, B, 1, [parts.data, pos.data, out.data, T.int32(parts_of_row), T.float32(scale)])
        else:
            append(S, B, 1, [qkv.data, pos.data, keys.data, values.data, T.Cast("int32", S)])
            attend(
                (S + ROWS - 1) // ROWS, nh, B,
                [qkv.data, pos.data, keys.data, values.data, out.data, T.Cast("int32", S), T.float32(scale)],
            )  # fmt: skip

    return fused
