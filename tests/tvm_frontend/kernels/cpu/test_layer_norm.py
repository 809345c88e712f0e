import numpy as np
import pytest

from tvm_frontend.kernels.cpu import reference
from tvm_frontend.kernels.cpu.layer_norm import layer_norm


def random(B, T, C):
    rng = np.random.default_rng([B, T, C])
    return [rng.normal(size=shape).astype("float32") for shape in [(B, T, C), (C,), (C,)]]


@pytest.mark.parametrize("C", [1, 7, 20, 32, 100, 768])
def test_any_width(build, tile, C):
    run = build(layer_norm(C, tile.lanes, 1e-5))
    for B, T in [(1, 1), (3, 17), (2, 64)]:
        x, gain, bias = random(B, T, C)
        # Sums of C, then some ten roundings of values up to 5 or so.
        np.testing.assert_allclose(
            run(x, gain, bias, shape=x.shape),
            reference.layer_norm(x, gain, bias),
            atol=2.0**-24 * (100 + C),
            err_msg=f"{B} {T}",
        )


def test_a_large_mean_takes_no_more_digits_than_it_must(build, tile):
    x, gain, bias = random(2, 5, 768)
    x += np.float32(1e4)  # of which a float32 keeps 1e-3; the one-pass variance would lose all digits
    found = build(layer_norm(768, tile.lanes, 1e-5))(x, gain, bias, shape=x.shape)
    # The mean itself is off by some roundings of 1e4, each 6e-4.
    np.testing.assert_allclose(found, reference.layer_norm(x, gain, bias), atol=2e-2)


def test_a_constant_row_becomes_the_bias(build, tile):
    _, gain, bias = random(1, 1, 32)
    found = build(layer_norm(32, tile.lanes, 1e-5))(np.full((1, 2, 32), 3, "float32"), gain, bias, shape=(1, 2, 32))
    np.testing.assert_allclose(found, np.broadcast_to(bias, (1, 2, 32)), atol=1e-6)


def test_epsilon_is_the_one_given(build, tile):
    x, gain, bias = random(1, 3, 32)
    found = build(layer_norm(32, tile.lanes, 0.5))(x, gain, bias, shape=x.shape)
    np.testing.assert_allclose(found, reference.layer_norm(x, gain, bias, epsilon=0.5), atol=1e-5)
