from collections.abc import Callable

import pytest

from bench.gpu.cases import Case, cases_of
from tvm_frontend.kernels.cuda import CudaKernels


@pytest.mark.parametrize("case", cases_of("norm_embed::layer_norm"), ids=str)
def test_layer_norm(check: Callable[[Case], None], case: Case) -> None:
    """Also of rows far from 0, where the square of the mean leaves nothing of the variance in float32."""
    check(case)


@pytest.mark.parametrize("case", cases_of("norm_embed::embedding"), ids=str)
def test_embedding(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def test_rows_beyond_the_registers_are_left_to_tvm() -> None:
    assert CudaKernels("bf16").layer_norm(8192, 1e-5) is None
