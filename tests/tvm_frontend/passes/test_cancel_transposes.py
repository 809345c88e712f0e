import numpy as np
import pytest
import tvm
from tvm.relax import op

from tvm_frontend.passes.cancel_transposes import cancel_transposes

B, T = tvm.tirx.Var("B", "int64"), tvm.tirx.Var("T", "int64")
INPUT = {"x": ((B, T, 2, 8), "float32")}


def twice(first, second):
    return lambda emit, x: op.permute_dims(emit(op.permute_dims(x, first)), second)


UNDONE = [([0, 2, 1, 3], [0, 2, 1, 3]), ([1, 2, 3, 0], [3, 0, 1, 2]), (None, None)]


@pytest.mark.parametrize(("first", "second"), UNDONE)
def test_two_that_undo_each_other_go(graph_of, calls, first, second):
    before = graph_of(twice(first, second), INPUT, {})
    assert calls(before) == {"relax.permute_dims": 2}
    assert calls(cancel_transposes(before)) == {}


@pytest.mark.parametrize(("first", "second"), [([0, 2, 1, 3], [0, 1, 3, 2]), ([1, 2, 3, 0], [1, 2, 3, 0])])
def test_two_that_do_not_become_one(graph_of, calls, rewritten, first, second):
    before = graph_of(twice(first, second), INPUT, {})
    after = cancel_transposes(before)
    assert calls(after) == {"relax.permute_dims": 1}
    rewritten(before, after, [np.random.default_rng(0).standard_normal((3, 5, 2, 8), np.float32)])


def test_one_that_something_else_reads_stays(graph_of, calls):
    def body(emit, x):
        turned = emit(op.permute_dims(x, [0, 2, 1, 3]))
        back = emit(op.permute_dims(turned, [0, 2, 1, 3]))
        return op.matmul(emit(op.add(back, x)), emit(op.add(turned, x)))

    after = cancel_transposes(graph_of(body, {"x": ((B, 8, 8, 8), "float32")}, {}))
    assert calls(after) == {"relax.add": 2, "relax.matmul": 1, "relax.permute_dims": 1}
