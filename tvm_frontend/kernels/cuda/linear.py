"""Linear layers: a tiled GEMM on tensor cores, and for few rows a kernel bound by memory. See `device/linear.cuh`."""

from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from tvm_frontend.kernels.cuda.launch import Launcher, store_policy, template

ACTIVATIONS = {None: "Identity", "gelu_tanh": "GeluTanh", "gelu": "Gelu", "relu": "Relu"}
SKINNY_ROWS = 8  # up to this many rows of x the weights are the traffic, and skinny_gemm reads them once
SKINNY_WARPS, SKINNY_COLUMNS = 4, 2  # warps of a block, and columns of the result that each computes
K_TILE_BYTES = 64  # of a row of x and of W, loaded in one iteration of the K loop; the same as in linear.cuh


@dataclass(frozen=True)
class BlockTile:
    """The tiling of one block, `Tile` of `device/linear.cuh`.

    block_m, block_n: rows and columns of the result. warps_m, warps_n: how its warps divide them. stages: K tiles in
    shared memory at a time.
    """

    block_m: int
    block_n: int
    warps_m: int
    warps_n: int
    stages: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.block_m + self.block_n) * K_TILE_BYTES

    @property
    def name(self) -> str:
        """The type in C++, within NAMESPACE."""
        sizes = (self.block_m, self.block_n, self.warps_m, self.warps_n, self.stages)
        return f"Tile<{', '.join(map(str, sizes))}>"


# Two blocks of either fit into an sm_86's 100 KB of shared memory and 64 K registers. The large tile reads each operand
# half as often; the small one is for results that have fewer large tiles than the GPU has multiprocessors.
LARGE, SMALL = BlockTile(128, 128, 2, 2, 3), BlockTile(64, 64, 2, 2, 4)


def linear(
    K: int,
    N: int,
    traits: str,
    dtype: str,
    out_dtype: str,
    launcher: Launcher,
    *,
    multiprocessors: int,
    activation: str | None,
    residual: bool,
) -> tvm.tirx.PrimFunc:
    """Build out = activation(x · W + bias) [+ residual], with float32 accumulation.

    Arguments: x [B, T, K] of dtype, W [N, K] as `pack_weight` made it, bias [N] float32, residual [B, T, N] float32 if
    asked for, out [B, T, N] of out_dtype. traits: the DTypeTraits of x and W. multiprocessors: of the GPU that is
    compiled for. Which kernel runs depends on M = B · T at run time: skinny_gemm up to SKINNY_ROWS rows of 16 bits,
    else the large tile if there are at least as many of them as multiprocessors, else the small tile.
    """
    is_half = dtype != "float32"
    rest = (K, N, ACTIVATIONS[activation], residual, store_policy(out_dtype, traits))

    def tiled(tile: BlockTile):
        return launcher.launch(template("linear", traits, tile.name, *rest), tile.threads, tile.shared_bytes)

    def skinny(rows: int):
        name = template("skinny_gemm", traits, rows, SKINNY_COLUMNS, SKINNY_WARPS, *rest)
        return launcher.launch(name, 32 * SKINNY_WARPS)

    large, small = tiled(LARGE), tiled(SMALL)
    skinny_blocks = -(-N // (SKINNY_WARPS * SKINNY_COLUMNS))

    @T.macro
    def launch_tiled(arguments, M):
        if (M + LARGE.block_m - 1) // LARGE.block_m * -(-N // LARGE.block_n) >= multiprocessors:
            large((M + LARGE.block_m - 1) // LARGE.block_m, -(-N // LARGE.block_n), 1, arguments)
        else:
            small((M + SMALL.block_m - 1) // SMALL.block_m, -(-N // SMALL.block_n), 1, arguments)

    launch = launch_tiled
    if is_half:
        skinny_1, skinny_4, skinny_8 = map(skinny, (1, 4, SKINNY_ROWS))

        @T.macro
        def launch_half(arguments, M):
            if M == 1:
                skinny_1(skinny_blocks, 1, 1, arguments)
            elif M <= 4:
                skinny_4(skinny_blocks, 1, 1, arguments)
            elif M <= SKINNY_ROWS:
                skinny_8(skinny_blocks, 1, 1, arguments)
            else:
                launch_tiled(arguments, M)

        launch = launch_half

    @T.macro
    def multiply(x, w, bias, addend, out, M):
        launch([x.data, w.data, bias.data, addend.data, out.data, T.Cast("int32", M)], M)

    if residual:

        @T.prim_func(s_tir=True, private=True)
        def fused(
            x_handle: T.handle,
            w: T.Buffer((N, K), "uint16" if is_half else "float32"),
            bias: T.Buffer((N,), "float32"),
            residual_handle: T.handle,
            out_handle: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            B, S = T.int64(), T.int64()
            x = T.match_buffer(x_handle, (B, S, K), dtype)
            addend = T.match_buffer(residual_handle, (B, S, N), "float32")
            out = T.match_buffer(out_handle, (B, S, N), out_dtype)
            multiply(x, w, bias, addend, out, B * S)

    else:

        @T.prim_func(s_tir=True, private=True)
        def fused(
            x_handle: T.handle,
            w: T.Buffer((N, K), "uint16" if is_half else "float32"),
            bias: T.Buffer((N,), "float32"),
            out_handle: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            B, S = T.int64(), T.int64()
            x = T.match_buffer(x_handle, (B, S, K), dtype)
            out = T.match_buffer(out_handle, (B, S, N), out_dtype)
            multiply(x, w, bias, bias, out, B * S)  # HAS_RESIDUAL is false: the kernel does not read the fourth pointer

    return fused
