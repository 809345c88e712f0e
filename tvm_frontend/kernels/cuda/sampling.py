"""The next token, chosen on the device; see `device/sampling.cuh`."""

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cuda.launch import Launcher, template

THREADS = 512
SHARED_BYTES = 1024 + 8 * THREADS // 32


def choose(V: int, launcher: Launcher) -> tvm.tirx.PrimFunc:
    """ids[b] = text[b, pos[b] + 1] = the token behind pos[b]; pos[b] += 1.

    Arguments: logits [B, 1, V] float32; ids [B, 1], pos [B] and text [B, length] int64, which are written; settings [3]
    float64: how many of the likeliest tokens it is drawn from, the temperature, 0 for the likeliest, and the seed.
    """
    start = launcher.launch(template("choose", V, THREADS), THREADS, SHARED_BYTES)

    @T.prim_func(s_tir=True)
    def chosen(
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

    return chosen
