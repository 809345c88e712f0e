"""Kernels in bf16, int8 and int4: the rounding that they state, and nothing else, is lost."""

from functools import cache

import ml_dtypes
import numpy as np
import pytest
import tvm

from gpt.cli import UserError
from tvm_frontend.kernels.cpu import CpuKernels, reference
from tvm_frontend.kernels.cpu.attention import causal_attention
from tvm_frontend.kernels.cpu.cached_attention import cached_attention
from tvm_frontend.kernels.cpu.formats import VEC_LANES, attention_format, gemm_format
from tvm_frontend.kernels.cpu.kv_layout import kv_layout
from tvm_frontend.kernels.cpu.layer_norm import layer_norm
from tvm_frontend.kernels.cpu.linear import linear
from tvm_frontend.kernels.cpu.register_tile import tile_for
from tvm_frontend.target import check_runs_here, resolve_target

# with the instructions for both, with those of AVX-512 alone, and with none
CPUS = ("cooperlake", "skylake-avx512", "haswell", "x86-64")
INSTRUCTIONS = {"bf16": "vdpbf16ps", "int8": "vpdpbusd", "int4": "vpdpbusd"}


@pytest.fixture(scope="module", params=CPUS)
def target(request):
    target = resolve_target(mcpu=request.param)
    try:
        check_runs_here(target.to_json())
    except UserError as error:
        pytest.skip(str(error))
    return target


@cache
def compiled(target, precision, K, N):
    kernel = linear(K, N, tile_for(target), gemm_format(precision, target), activation=None, residual=True)
    return tvm.compile(tvm.IRModule({"run": kernel.with_attr("global_symbol", "run")}), target.to_tvm())


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype("float32")


@pytest.mark.parametrize("precision", INSTRUCTIONS)
@pytest.mark.parametrize(("K", "N"), [(1, 1), (64, 96), (130, 31)])
def test_only_the_inputs_are_rounded(target, precision, K, N):
    fmt, tile = gemm_format(precision, target), tile_for(target)
    w, bias = random(K, N), random(N, seed=2)
    run = compiled(target, precision, K, N)["run"]
    for B, T in [(1, 1), (1, 4), (3, 17)]:
        x, addend = random(B, T, K), random(B, T, N, seed=1)
        out = tvm.runtime.tensor(np.full((B, T, N), np.nan, "float32"))
        run(*map(tvm.runtime.tensor, (x, fmt.pack(w, tile), fmt.epilogue_params(w, bias), addend)), out)
        sizes = np.abs(x.astype("float64")) @ np.abs(w) + np.abs(bias) + np.abs(addend)
        error = np.abs(out.numpy() - reference.linear(x, w, bias, precision=precision, residual=addend))
        assert (error <= (K + 8) * 2.0**-23 * sizes).all(), (B, T, error.max())


@pytest.mark.parametrize("precision", INSTRUCTIONS)
def test_the_instruction_is_used_where_it_is(target, precision):
    has = ("avx512bf16" if precision == "bf16" else "avx512vnni") in target.features
    text = compiled(target, precision, 64, 96).mod.inspect_source("asm")
    assert (INSTRUCTIONS[precision] in text) == has


@pytest.mark.parametrize("precision", INSTRUCTIONS)
def test_zeros_and_nan(target, precision):
    fmt, tile = gemm_format(precision, target), tile_for(target)
    w = random(64, 96)
    w[:, 5] = 0
    x = random(1, 6, 64)
    x[0, 1], x[0, 4, 3] = 0, np.nan
    nothing, out = np.zeros((1, 6, 96), "float32"), tvm.runtime.tensor(np.full((1, 6, 96), np.nan, "float32"))
    inputs = (x, fmt.pack(w, tile), fmt.epilogue_params(w, nothing[0, 0]), nothing)
    compiled(target, precision, 64, 96)["run"](*map(tvm.runtime.tensor, inputs), out)
    found = out.numpy()[0]
    assert np.isnan(found[4]).all()
    assert np.isfinite(found[[0, 1, 2, 3, 5]]).all()
    assert (found[1] == 0).all()
    assert (found[[0, 2, 3, 5], 5] == 0).all()


def run(target, kernel, *arguments, shape):
    """A kernel's result, in the dtype that it gives; what it forgets to write stays NaN."""
    library = tvm.compile(tvm.IRModule({"run": kernel.with_attr("global_symbol", "run")}), target.to_tvm())
    out = np.full(shape, np.nan, ml_dtypes.bfloat16 if dtypes(kernel)[-1] == "bfloat16" else np.float32)
    out = tvm.runtime.tensor(out)
    library["run"](*map(tvm.runtime.tensor, arguments), out)
    return out.numpy()


def dtypes(kernel):
    return [str(param.ty.dtype) for param in kernel.params]


def check_rounded(given, plain, of):
    """Given is what float32 rounds to: but for the last bit of that, which differs where one is compiled otherwise."""
    assert given.dtype == ml_dtypes.bfloat16
    wanted = plain.astype(ml_dtypes.bfloat16)
    same = given.view(np.uint16) == wanted.view(np.uint16)
    assert same.mean() > 0.99, of
    np.testing.assert_allclose(given.astype("float32"), wanted.astype("float32"), rtol=2.0**-7, atol=1e-6, err_msg=of)


@pytest.fixture(scope="module")
def kernels(target):
    """In bf16, of a CPU whose register tiles are wide enough for what passes between them to be rounded."""
    kernels = CpuKernels(target, "bf16")
    if kernels.tile.nr % VEC_LANES:
        assert set(dtypes(kernels.linear(64, 96, activation="gelu", residual=False, narrow=True))[::3]) == {"float32"}
        pytest.skip("a tile has fewer columns than are rounded at once")
    return kernels


@pytest.mark.slow
@pytest.mark.parametrize(("K", "N"), [(64, 96), (16, 48), (176, 16)])
def test_a_linear_layer_takes_and_gives_what_the_next_would_round_to(target, kernels, K, N):
    plain = linear(K, N, kernels.tile, kernels.format, activation="relu", residual=False)
    narrow = kernels.linear(K, N, activation="relu", residual=False, narrow=True)
    assert (dtypes(narrow)[0], dtypes(narrow)[-1]) == ("bfloat16", "bfloat16")
    w, bias = random(K, N), random(N, seed=2)
    weights = kernels.pack_weight(w), kernels.table(w, bias)
    for B, T in [(1, 1), (1, 4), (3, 17), (1, 130)]:
        x = random(B, T, K)
        wanted = run(target, plain, x, *weights, shape=(B, T, N))
        given = run(target, narrow, x.astype(ml_dtypes.bfloat16), *weights, shape=(B, T, N))
        check_rounded(given, wanted, f"B={B}, T={T}")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_that_is_rounded_is_off_by_no_more_than_it_says(target, kernels, activation):
    how = {"activation": activation, "residual": False}
    w, bias, x = random(64, 96) / 4, random(96, seed=2), random(2, 17, 64)
    inputs = kernels.pack_weight(w), kernels.table(w, bias)
    exact = run(target, linear(64, 96, kernels.tile, kernels.format, **how), x, *inputs, shape=(2, 17, 96))
    narrow = kernels.linear(64, 96, **how, narrow=True)
    found = run(target, narrow, x.astype(ml_dtypes.bfloat16), *inputs, shape=(2, 17, 96)).astype("float32")
    largest = np.abs(x @ w + bias).max()
    assert (np.abs(found - exact) <= 2.0**-8 * np.abs(exact) + 5e-5 * largest).all()
    assert (found != exact).any()


def test_rows_that_are_no_whole_registers_stay_float32(kernels):
    assert dtypes(kernels.linear(20, 37, activation="gelu", residual=False, narrow=True))[::3] == ["float32"] * 2
    assert dtypes(kernels.linear(64, 96, activation="gelu", residual=False))[-1] == "float32"
    assert dtypes(kernels.layer_norm(36, 1e-5, narrow=True))[-1] == "float32"
    assert dtypes(kernels.causal_attention(2, 20, 1.0))[-1] == "float32"
    assert dtypes(kernels.cached_attention(2, 20, 9, 1.0))[-1] == "float32"


def test_layer_norm_gives_what_the_next_would_round_to(target, kernels):
    for B, T, C in [(1, 1, 48), (3, 17, 768)]:
        inputs = random(B, T, C), random(C), random(C, seed=1)
        wanted = run(target, layer_norm(C, kernels.tile.lanes, 1e-5), *inputs, shape=(B, T, C))
        given = run(target, kernels.layer_norm(C, 1e-5, narrow=True), *inputs, shape=(B, T, C))
        check_rounded(given, wanted, f"C={C}")


@pytest.mark.slow
@pytest.mark.parametrize(("nh", "hs"), [(2, 64), (3, 16)])
def test_attention_gives_what_the_next_would_round_to(target, kernels, nh, hs):
    C, length = nh * hs, 40
    fmt, layout = attention_format("bf16", target), kv_layout(hs, kernels.format, kernels.tile)
    plain = causal_attention(nh, hs, kernels.tile, hs**-0.5, fmt)
    cached = cached_attention(nh, length, kernels.tile, layout, hs**-0.5)
    for B, T in [(1, 1), (3, 17), (1, 33)]:
        qkv = random(B, T, 3 * C)
        wanted = run(target, plain, qkv, shape=(B, T, C))
        given = run(target, kernels.causal_attention(nh, hs, hs**-0.5), qkv, shape=(B, T, C))
        check_rounded(given, wanted, f"B={B}, T={T}")
        of_cache = [np.zeros((B, nh, length, layout.elements), layout.dtype) for _ in range(2)]
        inputs = qkv, np.full(B, 3), *of_cache
        wanted = run(target, cached, *inputs, shape=(B, T, C))
        given = run(target, kernels.cached_attention(nh, hs, length, hs**-0.5), *inputs, shape=(B, T, C))
        check_rounded(given, wanted, f"cached, B={B}, T={T}")
