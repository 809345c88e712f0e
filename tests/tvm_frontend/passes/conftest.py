"""What the tests of the passes share: small graphs, and how to run them."""

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_frontend.graph import ENTRY, Graph
from tvm_frontend.kernels import Kernels, kernels_for
from tvm_frontend.pipeline import bundle_weights, lower, machine_code
from tvm_frontend.target import CompileTarget, resolve_target

B, T = tvm.tirx.Var("B", "int64"), tvm.tirx.Var("T", "int64")


@pytest.fixture(scope="session")
def target() -> CompileTarget:
    return resolve_target()


@pytest.fixture(scope="session")
def kernels(target: CompileTarget) -> Kernels:
    return kernels_for(target)


@pytest.fixture
def graph_of() -> Callable[..., Graph]:
    """graph_of(body, inputs={name: (dims, dtype)}, weights={name: array}): body(emit, **variables) is the result."""

    def make(body: Callable, inputs: dict, weights: dict) -> Graph:
        builder = relax.BlockBuilder()
        parameters = {name: relax.Var(name, relax.TensorType(*of)) for name, of in inputs.items()}
        parameters |= {
            name: relax.Var(name, relax.TensorType(value.shape, str(value.dtype))) for name, value in weights.items()
        }
        with builder.function(ENTRY, list(parameters.values()), attrs={"num_input": len(inputs)}):
            with builder.dataflow():
                out = builder.emit_output(body(builder.emit, **parameters))
            builder.emit_func_output(out)
        return Graph(builder.finalize(), weights)

    return make


@pytest.fixture
def run(target: CompileTarget) -> Callable[..., np.ndarray]:
    """Compile a graph as it is, TVM's own code for what is no kernel yet, and call it on its inputs."""

    def call(graph: Graph, *inputs: np.ndarray) -> np.ndarray:
        executable, _ = machine_code(lower(bundle_weights(graph), target, 0), target)
        weights = [tvm.runtime.tensor(array) for array in graph.weights.values()]
        forward = relax.VirtualMachine(executable, tvm.cpu())[ENTRY]
        return forward(*map(tvm.runtime.tensor, inputs), weights).numpy()

    return call


@pytest.fixture
def rewritten(run: Callable[..., np.ndarray]) -> Callable[[Graph, Graph, list[np.ndarray]], None]:
    """Check that a pass kept a graph's meaning: both give the same numbers."""

    def check(before: Graph, after: Graph, inputs: list[np.ndarray]) -> None:
        # float32 sums of some ten values about 1, in another order
        np.testing.assert_allclose(run(after, *inputs), run(before, *inputs), rtol=1e-5, atol=1e-5)

    return check
