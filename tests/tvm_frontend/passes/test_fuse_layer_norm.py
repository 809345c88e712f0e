import numpy as np
import pytest
import tvm
from tvm.relax import op

from tvm_frontend.passes.fuse_layer_norm import fuse_layer_norm

B, T = tvm.tirx.Var("B", "int64"), tvm.tirx.Var("T", "int64")
C = 20
GAINS = {"gain": np.linspace(-1, 1, C, dtype="float32"), "bias": np.linspace(2, 3, C, dtype="float32")}


@pytest.mark.parametrize("axis", [-1, 2])
def test_over_the_last_axis_it_becomes_one_kernel_of_the_same_meaning(graph_of, calls, kernels, rewritten, axis):
    before = graph_of(
        lambda emit, x, gain, bias: op.nn.layer_norm(x, gain, bias, axes=[axis], epsilon=0.1),
        {"x": ((B, T, C), "float32")},
        GAINS,
    )
    assert calls(before) == {"relax.nn.layer_norm": 1}
    after = fuse_layer_norm(before, kernels)
    assert calls(after) == {"layer_norm": 1}
    rewritten(before, after, [np.random.default_rng(0).normal(size=(2, 5, C)).astype("float32")])


@pytest.mark.parametrize("dims", [(T, C), (B, 3, T, C)])
def test_rows_of_other_dimensions_are_rows_too(graph_of, calls, kernels, rewritten, dims):
    before = graph_of(
        lambda emit, x, gain, bias: op.nn.layer_norm(x, gain, bias, axes=[-1]), {"x": (dims, "float32")}, GAINS
    )
    after = fuse_layer_norm(before, kernels)
    assert calls(after) == {"layer_norm": 1, "relax.reshape": 2}
    sizes = [{B: 2, T: 5}.get(dim, dim) for dim in dims]
    rewritten(before, after, [np.random.default_rng(0).normal(size=sizes).astype("float32")])


@pytest.mark.parametrize(("dims", "axes"), [((B, C, C), [1]), ((B, T, 4, 5), [2, 3])])
def test_over_other_axes_it_stays(graph_of, calls, kernels, dims, axes):
    gains = {name: array.reshape([int(dims[axis]) for axis in axes]) for name, array in GAINS.items()}
    before = graph_of(
        lambda emit, x, gain, bias: op.nn.layer_norm(x, gain, bias, axes=axes), {"x": (dims, "float32")}, gains
    )
    assert calls(fuse_layer_norm(before, kernels)) == {"relax.nn.layer_norm": 1}
