"""Conversions as the LLVM functions do them, bit by bit."""

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from gpt.cli import UserError
from tvm_frontend.kernels.cpu import reference
from tvm_frontend.kernels.cpu.formats import gemm_format
from tvm_frontend.kernels.cpu.intrinsics import import_llvm
from tvm_frontend.target import check_runs_here, resolve_target

CPUS = ("cooperlake", "skylake-avx512", "haswell", "x86-64")  # the first has the instruction for bf16
VECTORS = 64


@pytest.fixture(scope="module", params=CPUS)
def target(request):
    target = resolve_target(mcpu=request.param)
    try:
        check_runs_here(target.to_json())
    except UserError as error:
        pytest.skip(str(error))
    return target


@pytest.fixture(scope="module")
def bf16_bits(target):
    """Round up to 16 · VECTORS float32 to bfloat16 by the kernels' conversion, as uint16 bits."""
    fmt = gemm_format("bf16", target)

    @T.prim_func(s_tir=True, private=True)
    def kernel(x: T.Buffer((16 * VECTORS,), "float32"), out: T.Buffer((8 * VECTORS,), "int32")):
        T.func_attr({"tirx.noalias": True})
        for v in T.parallel(VECTORS, annotations=import_llvm(*fmt.intrinsics)):
            out[T.ramp(v * 8, 1, 8)] = fmt.convert(x[T.ramp(v * 16, 1, 16)])

    library = tvm.compile(tvm.IRModule({"run": kernel.with_attr("global_symbol", "run")}), target.to_tvm())

    def run(x):
        out = tvm.runtime.tensor(np.zeros(8 * VECTORS, np.int32))
        library["run"](tvm.runtime.tensor(np.resize(x, 16 * VECTORS)), out)
        return out.numpy().view(np.uint16)[: len(x)]

    return run


def test_numbers_are_rounded_to_nearest_ties_to_even(bf16_bits):
    upper = np.arange(0x3F00, 0x3F80, dtype=np.uint32)[:, None] << 16
    bits = (upper | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).reshape(-1)
    x = np.concatenate([bits, bits[:100] | np.uint32(1 << 31)]).view(np.float32)
    x = np.concatenate([x, np.float32([0.0, -0.0, np.inf, -np.inf, 3.4e38])])
    np.testing.assert_array_equal(bf16_bits(x), reference.to_bf16(x).view(np.uint32) >> 16)


def test_a_nan_stays_one(bf16_bits, target):
    """The instruction keeps the sign and the upper bits. Without it any NaN is 0x7fc0: a sign would cost time."""
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000], np.uint32)
    found = [f"{value:04x}" for value in bf16_bits(bits.view(np.float32))]
    native = "avx512bf16" in target.features
    assert found == (["7fff", "ffff", "7fc0", "ffc0", "7fc0"] if native else ["7fc0"] * 5)


def test_the_instruction_takes_denormals_for_zeros(bf16_bits, target):
    bits = np.array([0x00010000, 0x807F0000, 0x00800000], np.uint32)
    found = [f"{value:04x}" for value in bf16_bits(bits.view(np.float32))]
    assert found == (["0000", "8000", "0080"] if "avx512bf16" in target.features else ["0001", "807f", "0080"])
