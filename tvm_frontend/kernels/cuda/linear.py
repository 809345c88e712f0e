"""Linear layers on tensor cores, or for few rows at the speed of memory; see `device/linear.cuh`."""

from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cuda.launch import Launcher, stored_as, template

ACTIVATIONS = {None: "Identity", "gelu_tanh": "GeluTanh", "gelu": "Gelu", "relu": "Relu"}
FEW = 8  # rows that are read beside one reading of the weights
SLICE_BYTES = 64  # of a row of each factor, a step along K
SPLIT_WARPS, SPLIT_COLUMNS = 4, 2  # of a block for few rows; of each warp's columns


@dataclass(frozen=True)
class BlockTile:
    """What a block computes, as `Tile` of `device/linear.cuh` says."""

    rows: int
    columns: int
    warps_down: int
    warps_across: int
    stages: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_down * self.warps_across

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.rows + self.columns) * SLICE_BYTES

    @property
    def name(self) -> str:
        """In C++."""
        sizes = (self.rows, self.columns, self.warps_down, self.warps_across, self.stages)
        return f"Tile<{', '.join(map(str, sizes))}>"


# Two blocks of either fit an sm_86's 100 KB of shared memory and 64 K registers. The large one reads its factors half
# as often; the small one is for when there would be fewer large ones than multiprocessors.
LARGE, SMALL = BlockTile(128, 128, 2, 2, 3), BlockTile(64, 64, 2, 2, 4)


def linear(
    K: int,
    N: int,
    number: str,
    dtype: str,
    out_dtype: str,
    launcher: Launcher,
    *,
    multiprocessors: int,
    activation: str | None,
    residual: bool,
) -> tvm.tirx.PrimFunc:
    """out = activation(x · W + bias) [+ residual], sums in float32.

    Arguments: x [B, T, K] of dtype, W [N, K] as `pack_weight` made it, bias [N] float32, residual [B, T, N] float32 if
    asked for, out [B, T, N] of out_dtype. number: a type of `device/primitives.cuh`. multiprocessors: of the GPU that
    it is compiled for; the large tile is taken if there are as many of them.
    """
    narrow = dtype != "float32"
    rest = (K, N, ACTIVATIONS[activation], residual, stored_as(out_dtype, number))

    def by_tiles(tile: BlockTile):
        return launcher.launch(template("linear", number, tile.name, *rest), tile.threads, tile.shared_bytes)

    def by_rows(rows: int):
        name = template("linear_of_few_rows", number, rows, SPLIT_COLUMNS, SPLIT_WARPS, *rest)
        return launcher.launch(name, 32 * SPLIT_WARPS)

    large, small = by_tiles(LARGE), by_tiles(SMALL)
    one, four, eight = (by_rows(rows) if narrow else None for rows in (1, 4, FEW))
    few_blocks = -(-N // (SPLIT_WARPS * SPLIT_COLUMNS))

    @T.macro
    def multiply_by_tiles(arguments, M):
        if (M + LARGE.rows - 1) // LARGE.rows * -(-N // LARGE.columns) >= multiprocessors:
            large((M + LARGE.rows - 1) // LARGE.rows, -(-N // LARGE.columns), 1, arguments)
        else:
            small((M + SMALL.rows - 1) // SMALL.rows, -(-N // SMALL.columns), 1, arguments)

    @T.macro
    def multiply_few_rows(arguments, M):
        if M == 1:
            one(few_blocks, 1, 1, arguments)
        elif M <= 4:
            four(few_blocks, 1, 1, arguments)
        elif M <= FEW:
            eight(few_blocks, 1, 1, arguments)
        else:
            multiply_by_tiles(arguments, M)

    start = multiply_few_rows if narrow else multiply_by_tiles

    @T.macro
    def multiply(x, w, bias, addend, out, M):
        start([x.data, w.data, bias.data, addend.data, out.data, T.Cast("int32", M)], M)

    if residual:

        @T.prim_func(s_tir=True, private=True)
        def fused(
            x_handle: T.handle,
            w: T.Buffer((N, K), "uint16" if narrow else "float32"),
            bias: T.Buffer((N,), "float32"),
            addend_handle: T.handle,
            out_handle: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            B, S = T.int64(), T.int64()
            x = T.match_buffer(x_handle, (B, S, K), dtype)
            addend = T.match_buffer(addend_handle, (B, S, N), "float32")
            out = T.match_buffer(out_handle, (B, S, N), out_dtype)
            multiply(x, w, bias, addend, out, B * S)

    else:

        @T.prim_func(s_tir=True, private=True)
        def fused(
            x_handle: T.handle,
            w: T.Buffer((N, K), "uint16" if narrow else "float32"),
            bias: T.Buffer((N,), "float32"),
            out_handle: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            B, S = T.int64(), T.int64()
            x = T.match_buffer(x_handle, (B, S, K), dtype)
            out = T.match_buffer(out_handle, (B, S, N), out_dtype)
            multiply(x, w, bias, bias, out, B * S)

    return fused
