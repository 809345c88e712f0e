"""Linear layers: a GEMM over packed weights with bias, activation and residual in its epilogue.

Bound by arithmetic when B·T is large (a multiply-add a cycle and unit), by reading the weights once when it is small.
"""

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.formats import AT_ONCE, Arithmetic, row_of
from tvm_frontend.kernels.cpu.math import gelu_exact, gelu_exact_to_bf16, gelu_tanh, gelu_tanh_to_bf16, relu
from tvm_frontend.kernels.cpu.microkernel import FETCH, LINE_WORDS, fetch, product, sums_of
from tvm_frontend.kernels.cpu.packing import GROUP, group_words
from tvm_frontend.kernels.cpu.quantize_rows import narrow_rows
from tvm_frontend.kernels.cpu.register_tile import Tile

ACTIVATIONS = {None: lambda x: x, "gelu_tanh": gelu_tanh, "gelu": gelu_exact, "relu": relu}
ROUNDED = ACTIVATIONS | {"gelu_tanh": gelu_tanh_to_bf16, "gelu": gelu_exact_to_bf16}  # of a result in bfloat16
ROWS_A_TASK = 64  # of x that one parallel task takes through one panel of weights, at most
# Of x, what goes through all panels before the next rows do: read once for each, it has to stay in a core's cache.
BLOCK_BYTES = 3 << 18


def linear(
    K: int,
    N: int,
    tile: Tile,
    arithmetic: Arithmetic,
    *,
    activation: str | None,
    residual: bool,
    narrow_x: bool = False,
    narrow_out: bool = False,
) -> tvm.tirx.PrimFunc:
    """out = activation(x · W + bias) [+ residual], float32 but for the products.

    Arguments: x [B, T, K], W packed by `Arithmetic.pack`, `Arithmetic.table` of W and the bias, residual [B, T, N] if
    asked for, out [B, T, N]. narrow_x, narrow_out: whether x comes in the arithmetic's bfloat16, and out is given so;
    K, or N and the tile's columns, are then multiples of AT_ONCE.
    """
    # The sums of groups need registers too.
    MR, NR, LANES, VECTORS = 4 if arithmetic.grouped else tile.rows, tile.columns, tile.lanes, tile.vectors
    WORDS, WORD = arithmetic.words(K), arithmetic.word
    GROUPS = -(-K // GROUP) if arithmetic.grouped else 1
    NARROWED, WHOLE = arithmetic.narrow is not None and not narrow_x, arithmetic.table_rows > 1
    X, OUT = (row_of(width, arithmetic if rounded else None) for width, rounded in ((K, narrow_x), (N, narrow_out)))
    TABLE_ROWS = arithmetic.table_rows
    panels = -(-N // NR)
    PACKED = (panels, GROUPS, group_words(tile)) if arithmetic.grouped else (panels, WORDS, NR)
    tiles_a_task = ROWS_A_TASK // MR
    tasks_a_block = max(2, BLOCK_BYTES // (4 * WORDS * ROWS_A_TASK))
    activate = (ROUNDED if narrow_out else ACTIVATIONS)[activation]
    multiply_rows = product(K, panels, tile, arithmetic)
    llvm = {"pragma_import_llvm": arithmetic.llvm + FETCH}
    narrow, to_words = narrow_rows(K, arithmetic) if NARROWED else None, arithmetic.narrow

    def result(acc, scales, table, addend, i, row, c, n):
        total = acc[i, c]
        if WHOLE:
            whole = T.Cast("float32", total + T.reinterpret("int32", table[2, n]))
            total = whole * (scales[row, 0] * table[1, n])
        value = activate(total + table[0, n])
        return value + addend[row, n] if residual else value

    @T.macro
    def fetch_place(matrix, row, panel, width, columns):
        # A row's place is far from the next one's: it comes near while the sums are made.
        for line in T.unroll(columns // LINE_WORDS + 1):
            fetch(matrix[row, T.min(panel * columns + line * LINE_WORDS, width - 1)])

    @T.macro
    def put_words(acc, scales, table, addend, out, i, row, panel, part):
        values = T.alloc_buffer((AT_ONCE,), "float32")
        for lane in T.vectorized(AT_ONCE):
            values[lane] = result(
                acc, scales, table, addend, i, row, part * AT_ONCE + lane, panel * NR + part * AT_ONCE + lane
            )
        words = T.meta_var(AT_ONCE // 2)
        out[row, T.ramp(panel * (NR // 2) + part * words, 1, words)] = to_words(values[T.ramp(0, 1, AT_ONCE)])

    @T.macro
    def rows_by_panel(rows, x, scales, offsets, w, table, addend, out, panel, first, last, ahead):
        acc = T.alloc_buffer((sums_of(rows, arithmetic), NR), arithmetic.total)
        for i in T.unroll(rows):
            fetch_place(out, T.min(first + i, last), panel, OUT[2], NR // 2 if narrow_out else NR)
            if residual:
                fetch_place(addend, T.min(first + i, last), panel, N, NR)
        multiply_rows(rows, acc, x, scales, offsets, w, panel, first, last, ahead)
        # Rows beyond the last are the last row again, and write the same values there.
        if narrow_out:
            for i in T.unroll(rows):
                for part in T.unroll(NR // AT_ONCE):
                    if panel * NR + part * AT_ONCE < N:
                        put_words(acc, scales, table, addend, out, i, T.min(first + i, last), panel, part)
        elif panel * NR + NR <= N:
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
    def multiply(x, scales, offsets, w, table, addend, out, M):
        tiles = T.meta_var((M + MR - 1) // MR)
        tasks = T.meta_var((tiles + tiles_a_task - 1) // tiles_a_task)
        for task in T.parallel(panels * tasks, annotations=llvm):
            # The last block has the rest too: for a few rows alone all panels would be read once more.
            # A place is read once here; let makes a value, which TVM writes out at each use: what is long is a place.
            blocks = T.alloc_buffer((1,), "int64")
            block = T.alloc_buffer((1,), "int64")
            in_block = T.alloc_buffer((1,), "int64")
            tasks_here = T.alloc_buffer((1,), "int64")
            blocks[0] = T.max(tasks // tasks_a_block, T.int64(1))
            block[0] = T.min(task // (panels * tasks_a_block), blocks[0] - 1)
            in_block[0] = task - block[0] * (panels * tasks_a_block)
            tasks_here[0] = T.Select(
                block[0] == blocks[0] - 1, tasks - block[0] * tasks_a_block, T.int64(tasks_a_block)
            )
            panel: T.let = in_block[0] // tasks_here[0]
            first_tile: T.let = (block[0] * tasks_a_block + in_block[0] % tasks_here[0]) * tiles_a_task
            for tile_of_rows in range(T.min(tiles_a_task, tiles - first_tile)):
                first: T.let = (first_tile + tile_of_rows) * MR
                if M - first == 1:
                    rows_by_panel(1, x, scales, offsets, w, table, addend, out, panel, first, M - 1, None)
                elif M - first <= 4 or MR == 4:
                    rows_by_panel(4, x, scales, offsets, w, table, addend, out, panel, first, M - 1, None)
                else:
                    rows_by_panel(MR, x, scales, offsets, w, table, addend, out, panel, first, M - 1, tile_of_rows)

    @T.macro
    def narrow_and_multiply(x, w, table, addend, out, M):
        if NARROWED:
            words = T.alloc_buffer((M, WORDS), WORD)
            scales = T.alloc_buffer((M, GROUPS), "float32")
            offsets = T.alloc_buffer((M, GROUPS), "int32")
            narrow(x, words, scales, offsets, M)
            multiply(words, scales, offsets, w, table, addend, out, M)
        else:
            multiply(x, x, x, w, table, addend, out, M)

    if residual:

        @T.prim_func(s_tir=True, private=True)
        def fused(
            x: T.handle,
            w: T.Buffer(PACKED, WORD),
            table: T.Buffer((TABLE_ROWS, N), "float32"),
            addend: T.handle,
            out: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            B, S = T.int64(), T.int64()
            x_btk = T.match_buffer(x, (B, S, K), X[0])
            addend_btn = T.match_buffer(addend, (B, S, N), "float32")
            out_btn = T.match_buffer(out, (B, S, N), OUT[0])
            x_mk = T.decl_buffer((B * S, X[2]), X[1], data=x_btk.data)
            addend_mn = T.decl_buffer((B * S, N), "float32", data=addend_btn.data)
            out_mn = T.decl_buffer((B * S, OUT[2]), OUT[1], data=out_btn.data)
            narrow_and_multiply(x_mk, w, table, addend_mn, out_mn, B * S)

    else:

        @T.prim_func(s_tir=True, private=True)
        def fused(
            x: T.handle,
            w: T.Buffer(PACKED, WORD),
            table: T.Buffer((TABLE_ROWS, N), "float32"),
            out: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            B, S = T.int64(), T.int64()
            x_btk = T.match_buffer(x, (B, S, K), X[0])
            out_btn = T.match_buffer(out, (B, S, N), OUT[0])
            x_mk = T.decl_buffer((B * S, X[2]), X[1], data=x_btk.data)
            out_mn = T.decl_buffer((B * S, OUT[2]), OUT[1], data=out_btn.data)
            narrow_and_multiply(x_mk, w, table, table, out_mn, B * S)

    return fused
