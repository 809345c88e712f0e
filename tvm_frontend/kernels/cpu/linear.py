"""Linear layers: a GEMM over packed weight panels, with bias, activation and residual in its epilogue.

out [M, N] = epilogue(x [M, K] · W [K, N]), M = B * T rows. The loops, outermost first:

    loop       over               step            keeps
    5  block   rows of x, M       >= 2 MC rows    in L2: the x block, L2_BLOCK_BYTES = 768 KiB, for all panels
    4  panel   columns of W, N    NR columns      in L2: the packed panel, 96 KiB in fp32 at K = 768, for the block's
                                                  rows; the next panel is prefetched from memory meanwhile
    3  task    rows of the block  MC = 64 rows    nothing: it is the unit of parallel work, MC rows x one panel
    2  tile    rows of the task   MR rows         in L1: the MR cache lines of x in use, 16 steps of k in fp32 each
    1  k       K                  UNROLL_K steps  in registers: the MR x NR accumulators, over all of K; in fp32 they
                                                  are flushed every KC = 256 products (`microkernel`)

Loops 5, 4 and 3 are one parallel loop over tasks, in that order:

        out     panel 0    panel 1    panel 2
              +-- NR --+----------+----------+
    block 0   | task 0 | task 2   | task 4   |  MC rows   task 0:  +-- NR --+  MR rows: tile 0
              | task 1 | task 3   | task 5   |  MC rows            +--------+  tile 1
              +--------+----------+----------+                     |   …    |
    block 1   | task 6 | task 8   | task 10  |  MC rows            +--------+  tile MC/MR - 1
              | …      | …        | …        |

W is packed at compile time so that loop 1 reads it in order (`packing` has the formats other than fp32):

    W [K, N]    panel 0      panel 1         packed [N/NR, K, NR], in memory:
       k = 0  |  a0 … a31 |  A0 … A31 |
       k = 1  |  b0 … b31 |  B0 … B31 |      | a0 … a31 | b0 … b31 | … | A0 … A31 | B0 … B31 | …
       …      |  …        |  …        |      |<-------- panel 0 ------>|<-------- panel 1 ------ …

K is not blocked for a cache, unlike BLIS's loop over KC: accumulators never leave the registers before their sum is
complete. x is not rearranged either: its MR rows are read by broadcasts, one element at a time.

Bound by FMA throughput, 2 M K N flops, when M is large; by reading W once from memory when M is small.
"""

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cpu.formats import VEC_LANES, GemmFormat, activation_row
from tvm_frontend.kernels.cpu.intrinsics import PREFETCH, import_llvm, prefetch
from tvm_frontend.kernels.cpu.math import gelu_exact, gelu_exact_to_bf16, gelu_tanh, gelu_tanh_to_bf16, relu
from tvm_frontend.kernels.cpu.microkernel import (
    LINE_ELEMENTS,
    NO_BUFFER,
    GemmBuffers,
    TileIndex,
    accumulator_rows,
    microkernel,
)
from tvm_frontend.kernels.cpu.packing import GROUP_SIZE, group_elements
from tvm_frontend.kernels.cpu.quantize_rows import quantize_rows
from tvm_frontend.kernels.cpu.register_tile import Tile

ACTIVATIONS = {None: lambda x: x, "gelu_tanh": gelu_tanh, "gelu": gelu_exact, "relu": relu}
BF16_ACTIVATIONS = ACTIVATIONS | {"gelu_tanh": gelu_tanh_to_bf16, "gelu": gelu_exact_to_bf16}  # for a bf16 result
MC = 64  # rows of x per task, at most, rounded down to whole tiles; a task is MC rows x one panel
# L2-block size of x: a block is multiplied by every panel before the next block starts, so it has to stay in L2.
L2_BLOCK_BYTES = 3 << 18


def linear(
    K: int,
    N: int,
    tile: Tile,
    fmt: GemmFormat,
    *,
    activation: str | None,
    residual: bool,
    bf16_x: bool = False,
    bf16_out: bool = False,
) -> tvm.tirx.PrimFunc:
    """Return the kernel of out = activation(x · W + bias) [+ residual]; all but the products is fp32.

    Its arguments: x [B, T, K], W packed by `fmt.pack`, the parameters of `fmt.epilogue_params`, the residual [B, T, N]
    if asked for, out [B, T, N]. bf16_x, bf16_out: x comes, and out is emitted, as bfloat16 instead of float32, which
    needs the format bf16, and K, or N and NR, that are multiples of VEC_LANES.
    """
    # Group-wise int4 also keeps int32 partial sums in registers, so MR drops to 4.
    MR, NR, LANES, VECTORS = 4 if fmt.groupwise else tile.mr, tile.nr, tile.lanes, tile.nr_vectors
    ELEMENTS = fmt.row_elements(K)
    GROUPS = -(-K // GROUP_SIZE) if fmt.groupwise else 1
    INT8 = fmt.epilogue_rows > 1
    X, OUT = activation_row(K, fmt if bf16_x else None), activation_row(N, fmt if bf16_out else None)
    PANELS = -(-N // NR)
    PACKED = (PANELS, GROUPS, group_elements(tile)) if fmt.groupwise else (PANELS, ELEMENTS, NR)
    PARAMS = (fmt.epilogue_rows, N)
    TASK_TILES = MC // MR
    BLOCK_TASKS = max(2, L2_BLOCK_BYTES // (4 * ELEMENTS * MC))  # of MC rows: loop 3's length in a full block
    activate = (BF16_ACTIVATIONS if bf16_out else ACTIVATIONS)[activation]
    multiply = microkernel(K, PANELS, tile, fmt)
    llvm = import_llvm(*fmt.intrinsics, PREFETCH)
    convert_rows = None if fmt.convert is None or bf16_x else quantize_rows(K, fmt)

    def epilogue(acc, gemm, i, row, c, n):
        """out[row, n] from acc[i, c]: dequantised in int8, with bias, activation and residual."""
        total = acc[i, c]
        if INT8:
            corrected = T.Cast("float32", total + T.reinterpret("int32", gemm.params[2, n]))
            total = corrected * (gemm.scales[row, 0] * gemm.params[1, n])
        value = activate(total + gemm.params[0, n])
        return value + gemm.residual[row, n] if residual else value

    @T.macro
    def prefetch_row(matrix, row, panel, width, columns):
        """Prefetch the lines of a row that a panel's tile touches. Rows are N elements apart: no stream to guess."""
        for line in T.unroll(columns // LINE_ELEMENTS + 1):
            prefetch(matrix[row, T.min(panel * columns + line * LINE_ELEMENTS, width - 1)])

    @T.macro
    def store_packed(acc, gemm, at, i, part):
        """VEC_LANES columns of row i as pairs of bf16."""
        values = T.alloc_buffer((VEC_LANES,), "float32")
        for lane in T.vectorized(VEC_LANES):
            values[lane] = epilogue(
                acc, gemm, i, at.row(i), part * VEC_LANES + lane, at.panel * NR + part * VEC_LANES + lane
            )
        pairs = T.meta_var(VEC_LANES // 2)
        gemm.out[at.row(i), T.ramp(at.panel * (NR // 2) + part * pairs, 1, pairs)] = OUT.convert(
            values[T.ramp(0, 1, VEC_LANES)]
        )

    @T.macro
    def gemm_tile(mr, gemm, at):
        acc = T.alloc_buffer((accumulator_rows(mr, fmt), NR), fmt.acc_dtype)
        for i in T.unroll(mr):
            prefetch_row(gemm.out, at.row(i), at.panel, OUT.elements, NR // 2 if bf16_out else NR)
            if residual:
                prefetch_row(gemm.residual, at.row(i), at.panel, N, NR)
        multiply(mr, acc, gemm, at)
        if bf16_out:
            for i in T.unroll(mr):
                for part in T.unroll(NR // VEC_LANES):
                    if at.panel * NR + part * VEC_LANES < N:
                        store_packed(acc, gemm, at, i, part)
        elif at.panel * NR + NR <= N:
            for i in T.unroll(mr):
                for v in T.unroll(VECTORS):
                    for lane in T.vectorized(LANES):
                        gemm.out[at.row(i), at.panel * NR + v * LANES + lane] = epilogue(
                            acc, gemm, i, at.row(i), v * LANES + lane, at.panel * NR + v * LANES + lane
                        )
        else:
            for i in T.unroll(mr):
                for c in range(NR):
                    if at.panel * NR + c < N:
                        gemm.out[at.row(i), at.panel * NR + c] = epilogue(acc, gemm, i, at.row(i), c, at.panel * NR + c)

    @T.macro
    def gemm_loops(gemm, M):
        tiles = T.meta_var((M + MR - 1) // MR)
        tasks = T.meta_var((tiles + TASK_TILES - 1) // TASK_TILES)  # of MC rows each, per panel
        for task in T.parallel(PANELS * tasks, annotations=llvm):
            # TVM substitutes `T.let` bindings at every use, so the long task decomposition is held in one-element
            # buffers and evaluated once per task; only short loop indices are `T.let`.
            blocks = T.alloc_buffer((1,), "int64")
            block = T.alloc_buffer((1,), "int64")
            in_block = T.alloc_buffer((1,), "int64")
            block_tasks = T.alloc_buffer((1,), "int64")
            # The last block absorbs the remainder: a separate tail block would stream all panels again for a few rows.
            blocks[0] = T.max(tasks // BLOCK_TASKS, T.int64(1))
            block[0] = T.min(task // (PANELS * BLOCK_TASKS), blocks[0] - 1)
            in_block[0] = task - block[0] * (PANELS * BLOCK_TASKS)
            block_tasks[0] = T.Select(block[0] == blocks[0] - 1, tasks - block[0] * BLOCK_TASKS, T.int64(BLOCK_TASKS))
            panel: T.let = in_block[0] // block_tasks[0]
            first_tile: T.let = (block[0] * BLOCK_TASKS + in_block[0] % block_tasks[0]) * TASK_TILES
            for t in range(T.min(TASK_TILES, tiles - first_tile)):
                first: T.let = (first_tile + t) * MR
                if M - first == 1:
                    gemm_tile(1, gemm, TileIndex(panel, first, M - 1, ahead=None))
                elif M - first <= 4 or MR == 4:
                    gemm_tile(4, gemm, TileIndex(panel, first, M - 1, ahead=None))
                else:
                    gemm_tile(MR, gemm, TileIndex(panel, first, M - 1, ahead=t))

    @T.macro
    def body(x, w, params, addend, out):
        B, S = T.int64(), T.int64()
        x_btk = T.match_buffer(x, (B, S, K), X.dtype)
        if residual:
            addend_btn = T.match_buffer(addend, (B, S, N), "float32")
        out_btn = T.match_buffer(out, (B, S, N), OUT.dtype)
        x_mk = T.decl_buffer((B * S, X.elements), X.storage_dtype, data=x_btk.data)
        if residual:
            residual_mn = T.decl_buffer((B * S, N), "float32", data=addend_btn.data)
        out_mn = T.decl_buffer((B * S, OUT.elements), OUT.storage_dtype, data=out_btn.data)
        added = T.meta_var(residual_mn if residual else NO_BUFFER)
        if convert_rows is not None:
            packed = T.alloc_buffer((B * S, ELEMENTS), fmt.storage_dtype)
            scales = T.alloc_buffer((B * S, GROUPS), "float32")
            corrections = T.alloc_buffer((B * S, GROUPS), "int32")
            convert_rows(x_mk, packed, scales, corrections, B * S)
            gemm_loops(GemmBuffers(packed, w, params, added, out_mn, scales, corrections), B * S)
        else:
            gemm_loops(GemmBuffers(x_mk, w, params, added, out_mn), B * S)

    if residual:

        @T.prim_func(s_tir=True, private=True)
        def fused(
            x: T.handle,
            w: T.Buffer(PACKED, fmt.storage_dtype),
            params: T.Buffer(PARAMS, "float32"),
            addend: T.handle,
            out: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            body(x, w, params, addend, out)

    else:

        @T.prim_func(s_tir=True, private=True)
        def fused(
            x: T.handle,
            w: T.Buffer(PACKED, fmt.storage_dtype),
            params: T.Buffer(PARAMS, "float32"),
            out: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            body(x, w, params, NO_BUFFER, out)

    return fused
