import numpy as np
import tvm
from tvm.relax import op

from tvm_frontend.passes.fuse_linear import fuse_linear

T = tvm.tirx.Var("T", "int64")


def test_a_pass_leaves_the_graph_that_it_is_given_as_it_was(graph_of, calls, kernels):
    weight = np.ones((12, 20), "float32")
    before = graph_of(lambda emit, x, w: op.matmul(x, w), {"x": ((1, T, 12), "float32")}, {"w": weight})
    after = fuse_linear(before, kernels)
    assert calls(after) == {"linear": 1}
    assert calls(before) == {"relax.matmul": 1}
    assert len(before.module.get_global_vars()) == 1
