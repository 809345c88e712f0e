import json
from functools import cache

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from gpt.costs import matmul_parameters, prefill_flops_per_token
from tvm_frontend.coverage import Coverage, coverage_of
from tvm_frontend.frontends.onnx.importer import import_onnx
from tvm_frontend.pipeline import graph_phases
from tvm_frontend.target import resolve_target


@cache
def rewritten(proto_bytes, *without, opt_level=3):
    graph = import_onnx(onnx.load_from_string(proto_bytes))
    for name, phase in graph_phases(resolve_target(), opt_level):
        if name == "bundle_weights":
            break
        graph = graph if name in without else phase(graph)
    return graph


@pytest.fixture(scope="module")
def file(exported):
    return onnx.load(exported.path).SerializeToString()


def test_all_of_an_export_of_ours_is_in_kernels(file):
    found = coverage_of(rewritten(file), batch=2, tokens=9)
    assert (found.flops_share, found.bytes_share, found.left, found.elementwise) == (1, 1, [], {})
    assert str(found) == "100 % of the FLOPs and 100 % of the weights' bytes are in this project's kernels"


@pytest.mark.slow
def test_a_cache_is_covered_too(export, exported):
    _, cached = export(exported.config, form="cached")
    found = coverage_of(rewritten(onnx.load(cached.path).SerializeToString()), tokens=1)
    assert (found.flops_share, found.bytes_share, found.left) == (1, 1, [])


@pytest.mark.slow
def test_what_no_kernel_does_is_all_of_the_rest(file, exported):
    config, T = exported.config, 9
    whole = config.n_layer * 2 * config.n_embd * (T + 1) * T  # attention's part of prefill_flops_per_token
    without = coverage_of(rewritten(file, "fuse_attention"), tokens=T)
    assert without.flops_share == pytest.approx(1 - whole / (prefill_flops_per_token(config, T) * T))
    assert without.bytes_share == 1
    assert [each.operator for each in without.left] == ["attention"] * config.n_layer
    assert {each.reason for each in without.left} == {"causal attention that no kernel takes"}
    assert sum(each.flops for each in without.left) == whole

    nothing = coverage_of(rewritten(file, opt_level=0), tokens=T)
    assert (nothing.flops_share, nothing.bytes_share) == (0, 0)
    assert sum(each.flops for each in nothing.left) == prefill_flops_per_token(config, T) * T
    products = {each.reason for each in nothing.left if each.operator == "matmul"}
    assert products == {"a linear layer that no kernel takes"}
    read = sum(each.bytes for each in nothing.left)
    assert 4 * matmul_parameters(config) < read <= sum(w.nbytes for w in rewritten(file, opt_level=0).weights.values())


# Attention whose mask is an input, as one for padding is, of x through a linear layer.
PADDED = """
<ir_version: 10, opset_import: ["" : 23]>
f (float[B,T,24] x, float[B,1,T,T] mask) => (float[B,T,24] y)
{
    [project] qkv = MatMul (x, w)
    q, k, v = Split <axis = 2, num_outputs = 3> (qkv)
    mixed = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v, mask)
    [out] y = MatMul (mixed, u)
}
"""


def test_a_node_that_is_left_is_named_with_the_reason():
    proto = onnx.parser.parse_model(PADDED)
    for name, shape in (("w", (24, 72)), ("u", (24, 24))):
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, "float32"), name))
    found = coverage_of(rewritten(proto.SerializeToString()), batch=2, tokens=8)
    reason = "attention with a mask that is not the causal one alone"
    assert [(each.node, each.operator, each.reason) for each in found.left] == [("mixed", "matmul", reason)] * 2
    products, linear = 2 * 2 * 2 * 8 * 8 * 24, 2 * 2 * 8 * 24 * 96
    assert found.flops_share == pytest.approx(linear / (linear + products))
    assert str(found).endswith(f"; not: matmul mixed ({reason})")
    assert "softmax" in found.elementwise
    assert Coverage.from_json(json.loads(json.dumps(found.to_json()))) == found
