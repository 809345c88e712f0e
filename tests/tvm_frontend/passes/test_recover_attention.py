import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from tvm_frontend.frontends.onnx.importer import import_onnx
from tvm_frontend.passes.cancel_transposes import cancel_transposes
from tvm_frontend.passes.fuse_attention import fuse_attention
from tvm_frontend.passes.recover_attention import recover_attention

# nh = 2, hs = 12; s = 1/√12, and root the square root of it
ATTENTION = """
<ir_version: 10, opset_import: ["" : 18]>
attend (float[B,T,72] qkv) => (float[B,T,24] y)
<int64[1] nh = {2}, int64[1] hs = {12}, int64[1] C = {24}, int64[1] whole = {-1}, int64 zero = {0}, int64 one = {1},
 int64 less = {-1}, int64[1] zero1 = {0}, int64[1] one1 = {1}, float[1] ones = {1}, float minus = {-1},
 float nothing = {0}, float lowest = {-3.4e38}, float s = {0.288675}, float root = {0.537285},
 float d = {3.464102}, float far = {-10000}>
{
    q, k, v = Split <axis = 2, num_outputs = 3> (qkv)
    BT = Shape <start = 0, end = 2> (qkv)
    B1 = Shape <start = 0, end = 1> (qkv)
    T1 = Shape <start = 1, end = 2> (qkv)
    TT = Concat <axis = 0> (T1, T1)
    split = Concat <axis = 0> (BT, nh, hs)
    q4 = Reshape (q, split)
    k4 = Reshape (k, split)
    v4 = Reshape (v, split)
    qh = Transpose <perm = [0, 2, 1, 3]> (q4)
    kt = Transpose <perm = [0, 2, 3, 1]> (k4)
    vh = Transpose <perm = [0, 2, 1, 3]> (v4)
    square = Expand (ones, TT)
    lower = Trilu <upper = 0> (square)
    later = Equal (lower, nothing)
    mask = Where (later, lowest, nothing)
    product = MatMul (qh, kt)
    scores = Mul (product, s)
    masked = Add (scores, mask)
    weights = Softmax <axis = -1> (masked)
    mixed = MatMul (weights, vh)
    y4 = Transpose <perm = [0, 2, 1, 3]> (mixed)
    merged = Concat <axis = 0> (BT, C)
    y = Reshape (y4, merged)
}
"""


def attention(*changes):
    """The graph of the text above, with the line of the same last name in the place of each change."""
    lines = ATTENTION.splitlines()
    for change in changes:
        *_, last = change.splitlines()
        name = last.split(" = ")[0]
        lines = [change if line.strip().startswith(f"{name} = ") else line for line in lines]
    return import_onnx(onnx.parser.parse_model("\n".join(lines)))


MERGED = """kh = Transpose <perm = [0, 2, 1, 3]> (k4)
    of3 = Concat <axis = 0> (whole, T1, hs)
    k3 = Reshape (kh, of3)
    k3t = Transpose <perm = [0, 2, 1]> (k3)
    of4 = Concat <axis = 0> (B1, nh, hs, T1)
kt = Reshape (k3t, of4)"""
COMPARED = """end = Squeeze (T1)
    places = Range (zero, end, one)
    query = Unsqueeze (places, one1)
    key = Unsqueeze (places, zero1)
later = Greater (key, query)"""
BOTH_SCALED = """qs = Mul (qh, root)
    ks = Mul (kt, root)
product = MatMul (qs, ks)"""
NOT_A_NUMBER = """w = Softmax <axis = -1> (masked)
    odd = IsNaN (w)
weights = Where (odd, nothing, w)"""
FORMS = {
    "scaled after the product": (),
    "divided": ("scores = Div (product, d)",),
    "the scale first": ("scores = Mul (s, product)",),
    "both factors scaled": (BOTH_SCALED, "scores = Mul (product, ones)"),
    "heads merged while keys are turned": (MERGED,),
    "the mask chooses": ("masked = Where (later, lowest, scores)",),
    "a triangle of infinity": (
        "square = ConstantOfShape <value = float[1] {-inf}> (TT)",
        "mask = Trilu <upper = 1> (square, one)",
    ),
    "places compared": (COMPARED,),
    "no number becomes 0": (NOT_A_NUMBER,),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_causal_attention_that_is_spelt_out_is_one_kernel(calls, kernels, rewritten, form):
    before = attention(*FORMS[form])
    after = fuse_attention(cancel_transposes(recover_attention(before)), kernels)
    assert calls(after) == {"causal_attention": 1}
    rewritten(before, after, [np.random.default_rng(0).normal(size=(2, 5, 72)).astype("float32")])


PROJECTED = """normal = LayerNormalization <axis = -1> (x, gain, offset)
    product0 = MatMul (normal, w)
    qkv = Add (product0, bias)
q, k, v = Split <axis = 2, num_outputs = 3> (qkv)"""


def projected(factor, lowest, *changes):
    """The graph of the text with qkv computed from x by LayerNorm and random weights, those of q and k by a factor."""
    text = ATTENTION.replace("float[B,T,72] qkv", "float[B,T,18] x").replace("{-3.4e38}", f"{{{lowest}}}")
    lines = [PROJECTED if line.strip().startswith("q, k, v =") else line for line in text.splitlines()]
    for change in changes:
        name = change.splitlines()[-1].strip().split(" = ")[0]
        lines = [change if line.strip().startswith(f"{name} = ") else line for line in lines]
    proto = onnx.parser.parse_model("\n".join(lines))
    random = np.random.default_rng(0)
    scale = np.repeat([factor, factor, 1], 24)
    arrays = {"gain": random.normal(size=18), "offset": random.normal(size=18)}
    arrays |= {"w": random.normal(size=(18, 72)) * scale, "bias": random.normal(size=72) * scale}
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(array.astype("float32"), name))
    return proto


# The largest score of these weights is about 100, and the bound about 800.
SMALL = {"-10000": (1, "-10000"), "-65504, larger scores": (3, "-65504")}
LARGE = {"-10000, larger scores": (4, "-10000"), "scores of some 10000": (30, "-65504")}


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL | LARGE)
def test_a_number_hides_keys_whose_scores_are_proven_small(calls, kernels, run, case):
    proto = projected(*(SMALL | LARGE)[case])
    after = fuse_attention(cancel_transposes(recover_attention(import_onnx(proto))), kernels)
    assert calls(after)["causal_attention"] == (case in SMALL)
    x = np.random.default_rng(1).normal(size=(2, 9, 18)).astype("float32")
    expected = ReferenceEvaluator(proto).run(None, {"x": x})[0]
    np.testing.assert_allclose(run(after, x), expected, rtol=0, atol=1e-3)


def test_what_is_made_of_keys_otherwise_is_not_bounded(calls):
    before = import_onnx(projected(1, "-10000", "other = Exp (k)\n    k4 = Reshape (other, split)"))
    assert calls(recover_attention(before)) == calls(before)


OTHERS = {
    "hidden among small scores": ("mask = Where (later, far, nothing)",),
    "no mask": ("masked = Mul (scores, ones)",),
    "earlier keys hidden": ("lower = Trilu <upper = 1> (square)",),
    "one's own hidden": ("lower = Trilu <upper = 0> (square, less)",),
    "the next one seen": ("lower = Trilu <upper = 0> (square, one)",),
    "hidden a little": ("mask = Where (later, minus, nothing)",),
    "something added to the rest": ("mask = Where (later, lowest, s)",),
    "the rest hidden": ("masked = Where (later, scores, lowest)",),
    "softmax over queries": ("weights = Softmax <axis = -2> (masked)",),
}


@pytest.mark.parametrize("case", OTHERS)
def test_attention_of_another_kind_stays(calls, case):
    before = attention(*OTHERS[case])
    assert calls(before)["relax.nn.softmax"] == 1
    assert calls(recover_attention(before)) == calls(before)
