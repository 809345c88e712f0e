import numpy as np
import pytest
import tvm

from gpt.cli import UserError
from tvm_frontend.kernels.cpu import reference
from tvm_frontend.kernels.cpu.attention import causal_attention
from tvm_frontend.kernels.cpu.formats import FP32, attention_format
from tvm_frontend.kernels.cpu.math import LOG2_E
from tvm_frontend.kernels.cpu.register_tile import tile_for
from tvm_frontend.target import check_runs_here, resolve_target


def attend(qkv, nh, scale):
    """The reference in float64, [B, T, C], and the largest |score|, by which its rounding grows."""
    q, k, _ = reference.heads_of(qkv.astype("float64"), nh)
    scores = np.tril(scale * q @ k.swapaxes(2, 3))  # [B, nh, T, T]
    return reference.causal_attention(qkv, nh, scale), np.abs(scores).max()


def random_qkv(B, T, C, size=1.0):
    return (size * np.random.default_rng([B, T, C]).normal(size=(B, T, 3 * C))).astype("float32")


def check(build, tile, nh, hs, shapes, scale=None, size=1.0):
    scale = hs**-0.5 if scale is None else scale
    run = build(causal_attention(nh, hs, tile, scale, FP32))
    for B, T in shapes:
        qkv = random_qkv(B, T, nh * hs, size)
        expected, largest_score = attend(qkv, nh, scale)
        found = run(qkv, shape=expected.shape)
        # A weight is off by e^(score's rounding), a sum over hs and one over T are added.
        tolerance = 2.0**-24 * (20 + 4 * largest_score + hs + T) * size
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=f"B={B} T={T}")


@pytest.mark.slow
@pytest.mark.parametrize(("nh", "hs"), [(2, 8), (3, 20), (1, 32), (2, 64), (1, 7), (7, 1)])
def test_any_head(build, tile, nh, hs):
    check(build, tile, nh, hs, [(1, 1), (3, 17), (2, 65)])


def test_any_length_about_the_edges_of_a_block(build, tile):
    # A block is 32, 16 or 8 queries, keys are taken 8 or 4 at a time.
    lengths = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 100]
    check(build, tile, 1, 8, [(1, T) for T in lengths])


def test_the_scale_is_the_one_given(build, tile):
    check(build, tile, 2, 8, [(2, 9)], scale=0.9)


def test_large_scores_neither_overflow_nor_lose_the_largest(build, tile):
    rng = np.random.default_rng(0)
    nh, hs, T = 2, 8, 40
    qkv = random_qkv(1, T, nh * hs)
    qkv[..., : nh * hs] = rng.choice([-1.0, 1.0], (1, T, nh * hs)) * 10  # q: with k of ±1, scores up to ±80
    qkv[..., nh * hs : 2 * nh * hs] = rng.choice([-1.0, 1.0], (1, T, nh * hs))
    expected, largest_score = attend(qkv, nh, 1.0)
    assert largest_score == 80
    found = build(causal_attention(nh, hs, tile, 1.0, FP32))(qkv, shape=expected.shape)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_scores_of_thousands_pick_the_largest(build, tile):
    qkv = random_qkv(2, 33, 8, size=100.0)  # scores beyond what exp takes
    expected, largest_score = attend(qkv, 1, 1.0)
    assert largest_score > 1e4
    found = build(causal_attention(1, 8, tile, 1.0, FP32))(qkv, shape=expected.shape)
    np.testing.assert_allclose(found, expected, atol=100 * 2.0**-24 * largest_score)


def test_later_positions_change_nothing(build, tile):
    run = build(causal_attention(2, 8, tile, 0.35, FP32))
    qkv = random_qkv(1, 40, 16)
    before = run(qkv, shape=(1, 40, 16))
    qkv[:, 21:] = 1e3
    np.testing.assert_array_equal(run(qkv, shape=(1, 40, 16))[:, :21], before[:, :21])


def test_a_nan_in_a_query_is_not_hidden(build, tile):
    qkv = random_qkv(1, 20, 16)
    qkv[0, 19, :8] = np.nan  # the last query of head 0
    found = build(causal_attention(2, 8, tile, 0.35, FP32))(qkv, shape=(1, 20, 16))
    assert np.isnan(found[0, 19, :8]).all()
    assert np.isfinite(found[0, :19]).all()
    assert np.isfinite(found[0, 19, 8:]).all()


@pytest.fixture(scope="module")
def with_bf16():
    target = resolve_target(mcpu="cooperlake")
    try:
        check_runs_here(target.to_json())
    except UserError as error:
        pytest.skip(str(error))
    return target


@pytest.mark.parametrize(("nh", "hs"), [(2, 64), (3, 20), (1, 7)])
def test_products_in_bf16_are_off_by_the_rounding_of_the_weights(with_bf16, nh, hs):
    fmt = attention_format("int8", with_bf16)
    assert fmt.precision == "bf16"
    kernel = causal_attention(nh, hs, tile_for(with_bf16), hs**-0.5, fmt).with_attr("global_symbol", "run")
    library = tvm.compile(tvm.IRModule({"run": kernel}), with_bf16.to_tvm())
    C = nh * hs
    for B, T in [(1, 1), (1, 2), (3, 17), (1, 33), (2, 64), (1, 130)]:
        qkv = random_qkv(B, T, C)
        # The kernel scales queries first, so they are rounded to the same numbers.
        factor = np.float32(hs**-0.5 * LOG2_E)
        rounded = reference.to_bf16(np.concatenate([qkv[..., :C] * factor, qkv[..., C:]], -1))
        expected, largest_score = attend(rounded, nh, 1 / LOG2_E)
        out = tvm.runtime.tensor(np.full((B, T, C), np.nan, "float32"))
        library["run"](tvm.runtime.tensor(qkv), out)
        # A weight is rounded by up to 2⁻⁸ of itself, and then they are no longer one together.
        tolerance = 2.0**-8 * np.abs(rounded[..., 2 * C :]).max() + 2.0**-24 * (20 + 4 * largest_score + hs + T)
        np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=tolerance, err_msg=f"B={B} T={T}")
        assert T == 1 or np.abs(out.numpy() - expected).max() > 2.0**-16  # it is another precision


def test_without_instructions_for_bf16_attention_stays_float32(target):
    assert attention_format("bf16", target) is FP32
