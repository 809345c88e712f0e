import numpy as np
import onnx
import onnx.parser
import pytest
import tvm
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from tvm import relax

from tvm_frontend.frontends.onnx.importer import import_onnx
from tvm_frontend.frontends.onnx.unpadded import is_unpadded
from tvm_frontend.options import CompileOptions
from tvm_frontend.pipeline import compile_graph
from tvm_frontend.target import resolve_target

# A layer with the inputs that transformers' exports have: keys are seen that are no later and no padding.
PADDED = """
<ir_version: 10, opset_import: ["" : 20]>
f (int64[B,T] input_ids, int64[B,S] attention_mask, int64[B,T] position_ids) => (float[B,T,24] y)
<int64 zero = {0}, int64 one = {1}, int64[1] axis0 = {0}, int64[1] axis1 = {1}, int64[2] axes = {1, 2},
 float low = {-3.4e38}, float nothing = {0}, int64[4] heads = {0, 0, 2, 12}, int64[3] whole = {0, 0, 24}>
{
    tokens = Gather (wte, input_ids)
    places = Gather (wpe, position_ids)
    x = Add (tokens, places)
    qkv = MatMul (x, w)
    q3, k3, v3 = Split <axis = 2, num_outputs = 3> (qkv)
    q4 = Reshape (q3, heads)
    k4 = Reshape (k3, heads)
    v4 = Reshape (v3, heads)
    q = Transpose <perm = [0, 2, 1, 3]> (q4)
    kt = Transpose <perm = [0, 2, 3, 1]> (k4)
    v = Transpose <perm = [0, 2, 1, 3]> (v4)
    scores = MatMul (q, kt)
    size = Shape <start = 1, end = 2> (input_ids)
    length = Squeeze (size)
    range = Range (zero, length, one)
    i = Unsqueeze (range, axis1)
    j = Unsqueeze (range, axis0)
    causal = LessOrEqual (j, i)
    whether = Cast <to = 9> (attention_mask)
    keys = Unsqueeze (whether, axes)
    seen = And (causal, keys)
    mask = Where (seen, nothing, low)
    masked = Add (scores, mask)
    weights = Softmax <axis = -1> (masked)
    mixed = MatMul (weights, v)
    turned = Transpose <perm = [0, 2, 1, 3]> (mixed)
    y = Reshape (turned, whole)
}
"""


@pytest.fixture(scope="module")
def padded():
    proto = onnx.parser.parse_model(PADDED)
    random = np.random.default_rng(0)
    for name, shape in (("wte", (37, 24)), ("wpe", (17, 24)), ("w", (24, 72))):
        proto.graph.initializer.append(numpy_helper.from_array(random.normal(size=shape).astype("f"), name))
    return proto


def feeds_of(B, T, hidden=0):
    random = np.random.default_rng([B, T])
    mask = np.ones((B, T), np.int64)
    mask[0, :hidden] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return {"input_ids": random.integers(0, 37, (B, T)), "attention_mask": mask, "position_ids": positions}


@pytest.mark.slow
@pytest.mark.parametrize("without", [False, True])
def test_both_graphs_are_right_and_that_without_padding_calls_the_kernels(padded, without):
    made = compile_graph(lambda: import_onnx(padded, is_unpadded=without), resolve_target(), CompileOptions())
    forward = relax.VirtualMachine(made.executable, tvm.cpu())["forward"]
    weights = [tvm.runtime.tensor(array) for array in made.graph.weights.values()]
    assert ("causal_attention" in made.graph.kernels) == ("embedding" in made.graph.kernels) == without
    for B, T, hidden in [(1, 1, 0), (3, 17, 0), (2, 9, 4)]:
        feeds = feeds_of(B, T, hidden)
        assert is_unpadded(feeds) == (hidden == 0)
        if is_unpadded(feeds) or not without:
            found = forward(*map(tvm.runtime.tensor, feeds.values()), weights).numpy()
            np.testing.assert_allclose(found, ReferenceEvaluator(padded).run(None, feeds)[0], rtol=1e-4, atol=1e-4)


def test_what_makes_a_batch_padded():
    feeds = feeds_of(2, 5)
    past = {"past_key_values.0.key": np.zeros((2, 4, 3, 8), np.float32)}
    assert is_unpadded(feeds)
    assert is_unpadded({"input_ids": feeds["input_ids"]})
    assert not is_unpadded(feeds | past)
    assert is_unpadded(feeds | past | {"position_ids": feeds["position_ids"] + 3})
    assert not is_unpadded(feeds | {"position_ids": feeds["position_ids"][:, ::-1]})
    assert not is_unpadded(feeds | {"attention_mask": 1 - feeds["attention_mask"]})
