"""What the tests of the kernels share: each kernel is built for each width of vector and run on its own."""

from collections.abc import Callable

import numpy as np
import pytest
import tvm

from gpt.cli import UserError
from tvm_frontend.kernels.cpu.register_tile import Tile, tile_for
from tvm_frontend.target import CompileTarget, check_runs_here, resolve_target

CPUS = {"avx512": "skylake-avx512", "avx2": "haswell", "sse": "x86-64"}


@pytest.fixture(scope="session", params=CPUS)
def target(request: pytest.FixtureRequest) -> CompileTarget:
    """Each kind of CPU that the kernels are written for, where this machine can run its code."""
    target = resolve_target(mcpu=CPUS[request.param])
    try:
        check_runs_here(target.to_json())
    except UserError as error:
        pytest.skip(str(error))
    return target


@pytest.fixture(scope="session")
def tile(target: CompileTarget) -> Tile:
    return tile_for(target)


@pytest.fixture(scope="session")
def library_of(target: CompileTarget) -> Callable[[tvm.tirx.PrimFunc], tvm.runtime.Executable]:
    """Compile a kernel to a library, in which it is `run`."""
    return lambda kernel: tvm.compile(tvm.IRModule({"run": kernel.with_attr("global_symbol", "run")}), target.to_tvm())


@pytest.fixture(scope="session")
def build(library_of: Callable) -> Callable[[tvm.tirx.PrimFunc], Callable]:
    """Compile a kernel to a function of numpy arrays, whose last argument is the shape of its float32 result."""

    def compiled(kernel: tvm.tirx.PrimFunc) -> Callable[..., np.ndarray]:
        library = library_of(kernel)

        def run(*arguments: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
            # What a kernel forgets to write stays NaN.
            out = tvm.runtime.tensor(np.full(shape, np.nan, "float32"))
            library["run"](*map(tvm.runtime.tensor, arguments), out)
            return out.numpy()

        return run

    return compiled
