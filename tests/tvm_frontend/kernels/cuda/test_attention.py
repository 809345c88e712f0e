from collections.abc import Callable

import pytest

from bench.gpu.cases import Case, cases_of
from tvm_frontend.kernels.cuda import CudaKernels


@pytest.mark.parametrize("case", cases_of("attention::causal_attention"), ids=str)
def test_causal_attention(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", cases_of("attention::over_a_cache"), ids=str)
def test_over_a_cache(check: Callable[[Case], None], case: Case) -> None:
    """Sequences of different length; the cache is NaN beyond each, and only the new rows are written."""
    check(case)


def test_heads_that_tiles_do_not_divide_are_left_to_tvm() -> None:
    kernels = CudaKernels("bf16")
    assert kernels.causal_attention(2, 20, 0.2) is None
    assert kernels.causal_attention(2, 256, 0.1) is None
    assert kernels.cached_attention(2, 20, 64, 0.2) is None
    assert CudaKernels("tf32").causal_attention(2, 64, 0.1) is None
