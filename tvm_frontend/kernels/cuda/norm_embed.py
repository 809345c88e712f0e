"""LayerNorm and the embedding, both bound by memory. See `device/norm_embed.cuh`."""

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cuda.launch import Launcher, store_policy, template

WARPS = 4  # of a LayerNorm block; each normalises one row
MAX_C = 4096  # A warp keeps a row in registers, C / 32 a lane.
THREADS = 128  # of an embedding block


def layer_norm(C: int, epsilon: float, traits: str, out_dtype: str, launcher: Launcher) -> tvm.tirx.PrimFunc:
    """Build out = (x - mean) / √(variance + epsilon) · gain + bias in float32 (https://arxiv.org/abs/1607.06450).

    Arguments: x [B, T, C], gain [C], bias [C], all float32, out [B, T, C] of out_dtype. traits: the
    DTypeTraits of a 16-bit out.
    """
    normalise = launcher.launch(template("layer_norm", C, WARPS, store_policy(out_dtype, traits)), 32 * WARPS)

    @T.prim_func(s_tir=True, private=True)
    def fused(
        x_handle: T.handle, gain: T.Buffer((C,), "float32"), bias: T.Buffer((C,), "float32"), out_handle: T.handle
    ):
        T.func_attr({"tirx.noalias": True})
        B, S = T.int64(), T.int64()
        x = T.match_buffer(x_handle, (B, S, C), "float32")
        out = T.match_buffer(out_handle, (B, S, C), out_dtype)
        normalise(
            (B * S + WARPS - 1) // WARPS, 1, 1,
            [x.data, gain.data, bias.data, out.data, T.Cast("int32", B * S), T.float32(epsilon)],
        )  # fmt: skip

    return fused


def embedding(V: int, block_size: int, C: int, launcher: Launcher, *, behind: bool) -> tvm.tirx.PrimFunc:
    """Build out[b, t] = tokens[ids[b, t]] + positions[t] in float32; with `behind`, positions[pos[b] + t].

    Arguments: tokens [V, C], ids [B, T] int64, positions [block_size, C], pos [B] int64 if `behind`, out [B, T, C].
    Neither ids nor positions are checked on the device; the session checks them (`tvm_frontend.runtime.session`).
    """
    embed = launcher.launch(template("embed", C, THREADS, behind), THREADS)

    if behind:

        @T.prim_func(s_tir=True, private=True)
        def fused(
            tokens: T.Buffer((V, C), "float32"),
            ids_handle: T.handle,
            positions: T.Buffer((block_size, C), "float32"),
            pos_handle: T.handle,
            out_handle: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            B, S = T.int64(), T.int64()
            ids = T.match_buffer(ids_handle, (B, S), "int64")
            pos = T.match_buffer(pos_handle, (B,), "int64")
            out = T.match_buffer(out_handle, (B, S, C), "float32")
            embed(S, B, 1, [tokens.data, ids.data, positions.data, pos.data, out.data, T.Cast("int32", S)])

    else:

        @T.prim_func(s_tir=True, private=True)
        def fused(
            tokens: T.Buffer((V, C), "float32"),
            ids_handle: T.handle,
            positions: T.Buffer((block_size, C), "float32"),
            out_handle: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            B, S = T.int64(), T.int64()
            ids = T.match_buffer(ids_handle, (B, S), "int64")
            out = T.match_buffer(out_handle, (B, S, C), "float32")
            embed(S, B, 1, [tokens.data, ids.data, positions.data, ids.data, out.data, T.Cast("int32", S)])

    return fused
