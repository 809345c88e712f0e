"""Sampling of the next token on the device. See `device/sampling.cuh`."""

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cuda.launch import Launcher, template

THREADS = 512
SHARED_BYTES = 4 * 256 + 8 * THREADS // 32  # a histogram of one 8-bit digit; each warp's best score and its token


def sample(V: int, launcher: Launcher) -> tvm.tirx.PrimFunc:
    """Build ids[b] = text[b, pos[b] + 1] = a token sampled from logits[b]; pos[b] += 1.

    Arguments: logits [B, 1, V] float32; settings [3] float64: top_k, the temperature (0 for the argmax) and the seed;
    ids [B, 1], pos [B] and text [B, length] int64, which are written.
    """
    start = launcher.launch(template("sample", V, THREADS), THREADS, SHARED_BYTES)

    @T.prim_func(s_tir=True)
    def sampled(
        logits_handle: T.handle,
        settings: T.Buffer((3,), "float64"),
        ids_handle: T.handle,
        pos_handle: T.handle,
        text_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        B, length = T.int64(), T.int64()
        logits = T.match_buffer(logits_handle, (B, 1, V), "float32")
        ids = T.match_buffer(ids_handle, (B, 1), "int64")
        pos = T.match_buffer(pos_handle, (B,), "int64")
        text = T.match_buffer(text_handle, (B, length), "int64")
        start(B, 1, 1, [logits.data, ids.data, pos.data, text.data, settings.data, T.Cast("int32", length)])

    return sampled
