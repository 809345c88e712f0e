"""Linear layers: a GEMM over packed weights with bias, activation and residual in its epilogue.

Bound by arithmetic when B·T is large (a multiply-add a cycle and unit), by reading the weights once when it is small.
"""

import numpy as np
import tvm
from tvm.script import tirx as T

from tvm_frontend.schedules.cpu.elementary import gelu_exact, gelu_tanh, relu
from tvm_frontend.schedules.cpu.tile import Tile, clear

ACTIVATIONS = {None: lambda x: x, "gelu_tanh": gelu_tanh, "gelu": gelu_exact, "relu": relu}
UNROLL = 4  # steps of k in one turn of the inner loop; without it the loop's own bookkeeping costs up to half
ROWS_A_TASK = 64  # rows of x that one parallel task takes through one panel of weights, at most


def pack_weight(weight: np.ndarray, tile: Tile) -> np.ndarray:
    """Weight [K, N] as panels [ceil(N / columns), K, columns], zeros at the end: what the inner loop reads in order."""
    K, N = weight.shape
    panels = -(-N // tile.columns)
    padded = np.zeros((K, panels * tile.columns), weight.dtype)
    padded[:, :N] = weight
    return np.ascontiguousarray(padded.reshape(K, panels, tile.columns).transpose(1, 0, 2))


def linear(K: int, N: int, tile: Tile, *, activation: str | None, residual: bool) -> tvm.tirx.PrimFunc:
    """out = activation(x · W + bias) [+ residual], float32.

    Arguments: x [B, T, K], W packed by `pack_weight`, bias [N], residual [B, T, N] if asked for, out [B, T, N].
    """
    MR, NR, LANES, VECTORS = tile.rows, tile.columns, tile.lanes, tile.vectors
    panels = -(-N // NR)
    tiles_a_task = ROWS_A_TASK // MR
    activate = ACTIVATIONS[activation]

    @T.macro
    def step(rows, sums, acc, x, w, panel, first, last, k):
        # Few rows would wait for one another's sums: every step of k then has sums of its own.
        for i in T.unroll(rows):
            for v in T.unroll(VECTORS):
                for lane in T.vectorized(LANES):
                    acc[sums + i, v * LANES + lane] = (
                        acc[sums + i, v * LANES + lane] + x[T.min(first + i, last), k] * w[panel, k, v * LANES + lane]
                    )

    @T.macro
    def add_sums(rows, splits, acc):
        for s in T.unroll(splits - 1):
            for i in T.unroll(rows):
                for v in T.unroll(VECTORS):
                    for lane in T.vectorized(LANES):
                        acc[i, v * LANES + lane] = acc[i, v * LANES + lane] + acc[(s + 1) * rows + i, v * LANES + lane]

    def result(acc, bias, addend, i, row, c, n):
        value = activate(acc[i, c] + bias[n])
        return value + addend[row, n] if residual else value

    @T.macro
    def rows_by_panel(rows, x, w, bias, addend, out, panel, first, last):
        splits = T.meta_var(max(1, UNROLL // rows))
        acc = T.alloc_buffer((splits * rows, NR), "float32", scope="local")
        clear(Tile(splits * rows, VECTORS, LANES), acc)
        for k in range(K // UNROLL):
            for u in T.unroll(UNROLL):
                step(rows, u % splits * rows, acc, x, w, panel, first, last, k * UNROLL + u)
        if K % UNROLL > 0:
            for u in T.unroll(K % UNROLL):
                step(rows, u % splits * rows, acc, x, w, panel, first, last, K // UNROLL * UNROLL + u)
        if splits > 1:
            add_sums(rows, splits, acc)
        # Rows beyond the last are the last row again, and write the same values there.
        if panel * NR + NR <= N:
            for i in T.unroll(rows):
                for v in T.unroll(VECTORS):
                    for lane in T.vectorized(LANES):
                        out[T.min(first + i, last), panel * NR + v * LANES + lane] = result(
                            acc, bias, addend, i, T.min(first + i, last),
                            v * LANES + lane, panel * NR + v * LANES + lane,
                        )  # fmt: skip
        else:
            for i in T.unroll(rows):
                for c in range(NR):
                    if panel * NR + c < N:
                        out[T.min(first + i, last), panel * NR + c] = result(
                            acc, bias, addend, i, T.min(first + i, last), c, panel * NR + c
                        )

    @T.macro
    def multiply(x, w, bias, addend, out, M):
        tiles = T.meta_var((M + MR - 1) // MR)
        tasks = T.meta_var((tiles + tiles_a_task - 1) // tiles_a_task)
        for task in T.parallel(panels * tasks):
            panel = T.meta_var(task // tasks)
            first_tile = T.meta_var(task % tasks * tiles_a_task)
            for tile_of_rows in range(T.min(tiles_a_task, tiles - first_tile)):
                first = T.meta_var((first_tile + tile_of_rows) * MR)
                if M - first == 1:
                    rows_by_panel(1, x, w, bias, addend, out, panel, first, M - 1)
                elif M - first <= 4:
                    rows_by_panel(4, x, w, bias, addend, out, panel, first, M - 1)
                else:
                    rows_by_panel(MR, x, w, bias, addend, out, panel, first, M - 1)

    if residual:

        @T.prim_func(s_tir=True, private=True)
        def fused(
            x: T.handle,
            w: T.Buffer((panels, K, NR), "float32"),
            bias: T.Buffer((N,), "float32"),
            addend: T.handle,
            out: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            B, S = T.int64(), T.int64()
            x_btk = T.match_buffer(x, (B, S, K), "float32")
            addend_btn = T.match_buffer(addend, (B, S, N), "float32")
            out_btn = T.match_buffer(out, (B, S, N), "float32")
            x_mk = T.decl_buffer((B * S, K), "float32", data=x_btk.data)
            addend_mn = T.decl_buffer((B * S, N), "float32", data=addend_btn.data)
            out_mn = T.decl_buffer((B * S, N), "float32", data=out_btn.data)
            multiply(x_mk, w, bias, addend_mn, out_mn, B * S)

    else:

        @T.prim_func(s_tir=True, private=True)
        def fused(x: T.handle, w: T.Buffer((panels, K, NR), "float32"), bias: T.Buffer((N,), "float32"), out: T.handle):
            T.func_attr({"tirx.noalias": True})
            B, S = T.int64(), T.int64()
            x_btk = T.match_buffer(x, (B, S, K), "float32")
            out_btn = T.match_buffer(out, (B, S, N), "float32")
            x_mk = T.decl_buffer((B * S, K), "float32", data=x_btk.data)
            out_mn = T.decl_buffer((B * S, N), "float32", data=out_btn.data)
            multiply(x_mk, w, bias, bias, out_mn, B * S)

    return fused
