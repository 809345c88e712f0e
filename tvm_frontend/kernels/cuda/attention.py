"""Causal flash attention on tensor cores. See `device/attention.cuh`."""

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cuda.launch import Launcher, template

BLOCK_Q = BLOCK_KV = 64  # queries of a block, and keys of an iteration; these three are the same in attention.cuh
THREADS = 128
LOG2_E = 1.4426950408889634


def has_attention(hs: int, scale: float) -> bool:
    """Return whether there is a kernel for heads of this size: a multiple of the mma's K, 16, that registers hold."""
    return hs % 16 == 0 and 16 <= hs <= 128 and scale > 0


def attention_shared_bytes(hs: int) -> int:
    """Return the shared memory of a block: two stages of keys and values, each row padded by 16 bytes."""
    return 2 * 2 * BLOCK_KV * (2 * hs + 16)


def causal_attention(nh: int, hs: int, scale: float, traits: str, dtype: str, launcher: Launcher) -> tvm.tirx.PrimFunc:
    """Build out = softmax(q · kᵀ · scale, causal) · v for each head, with accumulation and softmax in float32.

    Arguments: qkv [B, T, 3 · nh · hs], out [B, T, nh · hs], both of dtype, 16 bits. traits: its DTypeTraits.
    """
    C = nh * hs
    attend = launcher.launch(template("causal_attention", traits, nh, hs), THREADS, attention_shared_bytes(hs))

    @T.prim_func(s_tir=True, private=True)
    def fused(qkv_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        qkv = T.match_buffer(qkv_handle, (B, S, 3 * C), dtype)
        out = T.match_buffer(out_handle, (B, S, C), dtype)
        attend((S + BLOCK_Q - 1) // BLOCK_Q, nh, B, [qkv.data, out.data, T.Cast("int32", S), T.float32(scale * LOG2_E)])

    return fused
