"""Linear layers: a GEMM over packed weights with bias, activation and residual in its epilogue.

Bound by arithmetic when B·T is large (a multiply-add a cycle and unit), by reading the weights once when it is small.
"""

from operator import add

import numpy as np
import tvm
from tvm.script import tirx as T

from tvm_frontend.schedules.cpu.arithmetic import AT_ONCE, Arithmetic
from tvm_frontend.schedules.cpu.elementary import gelu_exact, gelu_tanh, relu
from tvm_frontend.schedules.cpu.tile import Tile, fold_lanes

ACTIVATIONS = {None: lambda x: x, "gelu_tanh": gelu_tanh, "gelu": gelu_exact, "relu": relu}
UNROLL = 4  # steps of k in one turn of the inner loop; without it the loop's own bookkeeping costs up to half
ROWS_A_TASK = 64  # rows of x that one parallel task takes through one panel of weights, at most


def pack_weight(weight: np.ndarray, tile: Tile, arithmetic: Arithmetic) -> np.ndarray:
    """Weight float32 [K, N] as panels of words [ceil(N / columns), words, columns], zeros at the end.

    It is what the inner loop reads, in order; see `Arithmetic.pack` for the words.
    """
    words = arithmetic.pack(weight)
    rows, N = words.shape
    panels = -(-N // tile.columns)
    padded = np.zeros((rows, panels * tile.columns), words.dtype)
    padded[:, :N] = words
    return np.ascontiguousarray(padded.reshape(rows, panels, tile.columns).transpose(1, 0, 2))


def linear(
    K: int, N: int, tile: Tile, arithmetic: Arithmetic, *, activation: str | None, residual: bool
) -> tvm.tirx.PrimFunc:
    """out = activation(x · W + bias) [+ residual], float32 but for the products.

    Arguments: x [B, T, K], W packed by `pack_weight`, `Arithmetic.table` of W and the bias, residual [B, T, N] if asked
    for, out [B, T, N].
    """
    MR, NR, LANES, VECTORS = tile.rows, tile.columns, tile.lanes, tile.vectors
    WORDS, VALUES, WORD, TOTAL = arithmetic.words(K), arithmetic.values, arithmetic.word, arithmetic.total
    CHUNKS, NARROWED, SCALED = -(-K // AT_ONCE), arithmetic.narrow is not None, arithmetic.scaled
    TABLE_ROWS = arithmetic.table_rows
    IMPORTS = {"pragma_import_llvm": arithmetic.llvm} if arithmetic.llvm else {}
    panels = -(-N // NR)
    tiles_a_task = ROWS_A_TASK // MR
    activate, dot, narrow = ACTIVATIONS[activation], arithmetic.dot, arithmetic.narrow
    find_largest, add_up = fold_lanes(AT_ONCE, T.max), fold_lanes(AT_ONCE, add)

    @T.macro
    def step(rows, sums, acc, x, w, panel, first, last, k):
        # Few rows would wait for one another's sums: every step of k then has sums of its own.
        for i in T.unroll(rows):
            for v in T.unroll(VECTORS):
                acc[sums + i, T.ramp(v * LANES, 1, LANES)] = dot(
                    acc[sums + i, T.ramp(v * LANES, 1, LANES)],
                    x[T.min(first + i, last), k],
                    w[panel, k, T.ramp(v * LANES, 1, LANES)],
                )

    @T.macro
    def add_sums(rows, splits, acc):
        for s in T.unroll(splits - 1):
            for i in T.unroll(rows):
                for c in T.vectorized(NR):
                    acc[i, c] = acc[i, c] + acc[(s + 1) * rows + i, c]

    def result(acc, scales, table, addend, i, row, c, n):
        total = acc[i, c]
        if SCALED:
            whole = T.Cast("float32", total + T.reinterpret("int32", table[2, n]))
            total = whole * (scales[row] * table[1, n])
        value = activate(total + table[0, n])
        return value + addend[row, n] if residual else value

    @T.macro
    def rows_by_panel(rows, x, scales, w, table, addend, out, panel, first, last):
        splits = T.meta_var(max(1, UNROLL // rows))
        acc = T.alloc_buffer((splits * rows, NR), TOTAL, scope="local")
        for i in T.unroll(splits * rows):
            for c in T.vectorized(NR):
                acc[i, c] = T.Cast(TOTAL, 0)
        for k in range(WORDS // UNROLL):
            for u in T.unroll(UNROLL):
                step(rows, u % splits * rows, acc, x, w, panel, first, last, k * UNROLL + u)
        if WORDS % UNROLL > 0:
            for u in T.unroll(WORDS % UNROLL):
                step(rows, u % splits * rows, acc, x, w, panel, first, last, WORDS // UNROLL * UNROLL + u)
        if splits > 1:
            add_sums(rows, splits, acc)
        # Rows beyond the last are the last row again, and write the same values there.
        if panel * NR + NR <= N:
            for i in T.unroll(rows):
                for v in T.unroll(VECTORS):
                    for lane in T.vectorized(LANES):
                        out[T.min(first + i, last), panel * NR + v * LANES + lane] = result(
                            acc, scales, table, addend, i, T.min(first + i, last),
                            v * LANES + lane, panel * NR + v * LANES + lane,
                        )  # fmt: skip
        else:
            for i in T.unroll(rows):
                for c in range(NR):
                    if panel * NR + c < N:
                        out[T.min(first + i, last), panel * NR + c] = result(
                            acc, scales, table, addend, i, T.min(first + i, last), c, panel * NR + c
                        )

    @T.macro
    def multiply(x, scales, w, table, addend, out, M):
        tiles = T.meta_var((M + MR - 1) // MR)
        tasks = T.meta_var((tiles + tiles_a_task - 1) // tiles_a_task)
        for task in T.parallel(panels * tasks, annotations=IMPORTS):
            panel = T.meta_var(task // tasks)
            first_tile = T.meta_var(task % tasks * tiles_a_task)
            for tile_of_rows in range(T.min(tiles_a_task, tiles - first_tile)):
                first = T.meta_var((first_tile + tile_of_rows) * MR)
                if M - first == 1:
                    rows_by_panel(1, x, scales, w, table, addend, out, panel, first, M - 1)
                elif M - first <= 4:
                    rows_by_panel(4, x, scales, w, table, addend, out, panel, first, M - 1)
                else:
                    rows_by_panel(MR, x, scales, w, table, addend, out, panel, first, M - 1)

    @T.macro
    def narrow_rows(x, words, scales, M):
        for row in T.parallel(M):
            filled = T.alloc_buffer((CHUNKS * AT_ONCE,), "float32")
            largest = T.alloc_buffer((1, AT_ONCE), "float32", scope="local")
            total = T.alloc_buffer((1, AT_ONCE), "float32", scope="local")
            for k in range(K):
                filled[k] = x[row, k]
            for k in range(CHUNKS * AT_ONCE - K):
                filled[K + k] = T.float32(0)
            if SCALED:
                for lane in T.vectorized(AT_ONCE):
                    largest[0, lane] = T.float32(0)
                    total[0, lane] = T.float32(0)
                for c in range(CHUNKS):
                    for lane in T.vectorized(AT_ONCE):
                        largest[0, lane] = T.max(largest[0, lane], T.abs(filled[c * AT_ONCE + lane]))
                        # A NaN is no int8 and may be no maximum: it goes into the row's scale.
                        total[0, lane] = total[0, lane] + filled[c * AT_ONCE + lane]
                find_largest(largest, 0)
                add_up(total, 0)
                scales[row] = T.Select(T.isnan(total[0, 0]), total[0, 0], largest[0, 0] * T.float32(1 / 127))
                for k in range(CHUNKS * AT_ONCE):
                    filled[k] = filled[k] * T.if_then_else(
                        largest[0, 0] > T.float32(0), T.float32(127) / largest[0, 0], T.float32(0)
                    )
            for c in range(CHUNKS):
                words[row, T.ramp(c * (AT_ONCE // VALUES), 1, AT_ONCE // VALUES)] = narrow(
                    filled[T.ramp(c * AT_ONCE, 1, AT_ONCE)]
                )

    @T.macro
    def narrow_and_multiply(x, w, table, addend, out, M):
        if NARROWED:
            words = T.alloc_buffer((M, WORDS), WORD)
            scales = T.alloc_buffer((M,), "float32")
            narrow_rows(x, words, scales, M)
            multiply(words, scales, w, table, addend, out, M)
        else:
            multiply(x, x, w, table, addend, out, M)

    if residual:

        @T.prim_func(s_tir=True, private=True)
        def fused(
            x: T.handle,
            w: T.Buffer((panels, WORDS, NR), WORD),
            table: T.Buffer((TABLE_ROWS, N), "float32"),
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
            narrow_and_multiply(x_mk, w, table, addend_mn, out_mn, B * S)

    else:

        @T.prim_func(s_tir=True, private=True)
        def fused(
            x: T.handle,
            w: T.Buffer((panels, WORDS, NR), WORD),
            table: T.Buffer((TABLE_ROWS, N), "float32"),
            out: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            B, S = T.int64(), T.int64()
            x_btk = T.match_buffer(x, (B, S, K), "float32")
            out_btn = T.match_buffer(out, (B, S, N), "float32")
            x_mk = T.decl_buffer((B * S, K), "float32", data=x_btk.data)
            out_mn = T.decl_buffer((B * S, N), "float32", data=out_btn.data)
            narrow_and_multiply(x_mk, w, table, table, out_mn, B * S)

    return fused
