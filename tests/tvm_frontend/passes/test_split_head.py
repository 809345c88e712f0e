import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_frontend.passes.fuse_linear import fuse_linear
from tvm_frontend.passes.split_head import split_head
from tvm_frontend.pipeline import bundle_weights, lower, machine_code

B, T = tvm.tirx.Var("B", "int64"), tvm.tirx.Var("T", "int64")
C, V = 12, 20
RNG = np.random.default_rng(0)
WEIGHTS = {"wte": RNG.normal(size=(V, C)).astype("float32"), "w": RNG.normal(size=(C, C)).astype("float32")}
INPUTS = {"ids": ((B, T), "int64"), "cache": ((B, 3), "float32")}


def hidden(emit, ids, wte, w):
    x = emit(op.take(wte, ids, axis=0))  # [B, T, C]
    return emit(op.nn.relu(emit(op.matmul(x, w))))


def logits(emit, x, wte):
    return emit(op.matmul(x, emit(op.permute_dims(wte))))


def alone(emit, ids, cache, wte, w):
    return logits(emit, hidden(emit, ids, wte, w), wte)


def last_position(emit, ids, cache, wte, w):
    x = hidden(emit, ids, wte, w)
    return logits(emit, emit(op.strided_slice(x, [1], [-1], [2**31])), wte)


def read_twice(emit, ids, cache, wte, w):
    out = logits(emit, hidden(emit, ids, wte, w), wte)
    return relax.Tuple([out, emit(op.nn.relu(out))])


def no_kernel(emit, ids, cache, wte, w):
    return emit(op.take(wte, ids, axis=0))


@pytest.fixture
def fused(graph_of, kernels):
    return lambda body: fuse_linear(graph_of(body, INPUTS, WEIGHTS), kernels)


@pytest.fixture
def functions(target):
    """Those of a graph, to be called on arrays."""

    def load(graph):
        executable, _ = machine_code(lower(bundle_weights(graph), target, 0), target)
        machine = relax.VirtualMachine(executable, tvm.cpu())
        weights = [tvm.runtime.tensor(array) for array in graph.weights.values()]
        return {name: caller(machine[name], weights) for name in graph.entry_points}

    def caller(function, weights):
        return lambda *inputs: function(*map(tvm.runtime.tensor, inputs), weights).numpy()

    return load


def test_head_after_body_is_the_whole(fused, functions):
    graph = split_head(fused(alone))
    body, forward, head = functions(graph).values()
    inputs = RNG.integers(0, V, (2, 5)), np.zeros((2, 3), "float32")
    expected, x = forward(*inputs), body(*inputs)
    assert x.shape == (2, 5, C)
    for rows in ([4, 4], [0, 3]):
        found = head(x, np.array(rows))
        assert found.shape == (2, 1, V)
        np.testing.assert_allclose(found[:, 0], expected[[0, 1], rows], rtol=1e-5, atol=1e-6)


def test_both_parts_call_the_kernels_of_the_whole(fused):
    whole = fused(alone)
    added = set(split_head(whole).module.get_global_vars()) - set(whole.module.get_global_vars())
    assert {name.name_hint for name in added} == {"body", "head"}


@pytest.mark.parametrize("body", [last_position, read_twice, no_kernel])
def test_what_has_no_head_stays_whole(fused, body):
    graph = fused(body)
    assert split_head(graph) is graph
