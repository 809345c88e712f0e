import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_frontend.graph import ENTRY
from tvm_frontend.passes.rewrite import Rewriting
from tvm_frontend.passes.score_bound import longest_vector

B, T = tvm.tirx.Var("B", "int64"), tvm.tirx.Var("T", "int64")
C, nh, hs = 18, 2, 12
X = {"x": ((B, T, C), "float32")}
random = np.random.default_rng(0)
WEIGHTS = {
    name: random.normal(size=shape).astype("float32")
    for name, shape in {"gain": C, "offset": C, "w": (C, 3 * nh * hs), "bias": 3 * nh * hs}.items()
}


def heads(part=1, axes=(0, 2, 1, 3), scale=0.3, epsilon=1e-5, normal=True):
    """Keys in heads from x, as a GPT has them: of a part of the columns, scaled, with axes in an order."""

    def body(emit, x, gain, offset, w, bias):
        x = emit(op.nn.layer_norm(x, gain, offset, axes=[-1], epsilon=epsilon)) if normal else x
        qkv = emit(op.add(emit(op.matmul(x, w)), bias))
        keys = emit(emit(op.split(qkv, 3, axis=2))[part])
        keys = emit(op.multiply(keys, relax.const(np.float32(scale))))
        keys = emit(op.reshape(keys, (B, T, nh, hs)))
        return op.permute_dims(keys, axes)

    return body


def bound(graph, axis):
    rewriting = Rewriting(graph)
    rewriting.apply(relax.dpl.is_op("relax.erf")(relax.dpl.wildcard()), lambda *_: None)  # it reads the bindings
    return longest_vector(rewriting, graph.module[ENTRY].body.body, axis)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "axes"), [(0, (0, 2, 1, 3)), (1, (0, 2, 3, 1)), (2, (0, 1, 2, 3))])
def test_no_vector_is_longer_than_the_bound_and_some_are_nearly_as_long(graph_of, run, part, axes):
    graph = graph_of(heads(part, axes), X, WEIGHTS)
    most = bound(graph, axes.index(3))
    w = WEIGHTS["gain"][:, None] * WEIGHTS["w"][:, part * nh * hs :][:, : nh * hs]
    directions = np.concatenate([np.linalg.svd(w[:, :hs])[0].T, np.linalg.svd(w[:, hs:])[0].T, np.eye(C)])
    x = np.concatenate([directions, -directions, np.random.default_rng(1).normal(size=(3000, C))])[None]
    lengths = np.linalg.norm(run(graph, x.astype("float32")), axis=axes.index(3))
    assert 0.7 * most < lengths.max() <= most


def test_what_is_not_followed_has_no_bound(graph_of):
    assert bound(graph_of(heads(normal=False), X, WEIGHTS), 3) is None
    assert bound(graph_of(heads(), X, WEIGHTS), 1) is None  # along heads
    assert bound(graph_of(heads(), X, WEIGHTS), 2) is None  # along positions
