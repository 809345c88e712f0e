"""A cache that grows is preallocated where only causal attention and positions depend on how long it is."""

import re
from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import pytest
import tvm
from onnx.reference import ReferenceEvaluator
from tvm import relax

from tvm_frontend.frontends.onnx.importer import import_onnx
from tvm_frontend.graph import ENTRY, Graph
from tvm_frontend.passes.cancel_transposes import cancel_transposes
from tvm_frontend.passes.fuse_cached_attention import fuse_cached_attention
from tvm_frontend.passes.fuse_embedding import fuse_embedding
from tvm_frontend.passes.preallocate import NotPossible, preallocate
from tvm_frontend.pipeline import bundle_weights, lower, machine_code

LENGTH, V = 9, 37
STEP = """
<ir_version: 10, opset_import: ["" : 23]>
step (int64[B,T] ids, float[B,2,P,12] keys, float[B,2,P,12] values)
    => (float[B,T,24] y, float[B,2,PT,12] keys_out, float[B,2,PT,12] values_out)
<int64[2] heads = {2, 12}, int64[1] width = {24}, int64 one = {1}>
{
    T1 = Shape <start = 1, end = 2> (ids)
    P1 = Shape <start = 2, end = 3> (keys)
    end1 = Add (P1, T1)
    P0 = Squeeze (P1)
    end = Squeeze (end1)
    positions = Range (P0, end, one)
    tokens = Gather (wte, ids)
    places = Gather (wpe, positions)
    qkv = Add (tokens, places)
    q, k, v = Split <axis = 2, num_outputs = 3> (qkv)
    BT = Shape <start = 0, end = 2> (qkv)
    split = Concat <axis = 0> (BT, heads)
    q4 = Reshape (q, split)
    k4 = Reshape (k, split)
    v4 = Reshape (v, split)
    qh = Transpose <perm = [0, 2, 1, 3]> (q4)
    kh = Transpose <perm = [0, 2, 1, 3]> (k4)
    vh = Transpose <perm = [0, 2, 1, 3]> (v4)
    yh, keys_out, values_out = Attention <is_causal = 1> (qh, kh, vh, , keys, values)
    y4 = Transpose <perm = [0, 2, 1, 3]> (yh)
    merged = Concat <axis = 0> (BT, width)
    y = Reshape (y4, merged)
}
"""


def growing(**changes: str) -> onnx.ModelProto:
    """One layer over a past, as in the text above but for the lines that `changes` begin."""
    lines = [
        next((f"    {name} = {changes[name]}" for name in changes if re.match(rf"\s*{name}[ ,]", line)), line)
        for line in STEP.splitlines()
    ]
    proto = onnx.parser.parse_model("\n".join(lines))
    random = np.random.default_rng(0)
    for name, rows in (("wte", V), ("wpe", LENGTH)):
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(random.standard_normal((rows, 72), np.float32), name)
        )
    return proto


def preallocated(proto: onnx.ModelProto) -> Graph:
    return preallocate(import_onnx(proto), ids=0, logits=0, presents={1: 1, 2: 2}, length=LENGTH)


@pytest.fixture
def run(target) -> Callable[..., list[np.ndarray]]:
    def call(graph: Graph, *inputs: np.ndarray) -> list[np.ndarray]:
        executable, _ = machine_code(lower(bundle_weights(graph), target, 0), target)
        weights = [tvm.runtime.tensor(array) for array in graph.weights.values()]
        results = relax.VirtualMachine(executable, tvm.cpu())[ENTRY](*map(tvm.runtime.tensor, inputs), weights)
        return [result.numpy() for result in results]

    return call


def test_a_preallocated_cache_gives_what_one_that_grows_does(run):
    proto = growing()
    evaluator, random = ReferenceEvaluator(proto), np.random.default_rng(1)
    ids = random.integers(0, V, (2, 3))
    pos = np.array([5, 2])
    filled = random.standard_normal((2, 2, 2, LENGTH, 12), np.float32)  # keys and values, of which pos[b] rows count
    y, end, *caches = run(preallocated(proto), ids, pos, *filled)
    np.testing.assert_array_equal(end, pos + 3)
    for b, P in enumerate(pos):
        past = filled[:, b : b + 1, :, :P]
        wanted, *presents = evaluator.run(None, {"ids": ids[b : b + 1], "keys": past[0], "values": past[1]})
        np.testing.assert_allclose(y[b], wanted[0], rtol=1e-5, atol=1e-5)
        for cache, present in zip(caches, presents, strict=True):
            np.testing.assert_allclose(cache[b, :, : P + 3], present[0], rtol=1e-6, atol=1e-6)


def test_it_becomes_the_kernels_of_a_cached_export(kernels, calls):
    graph = fuse_cached_attention(cancel_transposes(preallocated(growing())), kernels)
    found = calls(fuse_embedding(graph, kernels))
    assert found["embedding"] == 1
    assert found["relax.call_tir_inplace"] == 1
    assert not {"relax.concat", "relax.matmul", "relax.nn.attention", "relax.take"} & set(found)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"yh": "Attention (qh, kh, vh, , keys, values)", "y4": "Transpose <perm = [0, 2, 1, 3]> (yh)"},
            "its keys and values are read by",
        ),
        ({"qkv": "Add (shifted, places)", "tokens": "Gather (wte, ids)"}, "needs the size P"),
        ({"positions": "Range (twice, end2, one)"}, "needs the size P"),
    ],
    ids=["not causal", "P is a number in it", "other positions"],
)
def test_what_depends_on_the_length_otherwise_stays_as_it_is(changes, reason):
    proto = growing(**{name: line for name, line in changes.items() if name != "yh"})
    nodes = {output: node for node in proto.graph.node for output in node.output}
    if "yh" in changes:
        del nodes["yh"].attribute[:]
    if "qkv" in changes:
        at = list(proto.graph.node).index(nodes["qkv"])
        proto.graph.node.insert(at, onnx.helper.make_node("Add", ["tokens", "P float"], ["shifted"]))
        proto.graph.node.insert(at, onnx.helper.make_node("Cast", ["P1"], ["P float"], to=onnx.TensorProto.FLOAT))
    if "positions" in changes:
        at = list(proto.graph.node).index(nodes["positions"])
        proto.graph.node.insert(at, onnx.helper.make_node("Add", ["P0", "P0"], ["twice"]))
        proto.graph.node.insert(at + 1, onnx.helper.make_node("Add", ["end", "P0"], ["end2"]))
    with pytest.raises(NotPossible, match=reason):
        preallocated(proto)
