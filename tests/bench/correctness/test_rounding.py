"""The ways of rounding, against what tools and kernels are known to store."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from bench.backends import find_candidates
from bench.backends.openvino import IN_4_BITS
from bench.correctness.agreement import PRECISIONS
from bench.correctness.reference import in_float64
from bench.correctness.rounding import (
    Rounding,
    by_32,
    by_matrix,
    by_row,
    by_row_with_offset,
    by_tensor_with_offset,
    int4_by_32,
    int4_by_group,
)
from bench.models.build import SEEDED
from gpt.checkpoint import seeded_checkpoint
from tvm_frontend.kernels.cpu import reference as kernels


def weights(*shape: int) -> np.ndarray:
    """Draw weights in float32, as checkpoints have them, held in float64."""
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("K", [1, 31, 64, 100])
def test_weights_are_rounded_as_our_kernels_store_them(K: int) -> None:
    w = weights(9, K)
    q, scales = kernels.quantize_columns(w.T.astype(np.float32))
    np.testing.assert_allclose(by_row(w), (q * scales).T, rtol=1e-6)
    q, scales = kernels.quantize_column_groups(w.T.astype(np.float32))
    expected = ((q.astype(np.float64) - 8) * scales).reshape(9, -1)[:, :K]
    np.testing.assert_allclose(int4_by_32(w), expected, rtol=1e-6)


def test_activations_are_rounded_as_our_kernels_round_them() -> None:
    x = weights(2, 5, 70)
    q, scales = kernels.quantize_rows(x.astype(np.float32))
    np.testing.assert_allclose(by_row(x), q * scales, rtol=1e-6)
    q, scales = kernels.quantize_rows(kernels.groups_of(x.astype(np.float32)))
    np.testing.assert_allclose(by_32(x), (q * scales).reshape(2, 5, -1)[..., :70], rtol=1e-6)


@pytest.mark.parametrize(
    ("rounded", "steps"),
    [
        (by_row, 127),
        (by_matrix, 127),
        (by_row_with_offset, 255 / 2),
        (by_tensor_with_offset, 255 / 2),
        (by_32, 127),
        (int4_by_32, 7),
        (lambda w: int4_by_group(w, 48), 7),
    ],
)
def test_an_element_moves_by_half_a_step_at_most(rounded: Callable[[np.ndarray], np.ndarray], steps: float) -> None:
    w = weights(12, 48)
    moved = np.abs(rounded(w) - w)
    assert (
        0 < moved.max() <= 1.02 * np.abs(w).max() / steps / 2 * (2 if steps == 7 else 1)
    )  # -8 … 7: the last is clipped
    np.testing.assert_allclose(rounded(rounded(w)), rounded(w), rtol=0, atol=1e-6 + np.abs(w).max() / 1000)


@pytest.mark.parametrize("rounded", [by_row, by_matrix, by_row_with_offset, by_tensor_with_offset, by_32, int4_by_32])
def test_zeros_stay_zeros(rounded: Callable[[np.ndarray], np.ndarray]) -> None:
    assert not rounded(np.zeros((3, 40))).any()


def test_a_group_is_as_long_as_a_power_of_two_divides_the_width() -> None:
    w = weights(4, 192)
    for width, size in ((48, 16), (64, 64), (384, 128)):
        groups = np.pad(w, [(0, 0), (0, -192 % size)]).reshape(4, -1, size)
        scales = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1) / -8
        expected = np.clip(np.rint(groups / scales), -8, 7) * scales
        np.testing.assert_allclose(int4_by_group(w, width), expected.reshape(4, -1)[:, :192])


def test_a_rounded_model_has_the_rounded_weights_and_no_others() -> None:
    checkpoint = seeded_checkpoint(SEEDED["tiny"])
    plain, rounded = in_float64(checkpoint).state_dict(), in_float64(checkpoint, IN_4_BITS).state_dict()
    for name, tensor in plain.items():
        w = tensor.numpy()
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            expected = int4_by_group(w, checkpoint.config.n_embd)
        elif name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")):
            expected = by_row_with_offset(w)
        else:
            expected = w
        torch.testing.assert_close(rounded[name], torch.from_numpy(expected), rtol=0, atol=0)


def test_every_engine_in_few_bits_says_how_it_rounds() -> None:
    for candidate in find_candidates((), PRECISIONS):
        assert isinstance(candidate.rounding, Rounding) == (candidate.precision in ("int8", "int4")), candidate.label
