import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_frontend.passes.fuse_attention import fuse_attention
from tvm_frontend.passes.merge_projections import merge_projections

B, T = tvm.tirx.Var("B", "int64"), tvm.tirx.Var("T", "int64")
K, nh, hs = 18, 2, 12
C = nh * hs
X = {"x": ((B, T, K), "float32"), "z": ((B, T, K), "float32")}


def normal(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype("float32") / 4


WEIGHTS = {f"w{part}": normal(K, C) + i / 40 for i, part in enumerate("qkv")}
TURNED = {name: weight.T.copy() for name, weight in WEIGHTS.items()}
BIASES = {f"b{part}": normal(C) + i for i, part in enumerate("qkv")}


def attention(scales=(1, 1, 1), of="xxx", turned=False, reads_keys=False, order="qkv", **how):
    """Attention to q, k and v that are linear layers of their own, then merged heads."""

    def body(emit, x, z, **weights):
        heads = {}
        for part, scale, source in zip("qkv", scales, of, strict=True):
            weight = weights[f"w{part}"]
            weight = emit(op.permute_dims(weight)) if turned else weight
            value = emit(op.matmul({"x": x, "z": z}[source], weight))
            value = emit(op.add(value, weights[f"b{part}"])) if f"b{part}" in weights else value
            value = emit(op.multiply(value, relax.const(np.float32(scale)))) if scale != 1 else value
            heads[part] = (emit(op.reshape(value, (B, T, nh, hs))), value)
        q, k, v = (heads[part][0] for part in order)
        y = emit(op.nn.attention(q, k, v, **({"causal_mask": "TopLeft"} | how)))
        y = emit(op.reshape(y, (B, T, C)))
        return op.add(y, heads["k"][1]) if reads_keys else y

    return body


FORMS = {
    "no bias": (attention(), WEIGHTS),
    "biases": (attention(), WEIGHTS | BIASES),
    "a bias of q alone": (attention(), WEIGHTS | {"bq": BIASES["bq"]}),
    "weights as torch has them": (attention(turned=True), TURNED | BIASES),
    "q scaled, as OPT does": (attention(scales=(0.3, 1, 1), scale=tvm.tirx.const(1, "float32")), WEIGHTS | BIASES),
    "q and k scaled": (attention(scales=(0.7, 0.6, 1)), WEIGHTS),
    "one weight for keys and values": (attention(), WEIGHTS | {"wv": WEIGHTS["wk"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_three_linear_layers_become_one_and_attention_a_kernel(graph_of, calls, kernels, rewritten, form):
    body, weights = FORMS[form]
    before = graph_of(body, X, weights)
    after = fuse_attention(merge_projections(before), kernels)
    biased = {"relax.add": 1} if any(name.startswith("b") for name in weights) else {}
    assert calls(after) == {"relax.matmul": 1, "causal_attention": 1} | biased
    rewritten(before, after, [normal(2, 5, K), normal(2, 6, K)[:, :5]])


LEFT_ALONE = {
    "of different values": (attention(of="xxz"), WEIGHTS),
    "keys that something else reads": (attention(reads_keys=True), WEIGHTS),
    "v scaled": (attention(scales=(1, 1, 0.5)), WEIGHTS),
    "no mask": (attention(causal_mask=None), WEIGHTS),
    "a window": (attention(window_size=tvm.tirx.IntImm("int32", 4)), WEIGHTS),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_other_projections_stay(graph_of, calls, case):
    body, weights = LEFT_ALONE[case]
    before = graph_of(body, X, weights)
    assert calls(merge_projections(before)) == calls(before)
