"""Causal attention in blocks that stay in registers and shared memory; see `device/attention.cuh`."""

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cuda.launch import Launcher, template

ROWS, THREADS = 64, 128  # queries and threads of a block: attention_rows and attention_threads there
LOG2_E = 1.4426950408889634


def has_attention(hs: int, scale: float) -> bool:
    """Whether there is a kernel for heads of that size: whole tiles of 16, which the registers hold."""
    return hs % 16 == 0 and 16 <= hs <= 128 and scale > 0


def attention_shared_bytes(hs: int) -> int:
    """Two stages of keys and values, their rows 16 bytes apart."""
    return 4 * ROWS * (2 * hs + 16)


def causal_attention(nh: int, hs: int, scale: float, number: str, dtype: str, launcher: Launcher) -> tvm.tirx.PrimFunc:
    """out = softmax(q · kᵀ · scale, causal) · v of each head, sums and softmax in float32.

    Arguments: qkv [B, T, 3 · nh · hs], out [B, T, nh · hs], both of dtype.
    """
    C = nh * hs
    attend = launcher.launch(template("causal_attention", number, nh, hs), THREADS, attention_shared_bytes(hs))

    @T.prim_func(s_tir=True, private=True)
    def fused(qkv_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        qkv = T.match_buffer(qkv_handle, (B, S, 3 * C), dtype)
        out = T.match_buffer(out_handle, (B, S, C), dtype)
        attend((S + ROWS - 1) // ROWS, nh, B, [qkv.data, out.data, T.Cast("int32", S), T.float32(scale * LOG2_E)])

    return fused
