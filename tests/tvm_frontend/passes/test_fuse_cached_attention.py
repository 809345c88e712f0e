from collections.abc import Callable

import numpy as np
import onnx.parser
import pytest
import tvm
from tvm import relax

from tvm_frontend.frontends.onnx.importer import import_onnx
from tvm_frontend.graph import ENTRY, Graph
from tvm_frontend.passes.fuse_cached_attention import fuse_cached_attention
from tvm_frontend.pipeline import bundle_weights, lower, machine_code

STEP = """
<ir_version: 10, opset_import: ["" : 24]>
step (float[B,T,72] qkv, int64[B] pos, int64[B] other, float[B,2,9,12] keys, float[B,2,9,12] values)
    => (float[B,T,24] y, float[B,2,9,12] keys_out, float[B,2,9,12] values_out)
<int64[2] heads = {2, 12}, int64[1] width = {24}>
{
    q, k, v = Split <axis = 2, num_outputs = 3> (qkv)
    BT = Shape <start = 0, end = 2> (qkv)
    T1 = Shape <start = 1, end = 2> (qkv)
    split = Concat <axis = 0> (BT, heads)
    q4 = Reshape (q, split)
    k4 = Reshape (k, split)
    v4 = Reshape (v, split)
    qh = Transpose <perm = [0, 2, 1, 3]> (q4)
    kh = Transpose <perm = [0, 2, 1, 3]> (k4)
    vh = Transpose <perm = [0, 2, 1, 3]> (v4)
    keys_out = TensorScatter <axis = 2> (keys, kh, pos)
    values_out = TensorScatter <axis = 2> (values, vh, pos)
    end = Add (pos, T1)
    yh = Attention <is_causal = 1> (qh, keys_out, values_out, , , , end)
    y4 = Transpose <perm = [0, 2, 1, 3]> (yh)
    merged = Concat <axis = 0> (BT, width)
    y = Reshape (y4, merged)
}
"""


def step(**changes: str) -> Graph:
    """One layer's attention over a cache of 9 rows, as in the text above but for the lines that `changes` begin."""
    lines = [
        next((f"    {name} = {changes[name]}" for name in changes if line.strip().startswith(f"{name} = ")), line)
        for line in STEP.splitlines()
    ]
    return import_onnx(onnx.parser.parse_model("\n".join(lines)))


@pytest.fixture
def run(target) -> Callable[..., list[np.ndarray]]:
    def call(graph: Graph, *inputs: np.ndarray) -> list[np.ndarray]:
        executable, _ = machine_code(lower(bundle_weights(graph), target, 0), target)
        results = relax.VirtualMachine(executable, tvm.cpu())[ENTRY](*map(tvm.runtime.tensor, inputs), [])
        return [result.numpy() for result in results]

    return call


@pytest.mark.parametrize(
    "changes", [{}, {"yh": "Attention <is_causal = 1, scale = 0.9> (qh, keys_out, values_out, , , , end)"}]
)
def test_it_becomes_one_kernel_of_the_same_meaning(calls, kernels, run, changes):
    before = step(**changes)
    after = fuse_cached_attention(before, kernels)
    assert calls(before)["tensor_scatter"] == 2
    fused = calls(after)
    assert fused["relax.call_tir_inplace"] == 1
    assert fused.keys() <= {"relax.call_tir_inplace", "relax.arange", "relax.add"}  # the rest is pos + T, unused
    rng = np.random.default_rng(0)
    qkv = rng.normal(size=(2, 3, 72)).astype("float32")
    caches = [rng.normal(size=(2, 2, 9, 12)).astype("float32") for _ in range(2)]
    pos = np.array([1, 6])
    for found, expected in zip(run(after, qkv, pos, pos, *caches), run(before, qkv, pos, pos, *caches), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


LEFT_ALONE = {
    "the thirds in another order": {"k4": "Reshape (v, split)", "v4": "Reshape (k, split)"},
    "an end that is not pos + T": {"end": "Add (other, T1)"},
    "rows written elsewhere": {"values_out": "TensorScatter <axis = 2> (values, vh, other)"},
    "a cache that is read again": {
        "values_out": "TensorScatter <axis = 2> (values, vh, pos)\n    more = Add (values, values)"
    },
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_attention_of_another_kind_stays(calls, kernels, case):
    before = step(**LEFT_ALONE[case])
    assert calls(fuse_cached_attention(before, kernels)) == calls(before)
